"""The head loss in Triton: dense products by the vendor's GEMM, every pass over the logits one kernel.

The mathematics, and why gradients are computed in the forward pass, are in `head_loss_torch`. What differs
is that the logits z stay in the GEMM's dtype in a buffer of whole questions, and how often they are moved:

    row_stats     one read      log-sum-exp of each row, its cross entropy, whether its label is the largest
    pool          one read      log of the pooled distribution, and for a max the winning position
    pooled_sums   [B, V] only   nine sums per question, from which estimators and directions follow
    winner_sums   [B, V] only   s[t], the sum of the gradients w that position t won (max pool)
    mean_sums     one read      the same s[t] for the mean pool, which needs every p[t, v]
    teach         one read      divergence from the teacher, of student and teacher logits
    tail          one read      the same for a teacher's top k: the student's tail mass
    gradient      read + write  dL/dz in the place of z

For cross entropies and a max-pooled term that's two reads forward, a read and a write backward: 8 bytes per
bfloat16 logit. With n positions a question, the [B, V] arrays add 24 / n bytes. A question whose rows
exceed the chunk is walked in chunks twice, its logits computed twice, its pool carried on.

A row is a position; rows of a group of questions are predict's, then explain's. `table` has a line for each
sequence: first row, last row + 1, question, stream (0 predict, 1 explain). A chunk is the rows a to b,
whose logits start at z. Nothing here waits for the device, no sum is made with atomics, so results are
reproducible to the bit, and no count of tokens is a constant of a kernel.

Block sizes are in `launch`. The buffer's rows are padded to a multiple of 16 elements, or a V like 50257
would make loads 2 bytes wide.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ibdistill.ops import launch
from ibdistill.ops.head_loss.arguments import BLOCK_ROWS, Call, Stream
from ibdistill.ops.head_loss.estimators import barber_agakov
from ibdistill.ops.head_loss.kernels import NONE, NORMALIZED, PAPER
from ibdistill.ops.head_loss.triton_group import GroupState


class _Group(NamedTuple):
    """Rows that are worked on together: whole questions if something is pooled."""

    slices: list[tuple[int, int, int]]
    """Stream (0 predict, 1 explain), its rows from, to; in the order of the group's rows."""
    lines: tuple[int, int]
    """Its part of the table."""
    questions: int


def _groups(call: Call, size: int, pooled: bool) -> tuple[list[_Group], list[tuple[int, int, int, int]]]:
    """Cut the streams into groups of at most `size` rows, or one larger question; and the table."""
    streams = [s for s in (call.predict, call.explain) if s is not None]
    groups: list[_Group] = []
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
            groups.append(_Group(slices, (len(table), len(table) + len(lines)), 0))
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
        groups.append(_Group(slices, (len(table), len(table) + len(lines)), q - first))
        table += lines
        first = q
    return groups, table


