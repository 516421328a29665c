"""Processes, devices, files: what everything else stands on."""
