"""The head loss in plain torch with bounded memory: the CPU's path, and any device's without Triton.

It computes the gradients during the forward pass, because that's when the logits are there. It
walks over groups of whole questions, as many as fit `chunk_bytes`, both streams of a question
together: the pooled mutual-information terms of a question depend on its own rows only. For a group:

1. log p = log_softmax(h W^T + b), in one buffer, in place; cross entropies; pool over positions;
2. the estimator on the pooled [questions, V]: w = dL / d log(pooled);
3. dL/dz in place of log p. A max passes w[v] to the first position t whose log p[t, v] is the maximum,
   and with s[t] = sum of the w[v] that t won

       dL/dz[t, v] = p[t, v] (c - s[t]) + [t won v] w[v] - c [v = y_t],

   c being the weight of the stream's cross entropy. A mean passes r[t, v] = w[v] p[t, v] / sum_t p[t, v]
   to every position, and s[t] = sum_v r[t, v] takes its place above, r that of the winner's w;
4. dh = dz W, dW += dz^T h, db += sum dz.

So each logit is computed once, by three products in all (eager autograd's number). A question whose
rows don't fit is walked in chunks of rows twice, steps 1 and 3, and its logits are computed twice.
The alternative, pooling all questions in a first walk and recomputing all logits in a second, costs a
third more products for every batch; storing log p for all rows is what this file exists to avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ibdistill.ops.cpu.cache_blocks import cached_rows, exp_times_
from ibdistill.ops.cpu.huge_pages import empty_in_huge_pages
from ibdistill.ops.head_loss.arguments import STREAMS, Call
from ibdistill.ops.head_loss.packing import Rows, groups, pack
from ibdistill.ops.head_loss.torch_pooling import Pooler
from ibdistill.ops.head_loss.torch_teacher import Distiller
from ibdistill.ops.linear import ChunkedLinear, log_softmax_


class _GivenLogits:
    """In the place of a head where the streams hold logits [N, V]: rows are copied, not multiplied."""

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
    rows = pack(call.predict, call.explain)
    streams = [s.hidden.detach() for s in (call.predict, call.explain) if s is not None]
    if weight is None:
        head = _GivenLogits(call, rows, any(needs))
    else:
        head = ChunkedLinear(
            torch.cat(streams)[rows.order], weight, bias, (needs[0] or needs[1], needs[2], needs[3])
        )
    dtype, vocabulary = head.accumulator, (streams[0].shape[1] if weight is None else weight.shape[0])
    scale = torch.full_like(rows.labels, call.weights.ce_predict, dtype=dtype)
    scale.masked_fill_(rows.is_explain, call.weights.ce_explain)
    cross_entropy, correct = torch.empty_like(scale), torch.empty_like(scale)
    distiller = None if call.teacher is None else Distiller(call, rows, vocabulary, dtype)
    buffers = 1 if distiller is None else 2
    size = max(1, call.chunk_bytes // (vocabulary * dtype.itemsize * buffers))
    buffer = empty_in_huge_pages((max(1, min(size, len(rows.order))), vocabulary), streams[0], dtype)
    block = cached_rows(buffer)
    pooler, paired = None, call.mi is not None and call.mi.pair == "teacher"
    if call.mi is not None:
        pooler = Pooler(call, rows, buffer, differentiate=any(needs) and call.weights.mi != 0)
    for start, stop, first, last in groups(rows, size, pooler is not None):
        chunks = [(a, min(a + size, stop)) for a in range(start, stop, size)]
        if pooler is not None:
            pooler.start(first, last)
        for a, b in chunks:
            z = head.forward(a, b, buffer)
            for row in range(a, b, block):
                end = min(row + block, b)
                log_p = log_softmax_(z[row - a : end - a])
                label_log_p = log_p.gather(1, rows.labels[row:end, None])[:, 0]
                cross_entropy[row:end] = -label_log_p
                correct[row:end] = label_log_p == log_p.amax(-1)
                if pooler is not None:
                    pooler.pool(log_p, row, end, ("predict",) if paired else STREAMS)
            if paired:
                pooler.pool(distiller.log_probabilities(a, b), a, b, ("explain",))
            log_p = z
        if pooler is not None:
            pooler.estimate()
        for a, b in chunks if any(needs) or distiller is not None else ():
            if len(chunks) > 1:
                log_p = log_softmax_(head.forward(a, b, buffer))
            if distiller is not None:
                d_distil = distiller.distil(log_p, a, b)
            if not any(needs):
                continue
            if pooler is not None and pooler.gradients:
                dz = pooler.logits_gradient(log_p, a, b, scale[a:b])
            else:
                dz = exp_times_(log_p, scale[a:b])
            if distiller is not None:
                dz.add_(d_distil)
            dz[torch.arange(b - a, device=dz.device), rows.labels[a:b]] -= scale[a:b]
            head.add_gradients(dz, a, b)
    terms = {
        "ce_predict": cross_entropy[~rows.is_explain].sum(),
        "correct_predict": correct[~rows.is_explain].sum(),
    }
    if call.explain is not None:
        terms |= {"ce_explain": cross_entropy[rows.is_explain].sum()}
        terms |= {"correct_explain": correct[rows.is_explain].sum()}
    if pooler is not None:
        terms |= pooler.terms()
    if distiller is not None:
        terms |= distiller.terms()
    factors = vars(call.weights)
    total = sum(factors[name] * terms[name] for name in factors if name in terms)
    if weight is None:
        return total, terms, [*head.gradients, None, None, None][:4]
    return total, terms, _finish_gradients(call, rows, head, needs)


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
