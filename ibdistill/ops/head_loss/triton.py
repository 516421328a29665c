"""The head loss in Triton: dense products by the vendor's GEMM, every pass over the logits one kernel.

The docstring of `head_loss.torch` has the mathematics, and the reason why gradients are computed in the
forward pass. Here the logits z stay in the GEMM's dtype in a buffer of whole questions, and are moved this
often:

    row_stats     one read      log-sum-exp of each row, its cross entropy, whether its label is the largest
    pool          one read      log of the pooled distribution, and for a max the winning position
    pooled_sums   [B, V] only   nine sums per question, from which estimators and directions follow
    winner_sums   [B, V] only   s[t], the sum of the gradients w that position t won (max pool)
    mean_sums     one read      the same s[t] for the mean pool, which needs every p[t, v]
    divergence    one read      divergence from the teacher, from student and teacher logits (JSD: two reads)
    tail          one read      the student's mass in the tail of a teacher's top k
    softcap       read + write  capped logits in the place of z, where the model caps them
    gradient      read + write  dL/dz in the place of z

For cross entropies and a max-pooled term that is two reads forward and a read and a write backward, or 8
bytes per bfloat16 logit. With n positions per question, the [B, V] arrays add 24 / n bytes, and
`triton_weight` says what the gradient of the weight adds. A question whose rows exceed the chunk is walked
in chunks twice: its logits are computed twice, and its pool is carried on from chunk to chunk.

A row is a position; rows of a group of questions are predict's, then explain's. `table` has a line for each
sequence: first row, last row + 1, question, stream (0 predict, 1 explain). A chunk is the rows a to b,
whose logits start at z. The host never waits for the device. No sum is made with atomics, so results are
reproducible to the bit. No count of tokens is a constant of a kernel, so no batch compiles anew.

Block sizes are in `ops.launch`. The buffer's rows are padded to a multiple of 16 elements, because otherwise
a V like 50257 would make loads 2 bytes wide.
"""

from __future__ import annotations

import contextlib
import itertools

import torch
import triton
from torch import Tensor

from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss.arguments import STREAMS, Call, Stream, TeacherStream, field_of_streams
from ibdistill.ops.head_loss.estimators import ESTIMATORS, barber_agakov
from ibdistill.ops.head_loss.kernels import NORMALIZED
from ibdistill.ops.head_loss.triton_group import GroupState
from ibdistill.ops.head_loss.triton_plan import Group, Sums, cut_into_groups, make_plan
from ibdistill.ops.head_loss.triton_weight import GroupBuffer


