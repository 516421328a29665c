"""Losses on packed hidden states. Imports torch (and triton, where it exists) only."""
