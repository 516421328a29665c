"""The sums that a run keeps between two logging steps.

They stay on the device until the logging step, when one reduction over ranks adds them up.
Between logging steps nothing waits for the device. `log` makes scalars of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ibdistill.data.batches import Batch
from ibdistill.objectives.weights import GRADIENT
from ibdistill.runtime import distributed


@dataclass(frozen=True)
class Interval:
    """What happened between two logging steps, over all ranks."""

    terms: dict[str, float]
    """Sums of the head loss's terms."""
    counts: dict[str, int]
    """Target tokens by segment, questions (`questions`) and questions with a rationale (`explained`)."""
    steps: int
    tokens: int
    """Tokens that entered the model, those of questions and of targets, without padding."""
    targets: int
    """The target tokens among them."""
    positions: int
    """The same tokens with padding."""
    seconds: float
    """Wall-clock time, without what `Meter.exclude` left out."""
    parts: dict[str, float]
    """Mean over ranks of the seconds spent on `data_wait` and on whatever else was timed, by name."""
    norms: list[float]
    """Gradient norm of each step, before clipping."""
    gradients: dict[str, float] = field(default_factory=dict)
    """Norm of each term's gradient at the head's input: the root mean square over the steps at which it was
    measured."""


class Meter:
    """Collects an interval's sums on this rank."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps = self._tokens = self._targets = self._positions = 0
        self._parts: dict[str, float] = {}
        self._norms: list[Tensor | float] = []
        self._probes = 0
        self._is_probed = False
        self._start = time.perf_counter()

    def add(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Add one micro-batch's sums. `terms` are detached 0-d tensors, which nothing waits for."""
        for name, value in terms.items():
            self._terms[name] = self._terms[name] + value if name in self._terms else value
            self._is_probed |= name.startswith(GRADIENT)
        self._tokens += batch.num_tokens
        self._targets += sum(len(labels) for labels in batch.labels.values())
        self._positions += batch.num_positions

    def end_step(
        self,
        counts: dict[str, int],
        data_wait: float,
        norm: Tensor | float | None = None,
        **parts: float,
    ) -> None:
        """Note the end of a step.

        `counts` are the step's global counts, and `norm` is the gradient's norm before clipping. `data_wait`
        and `parts` are seconds of this rank, under the same names on all ranks: `teacher=0.1` becomes
        `speed/teacher_s`.
        """
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        for name, value in {"data_wait": data_wait, **parts}.items():
            self.add_seconds(name, value)
        if norm is not None:
            self._norms.append(norm)
        self._steps += 1
        self._probes += self._is_probed
        self._is_probed = False

    def add_seconds(self, part: str, seconds: float) -> None:
        """Add seconds of this rank to a part of the interval; all ranks name the same parts."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    def exclude(self, seconds: float) -> None:
        """Leave out seconds that were not training, such as those of an evaluation."""
        self._start += seconds

    def close_interval(self) -> Interval:
        """The interval's totals over ranks, on every rank; a new interval starts. Collective."""
        names, parts = sorted(self._terms), sorted(self._parts)
        local = [float(self._terms[name]) for name in names]
        local += [self._parts[name] for name in parts]
        local += [self._tokens, self._targets, self._positions]
        summed = distributed.sum_over_ranks(torch.tensor(local, dtype=torch.float64)).tolist()
        sums, summed = dict(zip(names, summed, strict=False)), summed[len(names) :]
        ranks = torch.distributed.get_world_size()
        interval = Interval(
            terms={name: value for name, value in sums.items() if not name.startswith(GRADIENT)},
            counts=self._counts,
            steps=self._steps,
            parts={name: value / ranks for name, value in zip(parts, summed, strict=False)},
            tokens=int(summed[-3]),
            targets=int(summed[-2]),
            positions=int(summed[-1]),
            seconds=time.perf_counter() - self._start,
            norms=[float(norm) for norm in self._norms],
            gradients={
                name.removeprefix(GRADIENT): (value / self._probes) ** 0.5
                for name, value in sums.items()
                if name.startswith(GRADIENT)
            },
        )
        self._restart()
        return interval
