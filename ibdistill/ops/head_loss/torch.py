"""The head loss in plain torch with bounded memory, for CPUs and for any device without Triton.

It computes the gradients during the forward pass, because the logits exist only then. It walks over groups of
whole questions, as many as fit `chunk_bytes`, with both streams of a question together, because the pooled
mutual-information terms of a question depend on its own rows only. For a group:

1. log p = log_softmax(h W^T + b), in one buffer, in place; cross entropies; pool over positions;
2. the estimator on the pooled [questions, V]: w = dL / d log(pooled);
3. dL/dz in place of log p. A max passes w[v] to the first position t whose log p[t, v] is the maximum,
   and with s[t] = sum of the w[v] that t won

       dL/dz[t, v] = p[t, v] (c - s[t]) + [t won v] w[v] - c [v = y_t],

   where c is the weight of the stream's cross entropy. A mean passes r[t, v] = w[v] p[t, v] / sum_t p[t, v]
   to every position. In the formula r[t, v] then replaces [t won v] w[v], and s[t] is sum_v r[t, v];
4. dh = dz W, dW += dz^T h, db += sum dz.

So each logit is computed once, and there are three products in all, as many as with eager autograd. A
question whose rows do not fit is walked in chunks of rows twice, in steps 1 and 3, and its logits are
computed twice. One alternative is to pool all questions in a first walk and to recompute all logits in a
second, which costs a third more products for every batch. The other, storing log p for all rows, is what this
file exists to avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ibdistill.ops.cpu.cache_blocks import cached_rows, exp_times_
from ibdistill.ops.cpu.huge_pages import empty_in_huge_pages
from ibdistill.ops.head_loss.arguments import STREAMS, Call
from ibdistill.ops.head_loss.packing import Rows, groups, pack
from ibdistill.ops.head_loss.softcap import cap_
from ibdistill.ops.head_loss.torch_pooling import Pooler
from ibdistill.ops.head_loss.torch_teacher import TorchDistiller
from ibdistill.ops.linear import ChunkedLinear, log_softmax_


class _GivenLogits:
    """Takes the place of a head where the streams hold logits [N, V]: rows are copied, not multiplied."""

    def __init__(self, call: Call, rows: Rows, need: bool):
        self.streams = [s.hidden.detach() for s in (call.predict, call.explain) if s is not None]
        self.order, self.is_explain = rows.order, rows.is_explain
        example = self.streams[0]
        self.accumulator = torch.float64 if example.dtype == torch.float64 else torch.float32
        self.gradients = [torch.zeros_like(s) if need else None for s in self.streams]

    def _rows(self, a: int, b: int):
        first = 0
        for i, stream in enumerate(self.streams):
            here = (self.is_explain[a:b] == bool(i)).nonzero()[:, 0]
            yield i, stream, here, self.order[a:b][here] - first
            first += stream.shape[0]

    def forward(self, a: int, b: int, out: Tensor) -> Tensor:
        """Copy the logits of the rows a to b into the first rows of `out`."""
        for _, stream, here, there in self._rows(a, b):
            out[here] = stream[there].to(out.dtype)
        return out[: b - a]

    def add_gradients(self, dz: Tensor, a: int, b: int) -> None:
        """Keep the gradient of the rows a to b."""
        for i, _, here, there in self._rows(a, b):
            self.gradients[i][there] = dz[here].to(self.gradients[i].dtype)


def compute(
    call: Call, weight: Tensor | None, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """Total, terms, and the gradients of predict's hidden states, explain's, weight and bias.

    Without a weight the hidden states are logits.
    """
    walk = _Walk(call, weight, bias, needs)
    for group in groups(walk.rows, walk.size, walk.pooler is not None):
        walk.group(*group)
    terms = walk.terms()
    factors = vars(call.weights)
    total = sum(factors[name] * terms[name] for name in factors if name in terms)
    if weight is None:
        return total, terms, [*walk.head.gradients, None, None, None][:4]
    return total, terms, _finish_gradients(call, walk.rows, walk.head, needs)


class _Walk:
    """The walk over the rows of one call, one group of whole questions after another."""

    def __init__(self, call: Call, weight: Tensor | None, bias: Tensor | None, needs: list[bool]):
        self.call, self.differentiate = call, any(needs)
        self.rows = rows = pack(call.predict, call.explain)
        streams = [s.hidden.detach() for s in (call.predict, call.explain) if s is not None]
        if weight is None:
            self.head, vocabulary = _GivenLogits(call, rows, self.differentiate), streams[0].shape[1]
        else:
            needed = (needs[0] or needs[1], needs[2], needs[3])
            self.head = ChunkedLinear(torch.cat(streams)[rows.order], weight, bias, needed)
            vocabulary = weight.shape[0]
        dtype = self.head.accumulator
        self.scale = torch.full_like(rows.labels, call.weights.ce_predict, dtype=dtype)
        self.scale.masked_fill_(rows.is_explain, call.weights.ce_explain)
        self.cross_entropy, self.correct = torch.empty_like(self.scale), torch.empty_like(self.scale)
        self.distiller = None if call.teacher is None else TorchDistiller(call, rows, vocabulary, dtype)
        # the distiller has a buffer as large as the one of log p, and so have the slopes of capped logits
        has_slopes = call.softcap is not None and self.differentiate
        buffers = 1 + (self.distiller is not None) + has_slopes
        self.size = max(1, call.chunk_bytes // (vocabulary * dtype.itemsize * buffers))
        shape = (max(1, min(self.size, len(rows.order))), vocabulary)
        self.buffer = empty_in_huge_pages(shape, streams[0], dtype)
        self.slopes = empty_in_huge_pages(shape, streams[0], dtype) if has_slopes else None
        self.pooler, self.paired = None, call.mi is not None and call.mi.pair == "teacher"
        if call.mi is not None:
            # a term of weight 0 is reported all the same, but needs no gradient
            passes = self.differentiate and call.weights.mi != 0
            self.pooler = Pooler(call, rows, self.buffer, differentiate=passes)

    def group(self, start: int, stop: int, first: int, last: int) -> None:
        """Do all work on the rows start to stop, the questions first to last if something is pooled."""
        # one chunk, unless a single question is larger than the buffer
        chunks = [(a, min(a + self.size, stop)) for a in range(start, stop, self.size)]
        if self.pooler is not None:
            self.pooler.start(first, last)
        for a, b in chunks:
            log_p = self._forward(a, b)
        # only now, because a pooled distribution needs all positions of its question
        if self.pooler is not None:
            self.pooler.estimate()
        if not self.differentiate and self.distiller is None:
            return
        for a, b in chunks:
            # the buffer holds the last chunk only; where it is the only one, log p still stands there
            if len(chunks) > 1:
                log_p = log_softmax_(self._logits(a, b))
            self._backward(log_p, a, b)

    def _logits(self, a: int, b: int) -> Tensor:
        """The logits of the rows a to b in the buffer and, if they are capped, their slopes in theirs."""
        slopes = None if self.slopes is None else self.slopes[: b - a]
        return cap_(self.head.forward(a, b, self.buffer), self.call.softcap, slopes)

    def _forward(self, a: int, b: int) -> Tensor:
        """Compute log p [b - a, V] of the rows a to b, their cross entropies and their part of the pools."""
        z = self._logits(a, b)
        # five operations read each block, which stays in a CPU's cache between them
        block = cached_rows(self.buffer)
        for row in range(a, b, block):
            end = min(row + block, b)
            log_p = log_softmax_(z[row - a : end - a])
            label_log_p = log_p.gather(1, self.rows.labels[row:end, None])[:, 0]
            self.cross_entropy[row:end] = -label_log_p
            self.correct[row:end] = label_log_p == log_p.amax(-1)
            if self.pooler is not None:
                self.pooler.pool(log_p, row, end, ("predict",) if self.paired else STREAMS)
        if self.paired:
            # the teacher's explain stream stands in for the student's
            self.pooler.pool(self.distiller.log_probabilities(a, b), a, b, ("explain",))
        return z

    def _backward(self, log_p: Tensor, a: int, b: int) -> None:
        """Distil the rows a to b, and put dL/dz, from which all gradients follow, in the place of log p."""
        # first, because it reads log p, which the next step overwrites
        d_distil, scale, labels = None, self.scale[a:b], self.rows.labels[a:b]
        if self.distiller is not None and self.call.teacher.is_sampled:
            # a gradient of log p at the label, as the cross entropy's is
            scale = scale - self.distiller.estimate(-self.cross_entropy[a:b], labels, a, b)
        elif self.distiller is not None:
            d_distil = self.distiller.distil(log_p, a, b)
        if not self.differentiate:
            return
        if self.pooler is not None and self.pooler.gradients:
            dz = self.pooler.logits_gradient(log_p, a, b, scale)
        else:
            dz = exp_times_(log_p, scale)
        if d_distil is not None:
            dz.add_(d_distil)
        # the cross entropy's gradient is c (p - 1) at the label, c p elsewhere; c p is there already
        dz[torch.arange(b - a, device=dz.device), labels] -= scale
        if self.slopes is not None:
            dz.mul_(self.slopes[: b - a])
        self.head.add_gradients(dz, a, b)

    def terms(self) -> dict[str, Tensor]:
        """The sums over all rows and questions, 0-d."""
        is_explain, terms = self.rows.is_explain, {}
        for name, mine in (("predict", ~is_explain), ("explain", is_explain)):
            if getattr(self.call, name) is not None:
                terms[f"ce_{name}"] = self.cross_entropy[mine].sum()
                terms[f"correct_{name}"] = self.correct[mine].sum()
        if self.pooler is not None:
            terms |= self.pooler.terms()
        if self.distiller is not None:
            terms |= self.distiller.terms()
        return terms


def _finish_gradients(call: Call, rows: Rows, head: ChunkedLinear, needs: list[bool]) -> list[Tensor | None]:
    """Gradients in the inputs' order, shapes and dtypes. Ignored rows get zeros."""
    d_hidden = head.d_hidden
    gradients: list[Tensor | None] = [None, None, head.weight_gradient(), head.d_bias]
    dtype = call.predict.hidden.dtype
    if d_hidden is not None:
        split = [call.predict.hidden.shape[0], 0 if call.explain is None else call.explain.hidden.shape[0]]
        for i, mine in enumerate((~rows.is_explain, rows.is_explain)):
            if needs[i]:
                # tensors of their own: the results of a custom op can't share memory
                gradients[i] = d_hidden.new_zeros(split[i], d_hidden.shape[1])
                gradients[i][rows.order[mine] - i * split[0]] = d_hidden[mine]
    return [None if g is None else g.to(dtype) for g in gradients]
