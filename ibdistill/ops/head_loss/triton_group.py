"""The head loss in Triton: one group's numbers per row and per question, and the kernels' launches."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ibdistill.ops import launch
from ibdistill.ops.head_loss.arguments import IGNORED, STREAMS
from ibdistill.ops.head_loss.kernels import (
    NONE,
    PAPER,
    SUMS,
    gradient_kernel,
    mean_sums_kernel,
    pool_kernel,
    pooled_sums_kernel,
    row_stats_kernel,
    winner_sums_kernel,
)
from ibdistill.ops.head_loss.triton_teacher import Teaching


class GroupState:
    """Per-row and per-question numbers of one group, and the kernels' launches."""

    def __init__(self, work, group, table: Tensor, labels: Tensor):
        self.work, self.group, self.table, self.labels = work, group, table, labels
        self.rows = len(labels)
        new = labels.new_empty
        self.lse, self.ce, self.correct = (new(self.rows, dtype=torch.float32) for _ in range(3))
        self.kept = labels != IGNORED
        counts = [b - a for _, a, b in group.slices]
        self.per_stream = [(i, count) for (i, _, _), count in zip(group.slices, counts, strict=True)]
        weights = work.call.weights
        self.scale = self._by_stream((weights.ce_predict, weights.ce_explain))
        self.unused = self.lse
        self.pooled = self.winners = self.sums = self.won = self.lengths = self.unused
        if work.pooled:
            shape = (2, group.questions, work.padded)
            self.pooled = new(shape, dtype=torch.float32)
            self.winners = new(shape if work.is_max else 1, dtype=torch.int32)
            seen = torch.nn.functional.pad(self.kept.cumsum(0), (1, 0))
            self.lengths = (seen[table[:, 1].long()] - seen[table[:, 0].long()]).int()
            self.both = (self.lengths.view(-1, 2) > 0).all(1)
        self.teaching = None
        if work.teacher is not None:
            # no weight for a stream of which the teacher says nothing
            signals = (work.teacher.predict, work.teacher.explain)
            factors = (weights.kd_predict, weights.kd_explain)
            on = tuple(0.0 if s is None else f for s, f in zip(signals, factors, strict=True))
            taught = self._by_stream(on) * work.teacher.temperature
            self.teaching = Teaching(work, lambda parts: work.cut(group, parts), labels, taught)

    def _by_stream(self, values: tuple[float, float]) -> Tensor:
        """A number for each row that is not ignored, 0 for the others."""
        parts = [torch.full((count,), values[i], device=self.labels.device) for i, count in self.per_stream]
        return torch.where(self.kept, torch.cat(parts), 0.0)

    def statistics(self, z: Tensor, a: int, b: int) -> None:
        """Log-sum-exp, cross entropy and hits of the rows a to b."""
        if a < b:
            row_stats_kernel[(b - a,)](
                z, z.stride(0), self.labels, self.lse, self.ce, self.correct, a,
                self.work.V, self.work.padded, BLOCK=self.work.row_block, num_warps=launch.WARPS,
            )  # fmt: skip

    def pool(self, z: Tensor, lse: Tensor, a: int, b: int, sequences: slice = slice(None)) -> None:
        """Carry the pools of these lines of the table on with the rows a to b."""
        work = self.work
        # clones, because a view's first element may lie where loads can't be wide: another compilation
        table, lengths = self.table[sequences].clone(), self.lengths[sequences].clone()
        grid = (len(table), triton.cdiv(work.padded, work.column_block))
        if a < b:
            pool_kernel[grid](
                z, z.stride(0), self.labels, lse, table, lengths, self.pooled, self.winners,
                self.group.questions, a, b, work.V, work.padded,
                IS_MAX=work.is_max, BLOCK=work.column_block, num_warps=launch.WARPS,
            )  # fmt: skip

    def estimate(self) -> None:
        """Add the group's sums to the running ones."""
        offset = 0
        for stream, count in self.per_stream:
            name, mine = STREAMS[stream], slice(offset, offset + count)
            self.work.add(f"ce_{name}", self.ce[mine].sum())
            self.work.add(f"correct_{name}", self.correct[mine].sum())
            if self.teaching is not None and getattr(self.work.teacher, name) is not None:
                losses = torch.where(self.kept[mine], self.teaching.losses[mine], 0.0)
                self.work.add(f"kd_{name}", losses.sum() * self.work.teacher.temperature**2)
            offset += count
        if self.work.pooled:
            self._estimate()

    def _estimate(self) -> None:
        """Pooled sums, the terms they give, and s[t] of a max."""
        work, questions = self.work, self.group.questions
        grid = (questions, triton.cdiv(work.padded, work.column_block))
        parts = self.lse.new_empty(*grid, SUMS)
        pooled_sums_kernel[grid](
            self.pooled, self.both.int(), parts, questions, work.V, work.padded,
            BLOCK=work.column_block, num_warps=launch.WARPS,
        )  # fmt: skip
        self.sums = parts.sum(1)
        columns = self.sums.unbind(1)
        work.questions = work.questions + self.both.sum()
        for d, (target, estimate) in enumerate(work.directions):
            t, e = (STREAMS.index(name) for name in (target, estimate))
            total = columns[t]
            entropy = total.log() - columns[5 + t] / total
            if work.estimator == PAPER:
                values = {"mi": total * columns[2 + e].log() - columns[4], "mi_entropy": entropy}
                values["mi_constant"] = total * math.log(work.V)
            else:
                values = {"mi": columns[e].log() - columns[7 + t] / total, "mi_entropy": entropy}
                shares = torch.exp(self.pooled[t, :, : work.V] - total.log()[:, None])
                work.target_sums[d] = work.target_sums[d] + torch.where(self.both[:, None], shares, 0.0).sum(
                    0
                )
            for name, value in values.items():
                work.add(name, torch.where(self.both, value, 0.0).sum() / len(work.directions))
        if work.passes:
            self.won = torch.zeros_like(self.lse)
            if work.is_max and self.rows:
                self._winner_sums()

    def _winner_sums(self) -> None:
        work = self.work
        splits = triton.cdiv(work.padded, work.column_block)
        parts = self.lse.new_zeros(self.rows, splits)
        for side, name in enumerate(STREAMS):
            if name not in [estimate for _, estimate in work.directions]:
                continue
            lines = self.table[side::2].contiguous()
            winner_sums_kernel[(len(lines), splits)](
                lines, self.pooled, self.winners, self.sums, parts, self.group.questions, work.V, work.padded,
                work.pool_scale, ESTIMATOR=work.estimator, BLOCK=work.column_block, num_warps=launch.WARPS,
            )  # fmt: skip
        self.won = parts.sum(1)

    def _mean_sums(self, z: Tensor, a: int, b: int) -> None:
        work = self.work
        sequences = torch.arange(len(self.table), device=self.table.device)
        order = torch.cat([sequences[0::2], sequences[1::2]])
        counts = (self.table[:, 1] - self.table[:, 0])[order]
        owners = torch.repeat_interleave(order, counts, output_size=self.rows)
        mean_sums_kernel[(b - a,)](
            z, z.stride(0), self.labels, self.lse, owners, self.lengths, self.pooled, self.sums, work.gets,
            self.won, self.group.questions, a, work.V, work.padded, work.pool_scale,
            ESTIMATOR=work.estimator, BLOCK=work.row_block, num_warps=launch.WARPS,
        )  # fmt: skip

    def gradient(self, z: Tensor, out: Tensor, a: int, b: int) -> None:
        """Write dL/dz of the rows a to b to `out`, which may be z."""
        work, settings = self.work, self.work.teacher
        if a == b:
            return
        if work.passes and not work.is_max:
            self._mean_sums(z, a, b)
        x = self.teaching
        taught, k = (self.unused,) * 6, 0
        if x is not None:
            taught = (x.load(a, b), x.student_lse, x.teacher_lse, x.means, x.taught, x.tops)
            k = x.tops.shape[-1]
        grid = (len(self.table), triton.cdiv(work.padded, work.column_block))
        gradient_kernel[grid](
            z, z.stride(0), out, out.stride(0), self.labels, self.lse, self.scale, self.won, self.table,
            self.lengths, self.pooled, self.winners, self.sums, work.gets, *taught, k, self.group.questions,
            a, b, work.V, work.padded, work.pool_scale,
            1 / settings.temperature if settings else 1.0, settings.beta if settings else 0.5,
            ESTIMATOR=work.estimator if work.passes else NONE, IS_MAX=work.is_max,
            DIVERGENCE=NONE if x is None else x.divergence,
            BLOCK=work.column_block, num_warps=launch.WARPS,
        )  # fmt: skip
