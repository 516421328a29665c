"""The head loss in Triton: one group's numbers per row and per question, and the kernels' launches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ibdistill.ops import launch
from ibdistill.ops.head_loss.arguments import IGNORED, STREAMS, TeacherStream
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
from ibdistill.ops.head_loss.triton_plan import Group, Plan, Sums
from ibdistill.ops.head_loss.triton_teacher import TritonDistiller


class GroupState:
    """Numbers per row and per question of one group, and the kernels' launches.

    Call `start_distilling` if there is a teacher; then, for each chunk of rows, `statistics`, `pool` and
    `distil`; then `add_to`; then `gradient` for each chunk.
    """

    def __init__(self, plan: Plan, group: Group, table: Tensor, labels: Tensor):
        """`table` [sequences, 4] int32 and `labels` [rows] are the group's own."""
        self.plan, self.group, self.table, self.labels = plan, group, table, labels
        self.rows = len(labels)
        new = labels.new_empty
        self.lse, self.ce, self.correct = (new(self.rows, dtype=torch.float32) for _ in range(3))
        self.kept = labels != IGNORED
        self.per_stream = [(stream, b - a) for stream, a, b in group.slices]
        self.scale = self._by_stream((plan.weights.ce_predict, plan.weights.ce_explain))
        # a kernel needs a pointer for every argument, also for those that it will not read
        self.unused = self.lse
        self.pooled = self.winners = self.sums = self.won = self.lengths = self.unused
        if plan.is_pooled:
            shape = (2, group.questions, plan.padded)
            self.pooled = new(shape, dtype=torch.float32)
            self.winners = new(shape if plan.is_max else 1, dtype=torch.int32)
            # positions of each sequence that are not ignored: differences of a running count
            seen = torch.nn.functional.pad(self.kept.cumsum(0), (1, 0))
            self.lengths = (seen[table[:, 1].long()] - seen[table[:, 0].long()]).int()
            # the table's lines go predict, explain, predict, ...: one question per pair
            self.both = (self.lengths.view(-1, 2) > 0).all(1)
        self.distiller: TritonDistiller | None = None

    def start_distilling(self, targets: TeacherStream, buffer: Tensor) -> None:
        """Distil from `targets`, those of the group's rows; `buffer` is [rows of a chunk, padded]."""
        teacher, weights = self.plan.teacher, self.plan.weights
        # no weight for a stream about which the teacher says nothing
        on = (
            0.0 if teacher.predict is None else weights.kd_predict,
            0.0 if teacher.explain is None else weights.kd_explain,
        )
        taught = self._by_stream(on) * teacher.temperature
        if targets.weights is not None:
            taught = taught * targets.weights.float()
        self.distiller = TritonDistiller(self.plan, targets, buffer, self.labels, taught)

    def distil(self, z: Tensor, a: int, b: int) -> None:
        """Compare the rows a to b, whose logits are z, with the teacher's."""
        if self.plan.teacher.is_sampled:
            # a gradient of log p at the label, as the cross entropy's is
            self.scale[a:b] -= self.distiller.estimate(-self.ce[a:b], a, b)
        else:
            self.distiller.distil(z, a, b)

    def _by_stream(self, values: tuple[float, float]) -> Tensor:
        """The stream's value for each row that is not ignored, 0 for the others: [rows] float32."""
        parts = [torch.full((count,), values[i], device=self.labels.device) for i, count in self.per_stream]
        return torch.where(self.kept, torch.cat(parts), 0.0)

    def statistics(self, z: Tensor, a: int, b: int) -> None:
        """Log-sum-exp, cross entropy and hits of the rows a to b."""
        if a < b:
            row_stats_kernel[(b - a,)](
                z, z.stride(0), self.labels, self.lse, self.ce, self.correct, a,
                self.plan.V, self.plan.padded, BLOCK=self.plan.row_block, num_warps=launch.WARPS,
            )  # fmt: skip

    def pool(self, z: Tensor, lse: Tensor, a: int, b: int, sequences: slice = slice(None)) -> None:
        """Go on with the pools of these lines of the table over the rows a to b."""
        plan = self.plan
        # Clones, because a view's first element may be aligned worse, for which Triton would compile anew.
        table, lengths = self.table[sequences].clone(), self.lengths[sequences].clone()
        grid = (len(table), plan.column_blocks)
        if a < b:
            pool_kernel[grid](
                z, z.stride(0), self.labels, lse, table, lengths, self.pooled, self.winners,
                self.group.questions, a, b, plan.V, plan.padded,
                IS_MAX=plan.is_max, BLOCK=plan.column_block, num_warps=launch.WARPS,
            )  # fmt: skip

    def add_to(self, sums: Sums) -> None:
        """Add the group's terms to the running sums; all rows have been seen."""
        offset, teacher = 0, self.plan.teacher
        for stream, count in self.per_stream:
            name, mine = STREAMS[stream], slice(offset, offset + count)
            sums.add(f"ce_{name}", self.ce[mine].sum())
            sums.add(f"correct_{name}", self.correct[mine].sum())
            if self.distiller is not None and getattr(teacher, name) is not None:
                losses = torch.where(self.kept[mine], self.distiller.losses[mine], 0.0)
                if self.distiller.targets.weights is not None:
                    losses = losses * self.distiller.targets.weights[mine]
                sums.add(f"kd_{name}", losses.sum() * teacher.temperature**2)
            offset += count
        if self.plan.is_pooled:
            self._estimate(sums)

    def _estimate(self, sums: Sums) -> None:
        """Compute the pooled sums, add their terms to the running sums, and compute s[t] of a max."""
        plan, questions = self.plan, self.group.questions
        grid = (questions, plan.column_blocks)
        parts = self.lse.new_empty(*grid, SUMS)
        pooled_sums_kernel[grid](
            self.pooled, self.both.int(), parts, questions, plan.V, plan.padded,
            BLOCK=plan.column_block, num_warps=launch.WARPS,
        )  # fmt: skip
        # the blocks of the vocabulary are added in a fixed order, where atomics would add in any
        self.sums = parts.sum(1)
        columns = self.sums.unbind(1)
        sums.questions = sums.questions + self.both.sum()
        for d, (target, estimate) in enumerate(plan.directions):
            # the docstring of `SUMS` names the nine columns; where two belong together, predict's comes first
            t, e = (STREAMS.index(name) for name in (target, estimate))
            total = columns[t]
            entropy = total.log() - columns[5 + t] / total
            if plan.estimator == PAPER:
                values = {"mi": total * columns[2 + e].log() - columns[4], "mi_entropy": entropy}
                values["mi_constant"] = total * math.log(plan.V)
            else:
                values = {"mi": columns[e].log() - columns[7 + t] / total, "mi_entropy": entropy}
                shares = torch.exp(self.pooled[t, :, : plan.V] - total.log()[:, None])
                sums.targets[d] = sums.targets[d] + torch.where(self.both[:, None], shares, 0.0).sum(0)
            # questions with positions in one stream only have sums of 0, whose logarithms are no numbers
            for name, value in values.items():
                sums.add(name, torch.where(self.both, value, 0.0).sum() / len(plan.directions))
        if plan.needs_pool_gradient:
            self.won = torch.zeros_like(self.lse)
            if plan.is_max and self.rows:
                self._winner_sums()

    def _winner_sums(self) -> None:
        """s[t] of a max: the sum of the gradients of the entries that position t won."""
        plan = self.plan
        parts = self.lse.new_zeros(self.rows, plan.column_blocks)
        for side, name in enumerate(STREAMS):
            if name not in [estimate for _, estimate in plan.directions]:
                continue
            lines = self.table[side::2].contiguous()
            winner_sums_kernel[(len(lines), plan.column_blocks)](
                lines, self.pooled, self.winners, self.sums, parts, self.group.questions, plan.V, plan.padded,
                plan.pool_scale, ESTIMATOR=plan.estimator, BLOCK=plan.column_block, num_warps=launch.WARPS,
            )  # fmt: skip
        self.won = parts.sum(1)

    def _mean_sums(self, z: Tensor, a: int, b: int) -> None:
        """s[t] of a mean, for the rows a to b: what the mean passes to position t, over the vocabulary."""
        plan = self.plan
        sequences = torch.arange(len(self.table), device=self.table.device)
        # rows are all of predict's, then all of explain's; the table's lines alternate
        order = torch.cat([sequences[0::2], sequences[1::2]])
        counts = (self.table[:, 1] - self.table[:, 0])[order]
        owners = torch.repeat_interleave(order, counts, output_size=self.rows)
        mean_sums_kernel[(b - a,)](
            z, z.stride(0), self.labels, self.lse, owners, self.lengths, self.pooled, self.sums,
            plan.receives, self.won, self.group.questions, a, plan.V, plan.padded, plan.pool_scale,
            ESTIMATOR=plan.estimator, BLOCK=plan.row_block, num_warps=launch.WARPS,
        )  # fmt: skip

    def gradient(self, z: Tensor, out: Tensor, a: int, b: int) -> None:
        """Write dL/dz of the rows a to b to `out`, which may be z."""
        plan, teacher = self.plan, self.plan.teacher
        if a == b:
            return
        if plan.needs_pool_gradient and not plan.is_max:
            self._mean_sums(z, a, b)
        x = self.distiller
        taught, k = (self.unused,) * 6, 0
        if x is not None and x.divergence != NONE:
            taught = (x.load(a, b), x.student_lse, x.teacher_lse, x.means, x.taught, x.tops)
            k = x.tops.shape[-1]
        # one launch makes all parts of dL/dz, so that a logit is read and written once
        grid = (len(self.table), plan.column_blocks)
        gradient_kernel[grid](
            z, z.stride(0), out, out.stride(0), self.labels, self.lse, self.scale, self.won, self.table,
            self.lengths, self.pooled, self.winners, self.sums, plan.receives, *taught, k,
            self.group.questions, a, b, plan.V, plan.padded, plan.pool_scale,
            1 / teacher.temperature if teacher else 1.0, teacher.beta if teacher else 0.5,
            1 / plan.softcap if plan.softcap else 1.0,
            ESTIMATOR=plan.estimator if plan.needs_pool_gradient else NONE, IS_MAX=plan.is_max,
            DIVERGENCE=NONE if x is None else x.divergence, IS_CAPPED=plan.softcap is not None,
            BLOCK=plan.column_block, num_warps=launch.WARPS,
        )  # fmt: skip
