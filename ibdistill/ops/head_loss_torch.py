"""The head loss in plain torch with bounded memory: the CPU's path, and any device's without Triton.

It computes the gradients during the forward pass, because that's when the
logits are there. It walks over groups of whole questions, as many as fit `chunk_bytes`, both streams
of a question together: the pooled mutual-information terms of a question depend on its own rows
only. For a group:

1. log p = log_softmax(h W^T + b), in one buffer, in place; cross entropies; pool over positions, and
   for the max the position that won each vocabulary entry;
2. the estimator on the pooled [questions, V], by autograd: w = dL / d log(pooled);
3. dL/dz in place of log p. A max passes w[v] to the position t that won v, and with
   s[t] = sum of the w[v] that t won

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

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ibdistill.ops.arguments import IGNORED, SMALLEST_PROBABILITY, Call
from ibdistill.ops.divergences import DIVERGENCES
from ibdistill.ops.estimators import ESTIMATORS, barber_agakov, pool_states
from ibdistill.ops.linear import ChunkedLinear

STREAMS = ("predict", "explain")

BLOCK_ROWS = 16
"""Rows that the mean pool and distillation work on at once: temporaries small beside the chunk."""


class _Rows(NamedTuple):
    """The rows of both streams that are not ignored, those of a question side by side: predict, explain."""

    order: Tensor
    """[M] row of the concatenated streams."""
    labels: Tensor
    """[M]"""
    is_explain: Tensor
    """[M] bool"""
    bounds: list[tuple[int, int, int]]
    """Per question: first row of predict, first of explain, one past its last."""


def pack(call: Call) -> _Rows:
    """Drop ignored rows and bring those of a question together. Waits for the device."""
    streams = [s for s in (call.predict, call.explain) if s is not None]
    questions = call.predict.cu.shape[0] - 1
    orders, labels, owners, is_explain, offset = [], [], [], [], 0
    for i, (hidden, stream_labels, cu) in enumerate(streams):
        kept = (stream_labels != IGNORED).nonzero()[:, 0]
        lengths = cu.to(stream_labels.device).diff()
        owner = torch.repeat_interleave(
            torch.arange(questions, device=kept.device), lengths, output_size=hidden.shape[0]
        )
        orders.append(kept + offset)
        labels.append(stream_labels[kept])
        owners.append(owner[kept])
        is_explain.append(torch.full_like(kept, i, dtype=torch.bool))
        offset += hidden.shape[0]
    counts = [torch.bincount(owner, minlength=questions).tolist() for owner in owners]
    # stable: predict before explain, positions in order
    by_question = torch.cat(owners).argsort(stable=True)
    bounds, start = [], 0
    for b in range(questions):
        middle = start + counts[0][b]
        stop = middle + (counts[1][b] if len(counts) > 1 else 0)
        bounds.append((start, middle, stop))
        start = stop
    return _Rows(
        torch.cat(orders)[by_question],
        torch.cat(labels)[by_question],
        torch.cat(is_explain)[by_question],
        bounds,
    )


def _groups(rows: _Rows, size: int, whole_questions: bool) -> Iterator[tuple[int, int, int, int]]:
    """Groups of at most `size` rows, or one larger question: (rows from, to, questions from, to)."""
    total = rows.order.shape[0]
    if not whole_questions:
        for start in range(0, total, size):
            yield start, min(start + size, total), 0, 0
        return
    first = 0
    for b in range(len(rows.bounds)):
        last = b + 1 == len(rows.bounds)
        if last or rows.bounds[b + 1][2] - rows.bounds[first][0] > size:
            yield rows.bounds[first][0], rows.bounds[b][2], first, b + 1
            first = b + 1


class _GivenLogits:
    """In the place of a head where the streams hold logits [N, V]: rows are copied, not multiplied."""

    def __init__(self, call: Call, rows: _Rows, need: bool):
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
    rows = pack(call)
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
    distiller = None if call.teacher is None else _Distiller(call, rows, vocabulary, dtype)
    buffers = 1 if distiller is None else 2
    size = max(1, call.chunk_bytes // (vocabulary * dtype.itemsize * buffers))
    buffer = streams[0].new_empty(max(1, min(size, len(rows.order))), vocabulary, dtype=dtype)
    pooler, paired = None, call.mi is not None and call.mi.pair == "teacher"
    if call.mi is not None and ESTIMATORS[call.mi.estimator].space == "distribution":
        pooler = _Pooler(call, rows, buffer, differentiate=any(needs) and call.weights.mi != 0)
    for start, stop, first, last in _groups(rows, size, pooler is not None):
        chunks = [(a, min(a + size, stop)) for a in range(start, stop, size)]
        if pooler is not None:
            pooler.start(first, last)
        for a, b in chunks:
            log_p = log_probabilities(head, a, b, buffer)
            label_log_p = log_p.gather(1, rows.labels[a:b, None])[:, 0]
            cross_entropy[a:b] = -label_log_p
            correct[a:b] = label_log_p == log_p.amax(-1)
            if paired:
                pooler.pool(log_p, a, b, ("predict",))
                pooler.pool(distiller.log_probabilities(a, b), a, b, ("explain",))
            elif pooler is not None:
                pooler.pool(log_p, a, b)
        if pooler is not None:
            pooler.estimate()
        for a, b in chunks if any(needs) or distiller is not None else ():
            if len(chunks) > 1:
                log_p = log_probabilities(head, a, b, buffer)
            if distiller is not None:
                d_distil = distiller.distil(log_p, a, b)
            if not any(needs):
                continue
            if pooler is not None and pooler.gradients:
                dz = pooler.logits_gradient(log_p, a, b, scale[a:b])
            else:
                dz = log_p.exp_().mul_(scale[a:b, None])
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
    elif call.mi is not None:
        terms |= state_terms(call, rows, head.hidden, head.d_hidden)
    if distiller is not None:
        terms |= distiller.terms()
    factors = vars(call.weights)
    total = sum(factors[name] * terms[name] for name in factors if name in terms)
    if weight is None:
        return total, terms, [*head.gradients, None, None, None][:4]
    return total, terms, _finish_gradients(call, rows, head, needs)


def log_probabilities(head: ChunkedLinear | _GivenLogits, a: int, b: int, out: Tensor) -> Tensor:
    """log_softmax of the logits of the rows a to b, in the first rows of `out`."""
    out = head.forward(a, b, out)
    # in place: each row is read whole before any of it is written
    return torch.log_softmax(out, -1, out=out)


def state_terms(call: Call, rows: _Rows, hidden: Tensor, d_hidden: Tensor | None) -> dict[str, Tensor]:
    """Terms of an estimator on pooled hidden states; adds its gradient to d_hidden. No logits in it."""
    questions = [(p, e, end) for p, e, end in rows.bounds if p < e < end]
    directions = call.mi.directions
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    states = hidden.to(dtype, copy=True).requires_grad_(d_hidden is not None)
    terms: dict[str, Tensor] = {}
    with torch.enable_grad():
        pooled = {"predict": [], "explain": []}
        for p, e, end in questions:
            pooled["predict"].append(pool_states(states[p:e], call.mi.pool))
            pooled["explain"].append(pool_states(states[e:end], call.mi.pool))
        stacked = {n: torch.stack(v) if v else states[:0] for n, v in pooled.items()}
        for target, estimate in directions:
            values = ESTIMATORS[call.mi.estimator].function(
                stacked[target].detach(), stacked[estimate], temperature=call.mi.temperature, group=call.group
            )
            for name, value in values.items():
                terms[name] = terms.get(name, 0) + value.sum() / len(directions)
        if d_hidden is not None:
            # also with no question of our own: the other ranks wait for our part of the collective
            d_hidden.add_(torch.autograd.grad(terms["mi"] * call.weights.mi, states)[0])
    terms = {name: term.detach() for name, term in terms.items()}
    return terms | {"mi_questions": terms["mi"].new_tensor(float(len(questions)))}


def _finish_gradients(call: Call, rows: _Rows, head: ChunkedLinear, needs: list[bool]) -> list[Tensor | None]:
    """Gradients in the inputs' order, shapes and dtypes. Ignored rows get zeros."""
    d_hidden = head.d_hidden
    gradients: list[Tensor | None] = [None, None, head.d_weight, head.d_bias]
    dtype = call.predict.hidden.dtype
    if d_hidden is not None:
        split = [call.predict.hidden.shape[0], 0 if call.explain is None else call.explain.hidden.shape[0]]
        unpacked = d_hidden.new_zeros(sum(split), d_hidden.shape[1])
        unpacked[rows.order] = d_hidden
        for i, part in enumerate(unpacked.split(split)):
            gradients[i] = part if needs[i] else None
    return [None if g is None else g.to(dtype) for g in gradients]


