"""A teacher's part in one group of rows of the head loss in Triton.

What the teacher says about a chunk stands in a buffer of the chunk's shape. For a teacher that is given by
hidden states it holds the teacher's logits, computed by the vendor's GEMM. For a top k it holds each entry's
place 1 to k, and 0 in the tail, so that the kernels that walk over the logits see which entries are the tail.
The k + 1 buckets themselves are small, and torch computes their divergence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ibdistill.ops import launch
from ibdistill.ops.head_loss.arguments import SMALLEST_PROBABILITY, TeacherStream
from ibdistill.ops.head_loss.divergences import loss_and_gradient
from ibdistill.ops.head_loss.kernels import NONE, row_stats_kernel
from ibdistill.ops.head_loss.kernels_teacher import (
    FORWARD,
    JSD,
    REVERSE,
    TOP_K,
    divergence_kernel,
    tail_kernel,
)
from ibdistill.ops.head_loss.sampled_token import value_and_factor
from ibdistill.ops.head_loss.triton_plan import Plan


class TritonDistiller:
    """The teacher's part in one group of rows: divergences, and what their gradients need, per row."""

    def __init__(self, plan: Plan, targets: TeacherStream, buffer: Tensor, labels: Tensor, taught: Tensor):
        """Get ready for one group of rows.

        Args:
            plan: of a call that has a teacher.
            targets: what the teacher says about the group's rows.
            buffer: [chunk, padded], for one chunk of it after another.
            labels: [rows].
            taught: [rows] float32, each row's distillation weight times the temperature; 0: no
                distillation.
        """
        self.plan, self.teacher, self.targets, self.buffer = plan, plan.teacher, targets, buffer
        self.labels, self.taught = labels, taught
        self.loaded: tuple[int, int] | None = None
        rows, new = len(labels), labels.new_empty
        self.student_lse, self.teacher_lse, self.losses, self.means = (
            new(rows, dtype=torch.float32) for _ in range(4)
        )
        self.tops = self.student_lse
        if self.teacher.is_top_k:
            self.tops = new(rows, targets.ids.shape[1], dtype=torch.float32)

    @property
    def divergence(self) -> int:
        """The kernels' constant; NONE for an estimate from the labels, which `scale` has (`estimate`)."""
        if self.teacher.is_sampled:
            return NONE
        if self.teacher.is_top_k:
            return TOP_K
        return {"forward": FORWARD, "reverse": REVERSE, "jsd": JSD}[self.teacher.divergence]

    def load(self, a: int, b: int) -> Tensor:
        """The buffer with what the teacher says about the rows a to b, which it may hold already."""
        out = self.buffer[: b - a]
        if self.loaded == (a, b):
            return out
        self.loaded = (a, b)
        if self.teacher.is_top_k:
            ids = self.targets.ids[a:b]
            places = torch.arange(1, ids.shape[1] + 1, device=out.device).to(out.dtype)
            return out.zero_().scatter_(1, ids, places.expand_as(ids))
        teacher = self.teacher
        return self.plan.multiply(
            self.targets.hidden[a:b], teacher.weight.detach(), teacher.bias, teacher.softcap, out
        )

    def log_probabilities(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Logits at temperature 1 of the rows a to b, and log-sum-exps [rows] that are right for these rows.

        The tail of a top k is shared equally among the tokens that it lacks.
        """
        lse = torch.zeros_like(self.student_lse)
        if self.teacher.is_top_k:
            self.loaded, out = None, self.buffer[: b - a]
            q = self.targets.probabilities[a:b].float()
            shares = max(self.plan.V - q.shape[1], 1)
            tail = (1 - q.sum(-1, keepdim=True)).clamp_min_(SMALLEST_PROBABILITY) / shares
            tiny = torch.finfo(torch.float32).tiny
            out.copy_(tail.log_()).scatter_(1, self.targets.ids[a:b], q.clamp_min(tiny).log_().to(out.dtype))
        else:
            out = self.load(a, b)
            self._statistics(lse, torch.empty_like(lse), a, b)
        return out, lse

    def _statistics(self, lse: Tensor, ce: Tensor, a: int, b: int) -> None:
        """Log-sum-exp and -log q[label] of the teacher's rows a to b, which the buffer holds."""
        out = self.buffer
        row_stats_kernel[(b - a,)](
            out, out.stride(0), self.labels, lse, ce, torch.empty_like(ce), a,
            self.plan.V, self.plan.padded, BLOCK=self.plan.row_block, num_warps=launch.WARPS,
        )  # fmt: skip

    def estimate(self, label_log_p: Tensor, a: int, b: int) -> Tensor:
        """Note the estimates from the labels of the rows a to b, and return the weighted factors [b - a] of
        the gradients of `label_log_p` [b - a]. It costs one read of the teacher's logits, if any."""
        if self.teacher.is_top_k:
            log_q = self.targets.probabilities[a:b, 0].float().log()
        else:
            self.load(a, b)
            self._statistics(self.teacher_lse, self.means, a, b)
            log_q = -self.means[a:b]
        value, factor = value_and_factor(self.teacher.divergence, log_q, label_log_p)
        self.losses[a:b] = value
        return factor * self.taught[a:b]

    def distil(self, z: Tensor, a: int, b: int) -> None:
        """Divergences of the rows a to b, whose logits are z, and what their gradients need."""
        teacher_logits, plan, teacher = self.load(a, b), self.plan, self.teacher
        if teacher.is_top_k:
            self._distil_top_k(z, teacher_logits, a, b)
            return
        divergence_kernel[(b - a,)](
            z, teacher_logits, z.stride(0), self.student_lse, self.teacher_lse, self.losses, self.means, a,
            plan.V, plan.padded, 1 / teacher.temperature, teacher.beta,
            DIVERGENCE=self.divergence, BLOCK=plan.row_block, num_warps=launch.WARPS,
        )  # fmt: skip

    def _distil_top_k(self, z: Tensor, marks: Tensor, a: int, b: int) -> None:
        plan, teacher, mine = self.plan, self.teacher, slice(a, b)
        tail_kernel[(b - a,)](
            z, marks, z.stride(0), self.teacher_lse, a, plan.V, plan.padded, 1 / teacher.temperature,
            BLOCK=plan.row_block, num_warps=launch.WARPS,
        )  # fmt: skip
        tail, x = self.teacher_lse[mine], z.gather(1, self.targets.ids[mine]).float() / teacher.temperature
        lse = torch.logaddexp(tail, x.logsumexp(-1))
        # k = V leaves no tail: its logarithm must still be a number
        log_mass = (tail - lse).clamp_min_(math.log(torch.finfo(torch.float32).tiny))
        q = self.targets.probabilities[mine].float()
        log_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).clamp_min_(SMALLEST_PROBABILITY).log_()
        log_p = torch.cat([x - lse[:, None], log_mass[:, None]], -1)
        losses, gradient = loss_and_gradient(teacher.divergence, log_q, log_p, teacher.beta)
        self.student_lse[mine], self.losses[mine], self.tops[mine] = lse, losses, gradient[:, :-1]
        # a bucket's gradient is shared among its tokens in proportion to their probabilities
        self.means[mine] = gradient[:, -1] / log_mass.exp()
