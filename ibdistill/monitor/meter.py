"""What a run shows: TensorBoard, one console line a logging step, and `result.json`.

Values stay on the device, as sums, until a logging step; then one reduction over ranks turns
them into means. Between logging steps nothing waits for the device.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ibdistill.data.batches import Batch
from ibdistill.objectives.weights import GRADIENT
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import World

if TYPE_CHECKING:
    pass

logger = logging.getLogger("ibdistill")


@dataclass(frozen=True)
class Interval:
    """What happened between two logging steps, over all ranks."""

    terms: dict[str, float]
    """Sums of the head loss's terms."""
    counts: dict[str, int]
    """Target tokens by stream, `questions`, `explained`."""
    steps: int
    tokens: int
    """Real tokens that entered the model, questions and targets."""
    targets: int
    """The target tokens among them."""
    positions: int
    """The tokens with padding."""
    seconds: float
    parts: dict[str, float]
    """Mean over ranks of the seconds spent on `data_wait` and whatever else was timed by name."""
    norms: list[float]
    """Gradient norm of each step, before clipping."""
    gradients: dict[str, float] = field(default_factory=dict)
    """Norm of each term's gradient at the head's input, of the steps at which it was measured (RMS)."""

    def speed(self, world: World, stall: float = 0.0) -> dict[str, float]:
        """Scalars of throughput and padding by TensorBoard tag. What no part claims is the student's.

        `stall`: seconds of the interval that the student waited for the teacher.
        """
        parts = {f"speed/{name}_s": value / self.steps for name, value in self.parts.items()}
        step = self.seconds / self.steps
        return {
            "speed/tokens_per_s": self.tokens / self.seconds,
            "speed/tokens_per_s_per_device": self.tokens / self.seconds / world.size,
            "speed/step_s": step,
            **parts,
            "speed/student_s": step - sum(parts.values()) - stall / self.steps,
            "data/padded_share": 1 - self.tokens / self.positions,
        }

    def utilization(self, operations: tuple[int, int], peak: float, world: World) -> float:
        """Model FLOPs utilization: `operations` of a question's and a target's token (`hardware`), over what
        `world.size` devices could do at `peak` operations a second (Chowdhery et al., arXiv 2204.02311)."""
        done = operations[0] * (self.tokens - self.targets) + operations[1] * self.targets
        return done / self.seconds / peak / world.size

    def gradient_scalars(self, clip_norm: float) -> dict[str, float]:
        """The last step's norm, the share of steps that were clipped, each term's norm and its share.

        `vid` and `vib` meet the student elsewhere, in the question's states, and have no share."""
        scalars = {"grad/norm": self.norms[-1] if self.norms else 0.0}
        if clip_norm > 0 and self.norms:
            scalars["grad/clipped_share"] = sum(norm > clip_norm for norm in self.norms) / len(self.norms)
        shared = {name: norm for name, norm in self.gradients.items() if name not in ("vid", "vib")}
        total = sum(shared.values())
        for name, norm in self.gradients.items():
            scalars[f"grad/norm_{name.removeprefix('ce_')}"] = norm
            if total > 0 and name in shared and len(shared) > 1:
                scalars[f"grad/share_{name.removeprefix('ce_')}"] = norm / total
        return scalars


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
        """One micro-batch's sums; `terms` are detached 0-d tensors, which are not waited for."""
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
        """A step is over.

        `counts` are its global counts, `norm` the gradient's before clipping. `data_wait` and `parts` are
        seconds of this rank, under the same names on all ranks: `teacher=0.1` becomes `speed/teacher_s`.
        """
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        for name, value in {"data_wait": data_wait, **parts}.items():
            self._parts[name] = self._parts.get(name, 0.0) + value
        if norm is not None:
            self._norms.append(norm)
        self._steps += 1
        self._probes += self._is_probed
        self._is_probed = False

    def exclude(self, seconds: float) -> None:
        """Leave out what was no training, such as an evaluation."""
        self._start += seconds

    def close_interval(self) -> Interval:
        """The interval's totals over ranks, on every rank; starts a new one. Collective."""
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


def tag(term: str) -> str:
    """The TensorBoard tag of a term: `ce_predict` -> `loss/predict`, `kd_predict` -> `loss/kd_predict`,
    `mi` -> `loss/mi`, `mi_bound` -> `mi/bound`, `vid` -> `loss/vid`, `vid_bound` -> `mi/vid_bound`,
    `correct_predict` -> `accuracy/predict_tokens`."""
    kind, _, rest = term.partition("_")
    if kind == "correct":
        return f"accuracy/{rest}_tokens"
    if kind == "mi" and rest:
        return f"mi/{rest}"
    if kind == "vid" and rest:
        return f"mi/{term}"
    return f"loss/{rest if kind == 'ce' else term}"


def constant_share(term: float, constant: float) -> float:
    """Share (0..1) of a term that its constant part explains; what the student can change is the rest, on
    either side of it."""
    return 1.0 - abs(term - constant) / max(term, constant)
