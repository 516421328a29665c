"""Distillation from a teacher of another vocabulary, over spans of the text whose ends both tokenizers share.

A span is the student's tokens s_1..s_m and the teacher's tokens t_1..t_n of the same text. Both models have
read what stands before it, so the distributions p of the student and q of the teacher at its *first* position
are about the same thing: the text that comes next. They are compared over these events, which exclude each
other:

    w     for each of the K tokens w that both vocabularies have: the next token is w
    rest  the next token is any other
    span  the span's tokens come next, with the probability p(s_1) p(s_2 | s_1) ... or q(t_1) q(t_2 | t_1) ...

The probability of `span` is taken out of the event that the side's first token belongs to, so the events of
each side still add up to 1. Where some w is the text of the whole span, `span` and w are one event, as they
are the same text. The loss is

    T^2 sum over spans of D(q over the events, p over the events)

for any D of `divergences`, with the temperature T on the logits of all positions of the span. Its gradient
reaches the student's states at all positions of a span, those of s_2..s_m through their part of the product;
q is a constant. With the same tokenizer on both sides all spans are single tokens and all tokens are shared,
so this is the distillation of `head_loss`. A bucket that may be empty (rest, span, what is left of a first
token) has at least the probability `SMALLEST_PROBABILITY` on both sides.

Sources: merging at the points where both tokenizers split, and comparing the shared part of the vocabularies,
are from GOLD (`GOLDTrainer` of Hugging Face's TRL). GOLD multiplies the *whole* distribution at the first
position by p(s_2 | s_1)..., which is no distribution any more, and compares the tokens that are not shared by
sorted probability (ULD, Boizard et al., TMLR 2025, arXiv 2402.12030). Here these tokens are one event.
That a span's likelihood is compared as one event is from ALM (Minixhofer et al., NeurIPS 2025, arXiv
2503.20083), which compares nothing else.

Spans are walked over in chunks, so [N, V] logits never exist at once. The student's logits are computed anew,
beside those of the cross entropy. There is no Triton form: on a GPU this is torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss import api
from ibdistill.ops.head_loss.arguments import SMALLEST_PROBABILITY, Stream, TeacherDistributions, Weights
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.softcap import capped
from ibdistill.ops.linear import ChunkedLinear

CHUNK_BYTES = {"cpu": 20 << 20, "gpu": 64 << 20}
"""Bound of a chunk's logits, student's and teacher's together; automatic differentiation holds about eight
tensors of their size. Not measured on a GPU."""

OWN = -1
"""The bucket of a span whose text is no shared token."""

_NEVER = -1e4  # a logarithm whose exponential is 0 in every dtype, and no infinity, whose gradient is none


class Side(NamedTuple):
    """One model's vocabulary of V tokens, K of them shared."""

    shared: Tensor
    """[K] int64: the shared tokens, in an order that both sides have."""
    rest: Tensor
    """[V - K] int64: the other tokens."""
    bucket: Tensor
    """[V] int64: the place of a token in `shared`, K for the others."""

    @classmethod
    def of(cls, shared: Tensor, rows: int) -> Side:
        """The side whose shared tokens these are, of a head of so many rows."""
        bucket = torch.full((rows,), len(shared), dtype=torch.int64, device=shared.device)
        bucket[shared] = torch.arange(len(shared), device=shared.device)
        return cls(shared, (bucket == len(shared)).nonzero()[:, 0], bucket)


class AlignedStream(NamedTuple):
    """What a teacher of another vocabulary says about one stream's positions."""

    hidden: Tensor
    """[N_teacher, D_teacher] final hidden states at the teacher's own target tokens."""
    labels: Tensor
    """[N_teacher] int64: these tokens."""
    cu: Tensor
    """[B + 1] int32 offsets of the questions in them, on the CPU."""
    spans: Tensor
    """[R, 6] int64, on the CPU: first and end position of the student's tokens, of the teacher's, the span's
    bucket in `Side.shared` or OWN, and which of `AlignedTeacher.vocabularies` holds for it."""

    def split(self, rows: int, questions: int) -> tuple[AlignedStream, AlignedStream]:
        """What belongs to the student's first `rows` positions, and the rest; the first part has as many
        questions as the whole, and the rest those from `questions` on."""
        first = self.spans[:, 0] < rows
        place = int(self.cu[questions])
        moved = self.spans[~first] - torch.tensor([rows, rows, place, place, 0, 0])
        return (
            AlignedStream(
                self.hidden[:place], self.labels[:place], self.cu.clamp(max=place), self.spans[first]
            ),
            AlignedStream(self.hidden[place:], self.labels[place:], self.cu[questions:] - place, moved),
        )