def compute(
    call: Call, weight: Tensor | None, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """Total, terms, and the gradients of predict's hidden states, explain's, weight and bias.

    Without a weight the hidden states are logits.
    """
    device = call.predict.hidden.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        work = _Work(call, weight, bias, needs)
        groups, table = _groups(call, work.size if weight is not None else sum(work.counts) or 1, work.pooled)
        lines = torch.tensor(table, dtype=torch.int32).reshape(-1, 4).to(device, non_blocking=True)
        for group in groups:
            work.group(group, lines[group.lines[0] : group.lines[1]])
        terms = work.terms()
    factors = vars(call.weights)
    total = sum(factors[name] * terms[name] for name in factors if name in terms)
    return total, terms, work.gradients()


class _Work:
    """Buffers and running sums of one call, and the walk over one group after another."""

    def __init__(self, call: Call, weight: Tensor | None, bias: Tensor | None, needs: list[bool]):
        self.call, self.weight, self.bias = call, weight, bias
        self.streams: list[Stream] = [s for s in (call.predict, call.explain) if s is not None]
        self.hidden = [s.hidden.detach() for s in self.streams]
        self.counts = [len(h) for h in self.hidden]
        example = self.hidden[0]
        self.device, self.dtype = example.device, example.dtype
        self.V = example.shape[1] if weight is None else weight.shape[0]
        self.padded = self.V if weight is None else triton.cdiv(self.V, 16) * 16
        itemsize = example.element_size()
        self.row_block, self.column_block = (
            launch.row_block(self.V, itemsize),
            launch.column_block(self.V, itemsize),
        )
        self.pooled = call.mi is not None
        self.estimator = (
            {"paper": PAPER, "normalized": NORMALIZED}[call.mi.estimator] if self.pooled else NONE
        )
        self.is_max = self.pooled and call.mi.pool == "max"
        self.directions = call.mi.directions if self.pooled else ()
        self.paired = self.pooled and call.mi.pair == "teacher"
        self.differentiate = any(needs)
        sides = [name for _, name in self.directions] if call.weights.mi != 0 else []
        self.gets = self._new([n in sides for n in ("predict", "explain")], torch.int32)
        self.pool_scale = call.weights.mi / max(len(self.directions), 1)
        self.passes = self.pooled and self.differentiate and bool(sides)
        self.teacher = call.teacher
        buffers = 1 if self.teacher is None else 2
        self.size = max(1, call.chunk_bytes // (self.padded * example.element_size() * buffers))
        self.d_hidden = [torch.zeros_like(h) if needs[0] or needs[1] else None for h in self.hidden]
        self.d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[2] else None
        self.d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[3] else None
        self.sums: dict[str, Tensor] = {}
        self.target_sums = [0.0 for _ in self.directions]
        self.questions = self._new(0.0)
        if weight is not None:
            rows = max(1, min(self.size, sum(self.counts)))
            self.buffers = [example.new_empty(rows, self.padded) for _ in range(buffers)]

    def _new(self, values, dtype=torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def cut(self, group: _Group, tensors: list[Tensor]) -> Tensor:
        """The group's rows of a tensor of each stream."""
        return torch.cat([tensors[i][a:b] for i, a, b in group.slices])

    def group(self, group: _Group, table: Tensor) -> None:
        """All work on one group of rows."""
        labels = self.cut(group, [s.labels for s in self.streams])
        rows = len(labels)
        hidden = None if self.weight is None else self.cut(group, self.hidden)
        chunks = [(a, min(a + self.size, rows)) for a in range(0, rows, self.size)]
        if self.weight is None:
            ends = [0, *torch.tensor([b - a for _, a, b in group.slices]).cumsum(0).tolist()]
            chunks = list(itertools.pairwise(ends))
        state = GroupState(self, group, table, labels)
        for i, (a, b) in enumerate(chunks):
            z = self._logits(group, hidden, a, b, i)
            state.statistics(z, a, b)
            if self.paired and a < b:
                state.pool(z, state.lse, a, b, slice(0, None, 2))
                state.pool(*state.teaching.log_probabilities(a, b), a, b, slice(1, None, 2))
            elif self.pooled:
                state.pool(z, state.lse, a, b)
            if state.teaching is not None:
                state.teaching.teach(z, a, b)
        state.estimate()
        for i, (a, b) in enumerate(chunks if self.differentiate else ()):
            again = len(chunks) > 1 and self.weight is not None
            z = self._logits(group, hidden, a, b, i) if again or self.weight is None else z
            out = z if self.weight is not None else self.d_hidden[group.slices[i][0]]
            state.gradient(z, out, a, b)
            if self.weight is not None:
                self._products(group, hidden, z[:, : self.V], a, b)

    def _logits(self, group: _Group, hidden: Tensor | None, a: int, b: int, chunk: int) -> Tensor:
        """Logits of the group's rows a to b, their rows padded."""
        if self.weight is None:
            stream, first, last = group.slices[chunk]
            logits = self.hidden[stream][first:last]
            return logits if logits.stride(1) == 1 else logits.contiguous()
        z = self.buffers[0][: b - a]
        return self.multiply(hidden[a:b], self.weight, self.bias, z)

    def multiply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """hidden W^T + b into the first V columns of `out`."""
        view = out[:, : self.V]
        if weight.dtype != out.dtype:
            view.copy_(hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T))
        elif bias is None:
            torch.mm(hidden, weight.T, out=view)
        else:
            torch.addmm(bias, hidden, weight.T, out=view)
        return out

    def _products(self, group: _Group, hidden: Tensor, dz: Tensor, a: int, b: int) -> None:
        """From dL/dz of the rows a to b the gradients of hidden states, weight and bias."""
        if self.d_hidden[0] is not None:
            d_hidden, offset = dz @ self.weight, 0
            for stream, first, last in group.slices:
                low, high = max(a, offset), min(b, offset + last - first)
                if low < high:
                    part = d_hidden[low - a : high - a]
                    self.d_hidden[stream][first + low - offset : first + high - offset] = part
                offset += last - first
        if self.d_weight is not None and dz.dtype == torch.float32:
            self.d_weight.addmm_(dz.T, hidden[a:b])
        elif self.d_weight is not None:
            self.d_weight.add_(dz.T @ hidden[a:b])
        if self.d_bias is not None:
            self.d_bias.add_(dz.sum(0, dtype=torch.float32))

    def add(self, name: str, value: Tensor) -> None:
        """Add to a running sum."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def terms(self) -> dict[str, Tensor]:
        """Sums over all groups."""
        names = [
            f"{kind}_{stream}"
            for stream in ("predict", "explain")[: len(self.streams)]
            for kind in ("ce", "correct")
        ]
        if self.pooled:
            names += ["mi", "mi_entropy"] + (["mi_constant"] if self.estimator == PAPER else [])
        if self.teacher is not None:
            taught = {"predict": self.teacher.predict, "explain": self.teacher.explain}
            names += [f"kd_{name}" for name, signal in taught.items() if signal is not None]
        terms = {name: self.sums.get(name, self._new(0.0)) for name in names}
        if self.estimator == NORMALIZED:
            entropies = [self._marginal_entropy(s) for s in self.target_sums if isinstance(s, Tensor)]
            terms["mi_bound"] = sum(entropies, self._new(0.0)) / len(self.directions) - terms["mi"]
        return terms | ({"mi_questions": self.questions} if self.pooled else {})

    def _marginal_entropy(self, target_sum: Tensor) -> Tensor:
        """`barber_agakov` with a number of questions that stays on the device."""
        return barber_agakov(target_sum, self._new(0.0), self.questions)

    def gradients(self) -> list[Tensor | None]:
        """In the order and the dtype of the inputs."""
        parts = [*[*self.d_hidden, None][:2], self.d_weight, self.d_bias]
        return [None if g is None else g.to(self.dtype) for g in parts]
