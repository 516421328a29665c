"""The inner activation of feed-forward layers with its gate and dropout, as one operation."""

from ibdistill.ops.gates.api import activate

__all__ = ["activate"]
