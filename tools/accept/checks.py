"""The checks in the order of their worth. Adding one is a function and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from accept.lines import Context


class Check(NamedTuple):
    """A check of the list."""

    name: str
    place: str
    """MODULE:FUNCTION below `accept`; the function takes a `Context` and writes its cases."""
    minutes: float
    """About how long it takes on an H100, assumed and not measured; it is killed after three times that and
    two minutes more."""
    ranks: int = 1
    """The fewest GPUs that it needs."""
    on_cpu: bool = True
    """Whether it has a small form for the dry run."""

    def function(self) -> Callable[[Context], None]:
        """The check itself."""
        module, name = self.place.split(":")
        return getattr(importlib.import_module(f"accept.{module}"), name)


CHECKS = (
    Check("a. environment", "environment:check", 0.3),
    Check("b. head loss", "losses:head_loss_cases", 2.0),
    Check("b. vid and layers", "operations:other_cases", 0.5),
    Check("b. more than 2^31 logits", "losses:large", 0.3, on_cpu=False),
    Check("c. host syncs and kernels", "budgets:syncs", 0.5),
    Check("d. teacher beside student", "teachers:placements", 1.0),
    Check("d. overlap changes nothing", "teachers:overlap", 0.7, on_cpu=False),
    Check("e. models against fp64", "models:gradients", 1.0),
    Check("f. speed of T5-base", "speed:t5", 1.5),
    Check("f. speed of Qwen2.5-0.5B", "speed:qwen2", 3.0),
    Check("g. 200 ragged steps", "budgets:ragged", 1.0),
    Check("i. stop and resume", "resume:stopped", 1.5),
    Check("j. gradients over ranks", "several:gradients", 2.0, ranks=2),
    Check("j. save and resume over ranks", "several:resumed", 2.0, ranks=2, on_cpu=False),
    Check("j. a killed rank", "several:killed", 1.0, ranks=2),
    Check("j. uneven evaluation", "several:evaluation", 1.0, ranks=2, on_cpu=False),
    Check("j. bus bandwidth", "several:bandwidth", 0.5, ranks=2),
    Check("j. scaling", "several:scaling", 3.0, ranks=2, on_cpu=False),
)


def named(name: str) -> Check:
    """The check of this name. Raises ValueError if there is none."""
    for check in CHECKS:
        if check.name == name:
            return check
    raise ValueError(f"--check is {name!r}; choose from {', '.join(check.name for check in CHECKS)}")
