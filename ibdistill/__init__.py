"""ibdistill: chain-of-thought distillation seen from the information bottleneck."""

__version__ = "0.1.0"
