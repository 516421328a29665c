"""Distillation from a teacher in the torch implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from ibdistill.ops.head_loss.arguments import (
    BLOCK_ROWS,
    SMALLEST_PROBABILITY,
    Call,
    TeacherStream,
    field_of_streams,
)
from ibdistill.ops.head_loss.divergences import loss_and_gradient
from ibdistill.ops.head_loss.packing import Rows
from ibdistill.ops.head_loss.sampled_token import value_and_factor
from ibdistill.ops.head_loss.softcap import cap_
from ibdistill.ops.linear import ChunkedLinear, log_softmax_


class TorchDistiller:
    """Divergences from the teacher, chunk by chunk, and their gradients in a buffer of the chunk's size."""

    def __init__(self, call: Call, rows: Rows, vocabulary: int, dtype: torch.dtype):
        self.vocabulary = vocabulary
        self.teacher, self.is_explain = call.teacher, rows.is_explain
        self.losses = torch.zeros(len(rows.labels), dtype=dtype, device=rows.labels.device)
        self.buffer = self.losses.new_empty(0)
        self.has = {"predict": call.teacher.predict is not None, "explain": call.teacher.explain is not None}
        on = [self.has["predict"], self.has["explain"]]
        self.taught = torch.where(self.is_explain, on[1], on[0])
        self.factor = torch.full_like(self.losses, call.weights.kd_predict)
        self.factor.masked_fill_(self.is_explain, call.weights.kd_explain).mul_(call.teacher.temperature)
        self.hidden, self.ids, self.probabilities, self.weights = (
            self._pack(call, rows, field) for field in TeacherStream._fields
        )
        if self.weights is not None:
            self.factor.mul_(self.weights)
        if self.hidden is not None:
            self.head = ChunkedLinear(self.hidden, call.teacher.weight.detach(), call.teacher.bias)

    def _pack(self, call: Call, rows: Rows, field: str) -> Tensor | None:
        """One field of the teacher's streams in the order of the rows; see `field_of_streams`."""
        counts = [len(stream.labels) for stream in (call.predict, call.explain) if stream is not None]
        parts = field_of_streams(call.teacher, field, counts)
        return None if parts is None else torch.cat(parts)[rows.order]

    def log_probabilities(self, a: int, b: int) -> Tensor:
        """The teacher's log probabilities at temperature 1 for the rows a to b, [b - a, V].

        The tail of a top k is shared equally among the tokens that it lacks.
        """
        out = self._buffer(b - a)
        if self.hidden is not None:
            return log_softmax_(self._logits(a, b))
        ids, q = self.ids[a:b], self.probabilities[a:b].to(out.dtype)
        tail = (1 - q.sum(-1, keepdim=True)).clamp_min_(SMALLEST_PROBABILITY) / max(
            out.shape[1] - ids.shape[1], 1
        )
        return out.copy_(tail).scatter_(1, ids, q).clamp_min_(torch.finfo(out.dtype).tiny).log_()

    def _logits(self, a: int, b: int) -> Tensor:
        """The teacher's logits of the rows a to b, in the buffer."""
        return cap_(self.head.forward(a, b, self._buffer(b - a)), self.teacher.softcap)

    def _buffer(self, rows: int) -> Tensor:
        if len(self.buffer) < rows:
            self.buffer = self.buffer.new_empty(rows, self.vocabulary)
        return self.buffer[:rows]

    def distil(self, log_p: Tensor, a: int, b: int) -> Tensor:
        """Note the losses of the rows a to b, and return their gradients for the logits, [b - a, V]."""
        out = self._buffer(b - a)
        if self.hidden is not None:
            self._logits(a, b)
        temperature = self.teacher.temperature
        for row in range(0, b - a, BLOCK_ROWS):
            block = slice(row, min(row + BLOCK_ROWS, b - a))
            mine = slice(a + block.start, a + block.stop)
            student = torch.log_softmax(log_p[block] / temperature, -1)
            if self.hidden is not None:
                log_q = torch.log_softmax(out[block] / temperature, -1)
                losses, gradient = loss_and_gradient(
                    self.teacher.divergence, log_q, student, self.teacher.beta
                )
            else:
                losses, gradient = self._top_k(student, mine)
            taught = self.taught[mine]
            self.losses[mine] = torch.where(taught, losses * temperature**2, 0)
            out[block] = gradient.mul_(self.factor[mine, None]).masked_fill_(~taught[:, None], 0)
        return out

    def estimate(self, label_log_p: Tensor, labels: Tensor, a: int, b: int) -> Tensor:
        """Note the estimates from the labels of the rows a to b, and return the factors [b - a] of the
        gradients of `label_log_p` [b - a]."""
        if self.hidden is None:
            log_q = self.probabilities[a:b, 0].to(label_log_p.dtype).log()
        else:
            log_q = self.log_probabilities(a, b).gather(1, labels[:, None])[:, 0]
        value, factor = value_and_factor(self.teacher.divergence, log_q, label_log_p)
        taught = self.taught[a:b]
        self.losses[a:b] = torch.where(taught, value, 0)
        return torch.where(taught, factor * self.factor[a:b], 0)

    def _top_k(self, student: Tensor, mine: slice) -> tuple[Tensor, Tensor]:
        """Losses and gradients between the k + 1 buckets. Overwrites the log probabilities `student`."""
        ids, q = self.ids[mine], self.probabilities[mine].to(student.dtype)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).clamp_min(SMALLEST_PROBABILITY)
        top = student.gather(1, ids)
        rest = student.scatter_(1, ids, -torch.inf).exp_()
        mass = rest.sum(-1, keepdim=True)
        # k = V leaves no tail: its logarithm must still be a number
        log_p = torch.cat([top, mass.clamp_min(torch.finfo(mass.dtype).tiny).log()], -1)
        losses, gradient = loss_and_gradient(self.teacher.divergence, q.log(), log_p, self.teacher.beta)
        # a bucket's gradient is shared among its tokens in proportion to their probabilities
        rest.mul_(torch.where(mass > 0, gradient[:, -1:] / mass, 0))
        return losses, rest.scatter_(1, ids, gradient[:, :-1])

    def terms(self) -> dict[str, Tensor]:
        """Sums over the rows of each stream that the teacher has."""
        mine = {"predict": ~self.is_explain, "explain": self.is_explain}
        losses = self.losses if self.weights is None else self.losses * self.weights
        return {f"kd_{name}": losses[mine[name]].sum() for name, has in self.has.items() if has}
