"""What the terms learn that meet the student in the states of the question's tokens, beside the model.

It is sharded and checkpointed with the student, and thrown away at the export.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ibdistill.objectives.weights import GRADIENT
from ibdistill.ops.vib import add_noise, vib_terms
from ibdistill.ops.vid.api import vid_loss


class VidMap(nn.Module):
    """What the variational bound between teacher and student states learns, and throws away at export.

    t ~ N(W s + b, diag exp(g)) for a question token's student state s [D] and teacher state
    t [D_teacher] (Ahn et al., CVPR 2019, arXiv 1904.05835). Its parameters are an optimizer
    group of their own, without weight decay (`training.engine`).
    """

    def __init__(self, width: int, teacher_width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(teacher_width, width, generator=generator) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(teacher_width))
        self.log_variance = nn.Parameter(torch.zeros(teacher_width))

    def forward(
        self, student: Tensor, teacher: Tensor, factor: float, *, measures: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`factor` times the sum over tokens (nats per teacher dimension), 0-d fp32; and the sum, `vid`.

        With `measures` also `gradient_vid`, as in `term_gradients` but in the question states: those are
        where this term meets the student, so its norm is no share of the others'.
        """
        learned = self.weight, self.bias, self.log_variance
        loss = vid_loss(student, teacher, *learned)
        terms = {"vid": loss.detach()}
        if measures:
            with torch.enable_grad():
                states = student.detach().requires_grad_()
                alone = factor * vid_loss(states, teacher, *(p.detach() for p in learned))
            terms[f"{GRADIENT}vid"] = torch.autograd.grad(alone, states)[0].float().square().sum()
        return factor * loss, terms


class Bottleneck(nn.Module):
    """The noise between encoder and decoder that `vib` learns; the export is without it (`ops.vib`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # a standard deviation of a tenth of what the encoder's last layer norm leaves
        self.log_variance = nn.Parameter(torch.full((width,), 2 * math.log(0.1)))

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States [rows, L, D] with noise, and `vib_terms`. In evaluation mode without noise."""
        noisy = add_noise(states, self.log_variance) if self.training else states
        return noisy, *vib_terms(states, self.log_variance, mask)