@dataclass(frozen=True, eq=False)
class AlignedTeacher:
    """The distributions of a teacher of another vocabulary, and how to distil from them."""

    predict: AlignedStream | None
    explain: AlignedStream | None
    """None: nothing to distil in this stream."""
    vocabularies: tuple[tuple[Side, Side], ...]
    """What student and teacher share. There are several where a token at the beginning of a text has other
    partners than elsewhere, because one of the two tokenizers puts a space in front of it."""
    weight: Tensor
    """[V_teacher, D_teacher] the teacher's head."""
    bias: Tensor | None = None
    softcap: float | None = None
    divergence: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    """These four as in `TeacherDistributions`."""


def head_loss(
    predict: Stream,
    explain: Stream | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Weights,
    teacher: TeacherDistributions | AlignedTeacher | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`api.head_loss`, whose teacher may have another vocabulary. `rest` goes there."""
    if not isinstance(teacher, AlignedTeacher):
        settings = {"weights": weights, "teacher": teacher, "softcap": softcap}
        return api.head_loss(predict, explain, weight, bias, **settings, **rest)
    total, terms = api.head_loss(predict, explain, weight, bias, weights=weights, softcap=softcap, **rest)
    streams = {"predict": (predict, weights.kd_predict), "explain": (explain, weights.kd_explain)}
    for name, (stream, factor) in streams.items():
        if (target := getattr(teacher, name)) is not None:
            loss = aligned_loss(stream, weight, bias, target, teacher, softcap=softcap)
            total, terms[f"kd_{name}"] = total + factor * loss, loss.detach()
    return total, terms


def aligned_loss(
    student: Stream,
    weight: Tensor,
    bias: Tensor | None,
    target: AlignedStream,
    teacher: AlignedTeacher,
    *,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The sum over spans of the module's docstring, in nats; 0-d fp32 (fp64 for an fp64 weight).

    It is differentiable once, for the student's states, weight and bias. `chunk_bytes`: at most this much
    memory for logits, and at least one span's; None: `CHUNK_BYTES`.
    """
    device = "cpu" if weight.device.type == "cpu" else "gpu"
    chunk_bytes = CHUNK_BYTES[device] if chunk_bytes is None else chunk_bytes
    return _AlignedLoss.apply(
        student.hidden, weight, bias, student.labels, target, teacher, softcap, chunk_bytes
    )


class _AlignedLoss(torch.autograd.Function):
    """The gradients are made in the forward pass, because the logits exist only then."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        with torch.autocast(hidden.device.type, enabled=False):
            total, gradients = _compute(hidden, weight, bias, *rest, needs=ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        found = [None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors]
        return *found, *[None] * 5


def _compute(hidden, weight, bias, labels, target, teacher, softcap, chunk_bytes, needs):
    """The loss, and its gradients for hidden states, weight and bias where they are needed."""
    spans = target.spans[target.spans[:, 5].argsort(stable=True)]
    order, own = (_positions(spans[:, i], spans[:, i + 1]) for i in (0, 2))
    order, own = (to_device(rows, weight.device) for rows in (order, own))
    head = ChunkedLinear(hidden.detach()[order], weight.detach(), bias, needs)
    theirs = ChunkedLinear(target.hidden.detach()[own], teacher.weight.detach(), teacher.bias)
    dtype = head.accumulator
    total = torch.zeros((), dtype=dtype, device=weight.device)
    divergence, scale = DIVERGENCES[teacher.divergence].function, teacher.temperature**2
    costs = [len(weight) * dtype.itemsize, len(teacher.weight) * theirs.accumulator.itemsize]
    parts = list(_chunks(spans, costs, chunk_bytes))
    mine_buffer, your_buffer = _buffer(head, spans, parts, 0), _buffer(theirs, spans, parts, 2)
    for part in parts:
        mine, yours = teacher.vocabularies[int(spans[part.start, 5])]
        bucket = to_device(spans[part, 4], weight.device)
        with torch.no_grad():
            place = _place(spans, part, 2)
            logits = theirs.forward(place.start, place.stop, your_buffer)
            log_q = _events(
                logits, teacher.softcap, target.labels[own[place]], spans[part, 2:4], yours, bucket, teacher
            ).to(dtype)
            place = _place(spans, part, 0)
            logits = head.forward(place.start, place.stop, mine_buffer).detach()
        with torch.enable_grad():
            logits.requires_grad_(any(needs))
            log_p = _events(logits, softcap, labels[order[place]], spans[part, :2], mine, bucket, teacher)
            loss = scale * divergence(log_q, log_p, teacher.beta).sum()
        total += loss.detach()
        if any(needs):
            head.add_gradients(torch.autograd.grad(loss, logits)[0], place.start, place.stop)
    d_hidden = None
    if needs[0]:
        d_hidden = torch.zeros_like(hidden).index_copy_(0, order, head.d_hidden.to(hidden.dtype))
    d_weight = head.weight_gradient()
    return total, (
        d_hidden,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if head.d_bias is None else head.d_bias.to(bias.dtype),
    )


def _positions(starts: Tensor, ends: Tensor) -> Tensor:
    """All positions from start to end, span after span."""
    lengths = ends - starts
    before = (lengths.cumsum(0) - lengths - starts).repeat_interleave(lengths)
    return torch.arange(int(lengths.sum())) - before


def _chunks(spans: Tensor, costs: list[int], bound: int) -> Iterator[slice]:
    """Slices of spans of one vocabulary each, whose logits take at most `bound` bytes, or of one span."""
    size = (spans[:, 1] - spans[:, 0]) * costs[0] + (spans[:, 3] - spans[:, 2]) * costs[1]
    first, used, rows = 0, 0, zip(size.tolist(), spans[:, 5].tolist(), strict=True)
    for i, (bytes_of, kind) in enumerate(rows):
        if i > first and (used + bytes_of > bound or kind != spans[first, 5]):
            yield slice(first, i)
            first, used = i, 0
        used += bytes_of
    if len(spans):
        yield slice(first, len(spans))


def _place(spans: Tensor, part: slice, column: int) -> slice:
    """Where the positions of these spans stand in the order of `_positions`."""
    lengths = spans[:, column + 1] - spans[:, column]
    start = int(lengths[: part.start].sum())
    return slice(start, start + int(lengths[part].sum()))


def _buffer(head: ChunkedLinear, spans: Tensor, parts: list[slice], column: int) -> Tensor:
    """Room for the logits of the largest chunk."""
    places = [_place(spans, part, column) for part in parts]
    rows = max((place.stop - place.start for place in places), default=0)
    return head.hidden.new_empty(rows, len(head.weight), dtype=head.accumulator)


def _events(
    logits: Tensor,
    softcap: float | None,
    labels: Tensor,
    bounds: Tensor,
    side: Side,
    bucket: Tensor,
    teacher: AlignedTeacher,
) -> Tensor:
    """Log probabilities [R, K + 2] of the events w, rest and span, from the logits of all positions [M, V].

    `labels` [M]: the tokens there. `bounds` [R, 2]: where each span begins and ends, up to a shift.
    """
    log_p = torch.log_softmax(capped(logits, softcap) / teacher.temperature, -1)
    lengths = bounds[:, 1] - bounds[:, 0]
    first, on_device = (to_device(n, logits.device) for n in (lengths.cumsum(0) - lengths, lengths))
    said, tokens = log_p.gather(1, labels[:, None])[:, 0], labels[first]
    start, shared = said[first], len(side.shared)
    # not `index_add`, whose sums have no fixed order on a GPU; unsafe: lengths are not checked by the host
    later = torch.segment_reduce(said, "sum", lengths=on_device, unsafe=True) - start
    # what is left of the first token once the span is taken out: nothing of a single one
    left = start + (-torch.expm1(later)).clamp_min(torch.finfo(said.dtype).tiny).log()
    rows = log_p[first].scatter(1, tokens[:, None], left[:, None])
    rest = rows[:, side.rest].logsumexp(-1) if len(side.rest) else torch.full_like(start, _NEVER)
    events = torch.cat([rows[:, side.shared], torch.stack([rest, torch.full_like(rest, _NEVER)], 1)], 1)
    place = torch.where(bucket == OWN, shared + 1, bucket)[:, None]
    span = torch.logaddexp(events.gather(1, place), (start + later)[:, None])
    events = events.scatter(1, place, span)
    may_be_empty = torch.zeros_like(events, dtype=torch.bool)
    may_be_empty[:, shared:] = True
    may_be_empty.scatter_(1, side.bucket[tokens][:, None], True).scatter_(1, place, False)
    floor = torch.tensor(SMALLEST_PROBABILITY, dtype=events.dtype, device=events.device).log()
    return torch.where(may_be_empty, torch.maximum(events, floor), events)
