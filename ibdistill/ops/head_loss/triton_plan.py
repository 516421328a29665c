"""The head loss in Triton: what is fixed for one call, how it is cut into groups, and its running sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ibdistill.ops import launch
from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss.arguments import BLOCK_ROWS, STREAMS, Call, TeacherDistributions, Weights
from ibdistill.ops.head_loss.kernels import NONE, NORMALIZED, PAPER, softcap_kernel

KERNEL_CONSTANTS = {"paper": PAPER, "normalized": NORMALIZED}
"""Estimator -> its number in the kernels. These are the estimators that are `in_triton`."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What every launch of one call needs, fixed before its first group of rows."""

    V: int
    padded: int
    """Elements of a row of the buffers of logits: V, rounded up so that loads can be wide."""
    row_block: int
    """Elements that a kernel with one program per row takes at once (`launch.row_block`)."""
    column_block: int
    """Elements of a row that belong to one program (`launch.column_block`)."""
    weights: Weights
    teacher: TeacherDistributions | None
    softcap: float | None
    """The cap of the student's logits."""
    estimator: int
    """NONE, PAPER or NORMALIZED: the mutual-information term."""
    is_max: bool
    """Whether its pool is the max."""
    directions: tuple[tuple[str, str], ...]
    """Its (target, estimate) pairs of streams."""
    needs_pool_gradient: bool
    """Whether its gradient reaches the logits."""
    pool_scale: float
    """Its weight for one direction."""
    receives: Tensor
    """[2] int32: 1 for the streams, predict and explain, that its gradient reaches."""

    @property
    def is_pooled(self) -> bool:
        """Whether there is a mutual-information term here."""
        return self.estimator != NONE

    @property
    def column_blocks(self) -> int:
        """Programs that share a row."""
        return triton.cdiv(self.padded, self.column_block)

    def multiply(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, out: Tensor
    ) -> Tensor:
        """hidden [rows, D] W^T + b, capped, into the first V columns of `out` [rows, padded].

        The product is the vendor's GEMM. A cap takes a pass of its own, which reads and writes each logit.
        """
        view = out[:, : self.V]
        if weight.dtype != out.dtype:
            view.copy_(hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T))
        elif bias is None:
            torch.mm(hidden, weight.T, out=view)
        else:
            torch.addmm(bias, hidden, weight.T, out=view)
        if cap is not None and len(out):
            softcap_kernel[(len(out), self.column_blocks)](
                out, out.stride(0), self.V, cap, BLOCK=self.column_block, num_warps=launch.WARPS
            )
        return out


def make_plan(call: Call, V: int, padded: int, *, differentiate: bool) -> Plan:
    """The plan of a call with V logits per row. `differentiate`: whether any input needs a gradient."""
    example, mi = call.predict.hidden, call.mi
    directions = () if mi is None else mi.directions
    receivers = [name for _, name in directions] if call.weights.mi != 0 else []
    return Plan(
        V=V,
        padded=padded,
        row_block=launch.row_block(V, example.element_size()),
        column_block=launch.column_block(V, example.element_size()),
        weights=call.weights,
        teacher=call.teacher,
        softcap=call.softcap,
        estimator=NONE if mi is None else KERNEL_CONSTANTS[mi.estimator],
        is_max=mi is not None and mi.pool == "max",
        directions=directions,
        needs_pool_gradient=differentiate and bool(receivers),
        pool_scale=call.weights.mi / max(len(directions), 1),
        receives=to_device(
            torch.tensor([name in receivers for name in STREAMS], dtype=torch.int32), example.device
        ),
    )


@dataclass(eq=False)
class Sums:
    """Sums over the groups that are done. They stay on the device, so that nothing waits for it."""

    questions: Tensor
    """0-d float32: questions with positions in both streams."""
    targets: list[Tensor | float]
    """For each direction the sum over questions of the target's pooled distribution [V] (normalized only)."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """The other terms, 0-d float32."""

    def add(self, name: str, value: Tensor) -> None:
        """Add to one of the terms."""
        self.terms[name] = self.terms[name] + value if name in self.terms else value


class Group(NamedTuple):
    """Rows that are worked on together: whole questions if something is pooled."""

    slices: list[tuple[int, int, int]]
    """Stream (0 predict, 1 explain), its rows from, to; in the order of the group's rows."""
    lines: tuple[int, int]
    """Its part of the table."""
    questions: int


def cut_into_groups(
    call: Call, size: int, pooled: bool
) -> tuple[list[Group], list[tuple[int, int, int, int]]]:
    """Groups of at most `size` rows, or of one larger question, and the table of their sequences.

    With `pooled` a group is of whole questions, and the table has two lines for each: predict's, explain's.
    Else a group is of any rows, and a line stands for BLOCK_ROWS of them: there are no sequences to follow.
    """
    streams = [s for s in (call.predict, call.explain) if s is not None]
    groups: list[Group] = []
    table: list[tuple[int, int, int, int]] = []
    if not pooled:
        counts = [s.hidden.shape[0] for s in streams]
        for start in range(0, sum(counts), size):
            stop, slices, offset = min(start + size, sum(counts)), [], 0
            for i, count in enumerate(counts):
                a, b = max(start - offset, 0), min(stop - offset, count)
                if a < b:
                    slices.append((i, a, b))
                offset += count
            lines = [(r, min(r + BLOCK_ROWS, stop - start), 0, 0) for r in range(0, stop - start, BLOCK_ROWS)]
            groups.append(Group(slices, (len(table), len(table) + len(lines)), 0))
            table += lines
        return groups, table
    p, e = (s.cu.tolist() for s in streams)
    first = 0
    for q in range(1, len(p)):
        full = q + 1 < len(p) and p[q + 1] - p[first] + e[q + 1] - e[first] > size
        if q + 1 < len(p) and not full:
            continue
        shift = p[q] - p[first] - e[first]
        lines = []
        for i in range(first, q):
            lines.append((p[i] - p[first], p[i + 1] - p[first], i - first, 0))
            lines.append((e[i] + shift, e[i + 1] + shift, i - first, 1))
        slices = [(0, p[first], p[q]), (1, e[first], e[q])]
        groups.append(Group(slices, (len(table), len(table) + len(lines)), q - first))
        table += lines
        first = q
    return groups, table
