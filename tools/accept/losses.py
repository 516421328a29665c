"""Check b: the head loss against the same in fp64, values and all gradients.

A result in a dtype may be off by at most twice what plain torch is off in that dtype, or by a floor of a few
roundings where plain torch happens to be exact. The distance is that of the vectors, relative to the truth's
length. Two calls must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from accept.lines import Context
from ibdistill.ops.head_loss import (
    IGNORED,
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
    head_loss,
    logits_loss,
)
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.estimators import ESTIMATORS
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.head_loss.sampled_token import SAMPLED

VOCABULARIES = (32128, 50257, 151936)
DTYPES = (torch.bfloat16, torch.float32)
FLOOR = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
"""The error that is allowed whatever plain torch's is: about one rounding in bf16."""
LARGE_OFF = 1e-4
"""How far the loss of more than 2^31 logits may be off, relatively, as a sum in fp32. A row that is read from
a wrong place shows in the gradients of its part."""
LENGTHS = {"predict": (3, 0, 1, 7, 2, 5, 1, 4), "explain": (17, 9, 0, 33, 1, 26, 8, 64)}
"""Target tokens of eight questions: ragged, one without a label, one without a rationale."""


class Case(NamedTuple):
    """One call of the head loss."""

    name: str
    mi: MISettings | None = None
    divergence: str = ""
    top_k: int = 0
    """The teacher gives this many most probable tokens; 0: its states."""


def cases() -> Iterator[Case]:
    """Cross entropy alone, every estimator and pool, every divergence from states and from a top k."""
    yield Case("cross entropy")
    for name, estimator in ESTIMATORS.items():
        yield Case(f"{name}, max, to explain", MISettings(name))
        yield Case(f"{name}, mean, to both", MISettings(name, pool="mean", gradient="both"))
        if estimator.space == "distribution":
            yield Case(f"{name}, teacher's", MISettings(name, pair="teacher"), "forward")
    for name in DIVERGENCES:
        yield Case(f"kd {name}, states", None, name)
        yield Case(f"kd {name}, top 64, and paper", MISettings("paper"), name, 64)
    for name in SAMPLED:
        yield Case(f"kd {name}, states", None, name)


class Inputs(NamedTuple):
    """Tensors of a call, on the device."""

    predict: Stream
    explain: Stream
    weight: Tensor
    states: tuple[Tensor, Tensor]
    """The teacher's, of both streams."""
    teacher_weight: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as new leaves that want gradients."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype).clone().requires_grad_()

        streams = (s._replace(hidden=leaf(s.hidden)) for s in (self.predict, self.explain))
        states = tuple(x.to(dtype) for x in self.states)
        return Inputs(*streams, leaf(self.weight), states, self.teacher_weight.to(dtype))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets gradients."""
        return self.predict.hidden, self.explain.hidden, self.weight


def inputs(device: torch.device, V: int, D: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random tensors with logits of a few units; every ninth position is ignored."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    streams = []
    for lengths in LENGTHS.values():
        tokens = sum(lengths)
        labels = torch.randint(V, (tokens,), generator=generator)
        labels[::9] = IGNORED
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        streams.append(Stream(draw(tokens, D), labels.to(device), cu))
    states = tuple(draw(len(stream.labels), D) for stream in streams)
    scale = 2 * D**-0.5
    return Inputs(*streams, draw(V, D, scale=scale), states, draw(V, D, scale=scale))


def teacher_of(case: Case, given: Inputs) -> TeacherDistributions | None:
    """What the case distils from."""
    if not case.divergence:
        return None
    if not case.top_k:
        streams = [TeacherStream(states) for states in given.states]
        weight = given.teacher_weight
    else:
        # the tokens are chosen from fp32, so that all dtypes distil from the same ones
        logits = [(x.float() @ given.teacher_weight.float().T) / 2.0 for x in given.states]
        top = [torch.softmax(x, -1).topk(case.top_k, -1) for x in logits]
        streams = [TeacherStream(None, t.indices, t.values.to(given.weight.dtype)) for t in top]
        weight = None
    temperature = 1.0 if case.divergence in SAMPLED else 2.0
    return TeacherDistributions(*streams, weight, divergence=case.divergence, temperature=temperature)


def outcome(function: Callable, case: Case, given: Inputs, teacher, **more) -> list[Tensor]:
    """Total and gradients of a call, in the order of `Inputs.leaves`."""
    for leaf in given.leaves:
        leaf.grad = None
    weights = Weights(0.3, 0.01, 0.5 if case.mi else 0.0, 0.2, 0.02)
    total, _ = function(
        given.predict, given.explain, given.weight, weights=weights, mi=case.mi, teacher=teacher, **more
    )
    total.backward()
    return [total.detach(), *(leaf.grad for leaf in given.leaves)]


def distance(got: Tensor, truth: Tensor) -> float:
    """|got - truth| / |truth|, in fp64."""
    length = truth.double().norm().item()
    return (got.double() - truth.double()).norm().item() / (length or 1.0)


def judge(
    context: Context,
    name: str,
    truth: Sequence[Tensor],
    plain: Sequence[Tensor],
    ours: Sequence[Tensor],
    again: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    repeatable: bool = True,
) -> bool:
    """The verdict of one case: errors against twice plain torch's, and equal bits if it is `repeatable`."""
    errors = [distance(x, t) for x, t in zip(ours, truth, strict=True)]
    allowed = [max(2 * distance(x, t), FLOOR[dtype]) for x, t in zip(plain, truth, strict=True)]
    finite = all(bool(torch.isfinite(x).all()) for x in ours)
    repeats = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    worst = max(error / bound for error, bound in zip(errors, allowed, strict=True))
    holds = finite and (repeats or not repeatable) and worst <= 1
    message = f"error {worst:.2f} of what is allowed; {'the same' if repeats else 'OTHER'} bits twice"
    return context.verdict(name, holds, message, errors=errors, allowed=allowed, finite=finite)