class _Pooler:
    """The mutual-information term of one group of questions after another, on pooled distributions.

    Call `start`, then `pool` for each chunk of the group's rows, then `estimate`, then
    `logits_gradient` for each chunk.
    """

    def __init__(self, call: Call, rows: _Rows, buffer: Tensor, differentiate: bool):
        self.call, self.rows, self.differentiate = call, rows, differentiate
        self.estimator = ESTIMATORS[call.mi.estimator].function
        self.directions = call.mi.directions
        self.is_max = call.mi.pool == "max"
        self.columns = torch.arange(buffer.shape[1], device=buffer.device)
        self.new_zeros = lambda *shape: buffer.new_zeros(shape)
        self.count = 0
        self.sums: dict[str, Tensor] = {"mi": self.new_zeros()}
        self.target_sums = [0 for _ in self.directions]
        self.gradients: dict[str, Tensor] = {}

    def start(self, first: int, last: int) -> None:
        """Begin with the questions first to last - 1 that have rows in both streams."""
        self.spans = [
            {"predict": (p, e), "explain": (e, end)}
            for p, e, end in self.rows.bounds[first:last]
            if p < e < end
        ]
        shape = (len(self.spans), len(self.columns))
        self.pooled = {n: self.new_zeros(*shape).fill_(-torch.inf) for n in ("predict", "explain")}
        self.winners = (
            {n: self.columns.new_zeros(shape) for n in ("predict", "explain")} if self.is_max else {}
        )
        self.gradients = {}

    def _segments(self, a: int, b: int, names) -> Iterator[tuple[int, str, int, int]]:
        """The parts of the questions' sequences in the rows a to b: (question, stream, from, to)."""
        for i, span in enumerate(self.spans):
            for name in names:
                start, stop = span[name]
                if max(start, a) < min(stop, b):
                    yield i, name, max(start, a), min(stop, b)

    def pool(self, log_p: Tensor, a: int, b: int, names: tuple[str, ...] = STREAMS) -> None:
        """Pool the log probabilities [b - a, V] of the rows a to b of these streams."""
        for i, name, start, stop in self._segments(a, b, names):
            pooled, part = self.pooled[name][i], log_p[start - a : stop - a]
            if not self.is_max:
                for block in part.split(BLOCK_ROWS):
                    torch.logaddexp(pooled, torch.logsumexp(block, 0), out=pooled)
                continue
            best, winner = part.max(0)
            # a later part wins only where it is larger: ties go to the first position
            better = best > pooled
            self.winners[name][i] = torch.where(better, winner + start, self.winners[name][i])
            pooled.copy_(torch.where(better, best, pooled))

    def estimate(self) -> None:
        """Add the group's terms and, where somebody needs it, get dL / d log(pooled)."""
        if not self.is_max:
            for name, pooled in self.pooled.items():
                lengths = [float(stop - start) for start, stop in (span[name] for span in self.spans)]
                pooled.sub_(pooled.new_tensor(lengths).log_()[:, None])
        self.count += len(self.spans)
        for d, (target, estimate) in enumerate(self.directions):
            leaf = self.pooled[estimate].detach().requires_grad_(self.differentiate)
            with torch.enable_grad():
                values = self.estimator(
                    self.pooled[target], leaf, temperature=self.call.mi.temperature, group=self.call.group
                )
                if self.differentiate:
                    loss = values["mi"].sum() * (self.call.weights.mi / len(self.directions))
                    self.gradients[estimate] = torch.autograd.grad(loss, leaf)[0]
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0) + value.detach().sum() / len(self.directions)
            if self.call.mi.estimator == "normalized":
                self.target_sums[d] += torch.softmax(self.pooled[target], -1).sum(0)

    def _receivers(self) -> list[str]:
        """Streams that get a gradient, in the order of the rows."""
        return [name for name in STREAMS if name in self.gradients]

    def logits_gradient(self, log_p: Tensor, a: int, b: int, scale: Tensor) -> Tensor:
        """Overwrite log probabilities with p (scale - s) + what the pool passes to each position."""
        if self.is_max:
            return self._max_gradient(log_p, a, b, scale)
        done = a
        for i, name, start, stop in self._segments(a, b, self._receivers()):
            log_p[done - a : start - a].exp_().mul_(scale[done - a : start - a, None])
            length = self.spans[i][name][1] - self.spans[i][name][0]
            log_sum = self.pooled[name][i] + math.log(length)
            for row in range(start - a, stop - a, BLOCK_ROWS):
                block = log_p[row : min(row + BLOCK_ROWS, stop - a)]
                share = (block - log_sum).exp_().mul_(self.gradients[name][i])
                factor = scale[row : row + len(block)] - share.sum(-1)
                block.exp_().mul_(factor[:, None]).add_(share)
            done = stop
        log_p[done - a :].exp_().mul_(scale[done - a :, None])
        return log_p

    def _max_gradient(self, log_p: Tensor, a: int, b: int, scale: Tensor) -> Tensor:
        won, passed = [], []
        sums = torch.zeros_like(scale)
        for i, name, start, stop in self._segments(a, b, self._receivers()):
            winner, gradient = self.winners[name][i] - a, self.gradients[name][i]
            if (start, stop) != self.spans[i][name]:
                inside = (winner >= start - a) & (winner < stop - a)
                winner, gradient = winner.where(inside, start - a), gradient.where(inside, 0)
            sums.index_add_(0, winner, gradient)
            won.append(winner * len(self.columns) + self.columns)
            passed.append(gradient)
        dz = log_p.exp_().mul_((scale - sums)[:, None])
        for places, gradient in zip(won, passed, strict=True):
            # each (position, entry) occurs once: a vocabulary entry has one winner
            dz.view(-1).index_add_(0, places, gradient)
        return dz

    def terms(self) -> dict[str, Tensor]:
        """Sums over all groups' questions."""
        if not self.count:
            # an estimator of no question still names its terms
            self.start(0, 0)
            self.estimate()
        terms = dict(self.sums)
        if self.call.mi.estimator == "normalized":
            bounds = [barber_agakov(s, 0, self.count) for s in self.target_sums if self.count]
            terms["mi_bound"] = sum(bounds, self.new_zeros()) / len(self.directions) - terms["mi"]
        return terms | {"mi_questions": self.new_zeros().add_(self.count)}


