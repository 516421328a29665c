"""A teacher's part in one group of rows of the head loss in Triton.

What the teacher says of a chunk stands in a buffer of the chunk's shape. From hidden states: its logits, by
the vendor's GEMM. Of a top k: each entry's place 1 to k in it, 0 in the tail, so that the kernels that walk
over the logits see what is tail; the k + 1 buckets themselves are small, and torch does them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ibdistill.ops import launch
from ibdistill.ops.head_loss.arguments import SMALLEST_PROBABILITY
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.kernels import (
    FORWARD,
    JSD,
    REVERSE,
    TOP_K,
    row_stats_kernel,
    tail_kernel,
    teach_kernel,
)


class Teaching:
    """The teacher's rows of one group. `cut` takes a tensor for each stream and gives the group's rows."""

    def __init__(self, work, cut, labels: Tensor, taught: Tensor):
        self.work, self.settings, self.taught, self.labels = work, work.teacher, taught, labels
        teacher, rows = self.settings, len(labels)
        self.buffer, self.loaded = work.buffers[1], None
        new = labels.new_empty
        self.student_lse, self.teacher_lse, self.losses, self.means = (
            new(rows, dtype=torch.float32) for _ in range(4)
        )
        self.tops = self.student_lse
        if teacher.is_top_k:
            self.ids, self.q = (cut(self._streams(i)) for i in (1, 2))
            self.tops = new(rows, self.ids.shape[1], dtype=torch.float32)
        else:
            self.hidden = cut(self._streams(0))

    def _streams(self, field: int) -> list[Tensor]:
        """One field of the teacher's streams; zeros where it has nothing to say."""
        signals = [self.settings.predict, self.settings.explain]
        example = next(signal[field] for signal in signals if signal is not None)
        return [
            example.new_zeros(count, example.shape[1]) if signal is None else signal[field].detach()
            for count, signal in zip(self.work.counts, signals, strict=False)
        ]

    @property
    def divergence(self) -> int:
        """The kernels' constant."""
        if self.settings.is_top_k:
            return TOP_K
        return {"forward": FORWARD, "reverse": REVERSE, "jsd": JSD}[self.settings.divergence]

    def load(self, a: int, b: int) -> Tensor:
        """What the teacher says of the rows a to b, unless it stands there already."""
        out = self.buffer[: b - a]
        if self.loaded == (a, b):
            return out
        self.loaded = (a, b)
        if self.settings.is_top_k:
            ids = self.ids[a:b]
            places = torch.arange(1, ids.shape[1] + 1, device=out.device).to(out.dtype)
            return out.zero_().scatter_(1, ids, places.expand_as(ids))
        return self.work.multiply(self.hidden[a:b], self.settings.weight.detach(), self.settings.bias, out)

    def log_probabilities(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Logits at temperature 1 of the rows a to b, their log-sum-exps; a top k's tail in equal shares."""
        lse = torch.zeros_like(self.student_lse)
        if self.settings.is_top_k:
            self.loaded, out = None, self.buffer[: b - a]
            q = self.q[a:b].float()
            shares = max(self.work.V - q.shape[1], 1)
            tail = (1 - q.sum(-1, keepdim=True)).clamp_min_(SMALLEST_PROBABILITY) / shares
            tiny = torch.finfo(torch.float32).tiny
            out.copy_(tail.log_()).scatter_(1, self.ids[a:b], q.clamp_min(tiny).log_().to(out.dtype))
        else:
            out, scratch = self.load(a, b), torch.empty_like(lse)
            row_stats_kernel[(b - a,)](
                out, out.stride(0), self.labels, lse, scratch, scratch, a,
                self.work.V, self.work.padded, BLOCK=self.work.row_block, num_warps=launch.WARPS,
            )  # fmt: skip
        return out, lse

    def teach(self, z: Tensor, a: int, b: int) -> None:
        """Divergences of the rows a to b, whose logits are z, and what their gradients need."""
        teacher, work, settings = self.load(a, b), self.work, self.settings
        if settings.is_top_k:
            self._teach_top_k(z, teacher, a, b)
            return
        teach_kernel[(b - a,)](
            z, teacher, z.stride(0), self.student_lse, self.teacher_lse, self.losses, self.means, a,
            work.V, work.padded, 1 / settings.temperature, settings.beta,
            DIVERGENCE=self.divergence, BLOCK=work.row_block, num_warps=launch.WARPS,
        )  # fmt: skip

    def _teach_top_k(self, z: Tensor, marks: Tensor, a: int, b: int) -> None:
        work, settings, mine = self.work, self.settings, slice(a, b)
        tail_kernel[(b - a,)](
            z, marks, z.stride(0), self.teacher_lse, a, work.V, work.padded, 1 / settings.temperature,
            BLOCK=work.row_block, num_warps=launch.WARPS,
        )  # fmt: skip
        tail, x = self.teacher_lse[mine], z.gather(1, self.ids[mine]).float() / settings.temperature
        lse = torch.logaddexp(tail, x.logsumexp(-1))
        # k = V leaves no tail: its logarithm must still be a number
        log_mass = (tail - lse).clamp_min_(math.log(torch.finfo(torch.float32).tiny))
        q = self.q[mine].float()
        log_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).clamp_min_(SMALLEST_PROBABILITY).log_()
        log_p = torch.cat([x - lse[:, None], log_mass[:, None]], -1)
        losses, gradient = DIVERGENCES[settings.divergence](log_q, log_p, settings.beta)
        self.student_lse[mine], self.losses[mine], self.tops[mine] = lse, losses, gradient[:, :-1]
        # a bucket's gradient is shared among its tokens in proportion to their probabilities
        self.means[mine] = gradient[:, -1] / log_mass.exp()
