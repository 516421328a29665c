"""Cross entropies, mutual information and distillation on a language model's head, in bounded memory."""

from ibdistill.ops.head_loss.api import head_loss, logits_loss
from ibdistill.ops.head_loss.arguments import (
    IGNORED,
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
)

__all__ = [
    "IGNORED",
    "MISettings",
    "Stream",
    "TeacherDistributions",
    "TeacherStream",
    "Weights",
    "head_loss",
    "logits_loss",
]