class _Distiller:
    """Divergences from the teacher, chunk by chunk, and their gradients in a buffer of the chunk's size."""

    def __init__(self, call: Call, rows: _Rows, vocabulary: int, dtype: torch.dtype):
        self.vocabulary = vocabulary
        self.teacher, self.is_explain = call.teacher, rows.is_explain
        self.losses = torch.zeros(len(rows.labels), dtype=dtype, device=rows.labels.device)
        self.buffer = self.losses.new_empty(0)
        self.has = {"predict": call.teacher.predict is not None, "explain": call.teacher.explain is not None}
        on = [self.has["predict"], self.has["explain"]]
        self.taught = torch.where(self.is_explain, on[1], on[0])
        self.factor = torch.full_like(self.losses, call.weights.kd_predict)
        self.factor.masked_fill_(self.is_explain, call.weights.kd_explain).mul_(call.teacher.temperature)
        self.hidden, self.ids, self.probabilities = (self._pack(call, rows, i) for i in range(3))
        if self.hidden is not None:
            self.head = ChunkedLinear(self.hidden, call.teacher.weight.detach(), call.teacher.bias)

    def _pack(self, call: Call, rows: _Rows, field: int) -> Tensor | None:
        """One field of the teacher's streams in the order of the rows; zeros where it has nothing to say."""
        fields = [(call.teacher.predict, call.predict), (call.teacher.explain, call.explain)]
        example = next((signal[field] for signal, _ in fields if signal is not None), None)
        if example is None:
            return None
        parts = [
            example.new_zeros(stream.hidden.shape[0], example.shape[1]) if signal is None else signal[field]
            for signal, stream in fields
            if stream is not None
        ]
        return torch.cat(parts).detach()[rows.order]

    def log_probabilities(self, a: int, b: int) -> Tensor:
        """The teacher's at temperature 1 for the rows a to b, [b - a, V]; a top k's tail in equal shares."""
        out = self._buffer(b - a)
        if self.hidden is not None:
            return log_probabilities(self.head, a, b, out)
        ids, q = self.ids[a:b], self.probabilities[a:b].to(out.dtype)
        tail = (1 - q.sum(-1, keepdim=True)).clamp_min_(SMALLEST_PROBABILITY) / max(
            out.shape[1] - ids.shape[1], 1
        )
        return out.copy_(tail).scatter_(1, ids, q).clamp_min_(torch.finfo(out.dtype).tiny).log_()

    def _buffer(self, rows: int) -> Tensor:
        if len(self.buffer) < rows:
            self.buffer = self.buffer.new_empty(rows, self.vocabulary)
        return self.buffer[:rows]

    def distil(self, log_p: Tensor, a: int, b: int) -> Tensor:
        """Losses of the rows a to b from their log probabilities; their gradients for the logits."""
        out = self._buffer(b - a)
        if self.hidden is not None:
            self.head.forward(a, b, out)
        temperature = self.teacher.temperature
        for row in range(0, b - a, BLOCK_ROWS):
            block = slice(row, min(row + BLOCK_ROWS, b - a))
            mine = slice(a + block.start, a + block.stop)
            student = torch.log_softmax(log_p[block] / temperature, -1)
            if self.hidden is not None:
                log_q = torch.log_softmax(out[block] / temperature, -1)
                losses, gradient = DIVERGENCES[self.teacher.divergence](log_q, student, self.teacher.beta)
            else:
                losses, gradient = self._top_k(student, mine)
            taught = self.taught[mine]
            self.losses[mine] = torch.where(taught, losses * temperature**2, 0)
            out[block] = gradient.mul_(self.factor[mine, None]).masked_fill_(~taught[:, None], 0)
        return out

    def _top_k(self, student: Tensor, mine: slice) -> tuple[Tensor, Tensor]:
        """Losses and gradients between the k + 1 buckets. Overwrites the log probabilities `student`."""
        ids, q = self.ids[mine], self.probabilities[mine].to(student.dtype)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).clamp_min(SMALLEST_PROBABILITY)
        top = student.gather(1, ids)
        rest = student.scatter_(1, ids, -torch.inf).exp_()
        mass = rest.sum(-1, keepdim=True)
        # k = V leaves no tail: its logarithm must still be a number
        log_p = torch.cat([top, mass.clamp_min(torch.finfo(mass.dtype).tiny).log()], -1)
        losses, gradient = DIVERGENCES[self.teacher.divergence](q.log(), log_p, self.teacher.beta)
        # a bucket's gradient is shared among its tokens in proportion to their probabilities
        rest.mul_(torch.where(mass > 0, gradient[:, -1:] / mass, 0))
        return losses, rest.scatter_(1, ids, gradient[:, :-1])

    def terms(self) -> dict[str, Tensor]:
        """Sums over the rows of each stream that the teacher has."""
        mine = {"predict": ~self.is_explain, "explain": self.is_explain}
        return {f"kd_{name}": self.losses[mine[name]].sum() for name, has in self.has.items() if has}
