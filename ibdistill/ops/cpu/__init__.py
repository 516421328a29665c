"""Techniques that make the torch path fast on a CPU and are of no use to a GPU. They change no result."""