def head_loss_cases(context: Context) -> None:
    """Every case for each vocabulary and dtype, in the implementation that a GPU takes."""
    vocabularies = (97, 257) if context.small else VOCABULARIES
    width = 16 if context.small else 256
    impl = "torch" if context.small else "triton"
    context.info("implementation", impl)
    for V, dtype in ((V, dtype) for V in vocabularies for dtype in DTYPES):
        given = inputs(context.device, V, width, dtype)
        exact, plain, ours = given.to(torch.float64), given.to(dtype), given.to(dtype)
        for case in cases():
            teachers = [teacher_of(case, x) for x in (exact, plain, ours)]
            truth = outcome(head_loss_reference, case, exact, teachers[0])
            rounded = outcome(head_loss_reference, case, plain, teachers[1], dtype=dtype)
            got = outcome(head_loss, case, ours, teachers[2], impl=impl)
            again = outcome(head_loss, case, ours, teachers[2], impl=impl)
            name = f"{case.name}, V {V}, {str(dtype).removeprefix('torch.')}"
            judge(context, name, truth, rounded, got, again, dtype)


def large(context: Context) -> None:
    """More logits in one tensor than 2^31, whose places a 32-bit number cannot count."""
    V, rows, part = 151936, 14336, 1024  # 2.18e9 logits, 4.1 GiB in bf16
    need, free = 3 * 2 * V * rows, torch.cuda.mem_get_info()[0]
    if free < 1.2 * need:
        context.not_run("logits", f"it needs {need / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
        return
    generator = torch.Generator(context.device).manual_seed(2)
    logits = torch.randn(rows, V, generator=generator, device=context.device, dtype=torch.bfloat16)
    labels = torch.randint(V, (rows,), generator=generator, device=context.device)
    cu = torch.arange(0, rows + 1, rows // 8, dtype=torch.int32)
    expected, worst = 0.0, 0.0
    leaf = logits.detach().requires_grad_()
    total, _ = logits_loss(Stream(leaf, labels, cu), None, weights=Weights(1.0))
    total.backward()
    for begin in range(0, rows, part):
        piece = logits[begin : begin + part].double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(piece, labels[begin : begin + part], reduction="sum")
        loss.backward()
        expected += loss.item()
        worst = max(worst, distance(leaf.grad[begin : begin + part], piece.grad))
    error = abs(total.item() / expected - 1)
    bound = FLOOR[torch.bfloat16]
    holds = error < LARGE_OFF and worst < bound
    message = f"{rows} x {V}: relative error {error:.1e} ({LARGE_OFF:.0e}), of a gradient's part "
    message += f"{worst:.1e} ({bound:.0e})"
    context.verdict("logits", holds, message)
