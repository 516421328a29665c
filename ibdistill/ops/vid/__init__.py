"""Variational information distillation between a teacher's and a student's hidden states."""

from ibdistill.ops.vid.api import vid_loss

__all__ = ["vid_loss"]
