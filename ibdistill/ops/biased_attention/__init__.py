"""Attention with a bias for each distance between query and key, as T5 has it."""

from ibdistill.ops.biased_attention.api import biased_attention

__all__ = ["biased_attention"]