def compute(
    call: Call, weight: Tensor | None, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """Total, terms, and the gradients of predict's hidden states, explain's, weight and bias.

    Without a weight the hidden states are logits.
    """
    device = call.predict.hidden.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        work = _Work(call, weight, bias, needs)
        size = work.size if weight is not None else sum(work.counts) or 1
        groups, table = cut_into_groups(call, size, work.plan.is_pooled)
        # one copy for all groups
        lines = to_device(torch.tensor(table, dtype=torch.int32).reshape(-1, 4), device)
        for group in groups:
            work.group(group, lines[group.lines[0] : group.lines[1]])
        terms = work.terms()
    factors = vars(call.weights)
    total = sum(factors[name] * terms[name] for name in factors if name in terms)
    return total, terms, work.gradients()


class _Work:
    """Buffers and sums of one call, and the walk over one group of rows after another."""

    def __init__(self, call: Call, weight: Tensor | None, bias: Tensor | None, needs: list[bool]):
        self.call, self.weight, self.bias = call, weight, bias
        self.streams: list[Stream] = [s for s in (call.predict, call.explain) if s is not None]
        self.hidden = [s.hidden.detach() for s in self.streams]
        self.counts = [len(h) for h in self.hidden]
        example = self.hidden[0]
        self.dtype = example.dtype
        V = example.shape[1] if weight is None else weight.shape[0]
        # rows of given logits stay as long as they are; rows of our own buffer are padded for wide loads
        padded = V if weight is None else triton.cdiv(V, 16) * 16
        self.differentiate = any(needs)
        self.plan = make_plan(call, V, padded, differentiate=self.differentiate)
        self.paired = call.mi is not None and call.mi.pair == "teacher"
        # a teacher's logits, or the places of its top k, take a second buffer as large as the student's
        buffers = 1 if call.teacher is None else 2
        self.size = max(1, call.chunk_bytes // (padded * example.element_size() * buffers))
        self.d_hidden = [torch.zeros_like(h) if needs[0] or needs[1] else None for h in self.hidden]
        self.d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[3] else None
        self.zero = example.new_zeros((), dtype=torch.float32)
        self.sums = Sums(self.zero, [0.0 for _ in self.plan.directions])
        if weight is not None:
            rows = max(1, min(self.size, sum(self.counts)))
            self.logits = GroupBuffer(weight, sum(self.counts), self.size, padded, needs_weight=needs[2])
            self.teacher_buffer = example.new_empty(rows, padded) if buffers == 2 else None
        self.teacher_fields: list[list[Tensor] | None] | None = None
        if call.teacher is not None:
            fields = TeacherStream._fields
            self.teacher_fields = [field_of_streams(call.teacher, field, self.counts) for field in fields]

    def _cut(self, group: Group, tensors: list[Tensor]) -> Tensor:
        """The group's rows of a tensor of each stream."""
        return torch.cat([tensors[i][a:b] for i, a, b in group.slices])

    def group(self, group: Group, table: Tensor) -> None:
        """Do all work on one group of rows: statistics and pools, then terms, then gradients."""
        labels = self._cut(group, [s.labels for s in self.streams])
        rows = len(labels)
        hidden = None if self.weight is None else self._cut(group, self.hidden)
        chunks = [(a, min(a + self.size, rows)) for a in range(0, rows, self.size)]
        if self.weight is None:
            # logits that are given are walked over where they lie: a chunk per stream
            ends = [0, *torch.tensor([b - a for _, a, b in group.slices]).cumsum(0).tolist()]
            chunks = list(itertools.pairwise(ends))
        state = GroupState(self.plan, group, table, labels)
        if self.teacher_fields is not None:
            cut = [None if x is None else self._cut(group, x) for x in self.teacher_fields]
            state.start_distilling(TeacherStream(*cut), self.teacher_buffer)
        for i, (a, b) in enumerate(chunks):
            z = self._logits(group, hidden, a, b, i)
            state.statistics(z, a, b)
            if self.paired and a < b:
                # even lines of the table are predict's sequences, odd ones explain's
                state.pool(z, state.lse, a, b, slice(0, None, 2))
                state.pool(*state.distiller.log_probabilities(a, b), a, b, slice(1, None, 2))
            elif self.plan.is_pooled:
                state.pool(z, state.lse, a, b)
            if state.distiller is not None:
                state.distil(z, a, b)
        state.add_to(self.sums)
        for i, (a, b) in enumerate(chunks if self.differentiate else ()):
            # the buffer holds the last chunk's logits only; those of a group in one chunk still stand there
            again = len(chunks) > 1 and self.weight is not None
            z = self._logits(group, hidden, a, b, i) if again or self.weight is None else z
            # logits that are given stay as they are: their gradient has a tensor of its own
            out = z if self.weight is not None else self.d_hidden[group.slices[i][0]]
            state.gradient(z, out, a, b)
            if self.weight is not None:
                self._products(group, hidden, z[:, : self.plan.V], a, b)

    def _logits(self, group: Group, hidden: Tensor | None, a: int, b: int, chunk: int) -> Tensor:
        """Logits of the group's rows a to b, their rows padded."""
        if self.weight is None:
            stream, first, last = group.slices[chunk]
            logits = self.hidden[stream][first:last]
            return logits if logits.stride(1) == 1 else logits.contiguous()
        out = self.logits.place(b - a)
        return self.plan.multiply(hidden[a:b], self.weight, self.bias, self.plan.softcap, out)

    def _products(self, group: Group, hidden: Tensor, dz: Tensor, a: int, b: int) -> None:
        """From dL/dz of the rows a to b the gradients of hidden states, weight and bias."""
        if self.d_hidden[0] is not None:
            d_hidden, offset = dz @ self.weight, 0
            for stream, first, last in group.slices:
                low, high = max(a, offset), min(b, offset + last - first)
                if low < high:
                    part = d_hidden[low - a : high - a]
                    self.d_hidden[stream][first + low - offset : first + high - offset] = part
                offset += last - first
        self.logits.keep(hidden[a:b])
        if self.d_bias is not None:
            self.d_bias.add_(dz.sum(0, dtype=torch.float32))

    def terms(self) -> dict[str, Tensor]:
        """Sums over all groups."""
        plan, sums = self.plan, self.sums
        streams = STREAMS[: len(self.streams)]
        names = [f"{kind}_{stream}" for stream in streams for kind in ("ce", "correct")]
        if plan.is_pooled:
            names += ESTIMATORS[self.call.mi.estimator].terms
        if plan.teacher is not None:
            names += [f"kd_{stream}" for stream in STREAMS if getattr(plan.teacher, stream) is not None]
        # without a group of rows there is no sum
        terms = {name: sums.terms.get(name, self.zero.clone()) for name in names}
        if plan.estimator == NORMALIZED:
            # the number of questions stays on the device
            bounds = [
                barber_agakov(target, self.zero, sums.questions)
                for target in sums.targets
                if isinstance(target, Tensor)
            ]
            terms["mi_bound"] = sum(bounds, self.zero) / len(plan.directions) - terms["mi"]
        # a clone, because the results of a custom op can't share memory
        return terms | ({"mi_questions": sums.questions.clone()} if plan.is_pooled else {})

    def gradients(self) -> list[Tensor | None]:
        """The gradients in the order and the dtype of the inputs; None where none is needed."""
        d_weight = None if self.weight is None else self.logits.weight_gradient()
        parts = [*[*self.d_hidden, None][:2], d_weight, self.d_bias]
        return [None if g is None else g.to(self.dtype) for g in parts]
