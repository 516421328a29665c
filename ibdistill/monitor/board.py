"""Where a run is shown: TensorBoard and the progress bar."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ibdistill.config.methods import METHODS
from ibdistill.monitor.reporters import REPORTERS, Reporter
from ibdistill.runtime.distributed import World

if TYPE_CHECKING:
    from matplotlib.figure import Figure
logger = logging.getLogger("ibdistill")

_ACCURACY = re.compile(r"(?<!rationale)_accuracy$")
_HEADLINE = re.compile(r"_(accuracy|(?<!first_token_)ece|faithful|rationale_bleu|rationale_rouge_l)$")
"""Tags of the scores that the summary of a run shows."""


class Board:
    """The reporters of a run (`reporters.REPORTERS`) and its progress bar, on rank 0.

    On other ranks every call does nothing. Nothing here raises. After an error of the file system (a full
    disk) a reporter is left out until the run is started again; any other error costs what was to be
    reported.
    """

    def __init__(
        self, run: Path, world: World, step: int, last_step: int = 0, *, report_to: Sequence[str] = ()
    ) -> None:
        """`run`: the run's folder; `step`: the step to continue from.

        `last_step`: the length of the progress bar, which is shown if standard error is a terminal; 0: none.
        """
        self._reporters: dict[str, Reporter] = {}
        self._bar = None
        for name in report_to if world.rank == 0 else ():
            self._guard(name, lambda name=name: self._reporters.update({name: REPORTERS[name](run, step)}))
        if world.rank == 0 and last_step and sys.stderr.isatty():
            self._bar = tqdm(total=last_step, initial=step, unit="step", dynamic_ncols=True)
            for handler in logger.handlers:
                handler.setStream(_AboveBar())

    def _guard(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:
            logger.warning("run.report_to %s: no more until the next start, since %s", name, error)
            reporter = self._reporters.pop(name, None)
            with suppress(Exception):
                reporter and reporter.close()
        except Exception as error:
            logger.warning("run.report_to %s: something is left out, since %r", name, error)

    def _report(self, call: Callable[[Reporter], None]) -> None:
        for name, reporter in list(self._reporters.items()):
            self._guard(name, lambda reporter=reporter: call(reporter))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Report numbers by tag."""
        self._report(lambda reporter: reporter.scalars(values, step))

    def text(self, tag: str, text: str, step: int, *, markdown: bool = False) -> None:
        """Report a text; it is shown verbatim unless it is Markdown."""
        self._report(lambda reporter: reporter.text(tag, text, step, markdown=markdown))

    def figures(self, figures: dict[str, Figure], step: int) -> None:
        """Report figures by tag, as images."""
        for tag, figure in figures.items():
            self._report(lambda reporter, tag=tag, figure=figure: reporter.figure(tag, figure, step))

    def summary(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Report the settings of a run that is over, and its main scores; accuracies come first."""
        first = {tag.removeprefix("eval/"): v for tag, v in scores.items() if _ACCURACY.search(tag)}
        shown = {tag: v for tag, v in scores.items() if _HEADLINE.search(tag)}
        self._report(lambda reporter: reporter.summary(settings, shown, dict(sorted(first.items()))))

    def advance(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Finish the reporters and the progress bar."""
        if self._bar is not None:
            self._bar.close()
            for handler in logger.handlers:
                handler.setStream(sys.stderr)
        self._report(lambda reporter: reporter.close())
        self._reporters = {}


def draws(report_to: Sequence[str]) -> bool:
    """Whether one of the reporters shows figures."""
    return not {"tensorboard", "wandb"}.isdisjoint(report_to)


class _AboveBar:
    """A stream that writes above the progress bar."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


def hyperparameters(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that tell a sweep's runs apart: method, seed, and all that are not at their defaults.

    Both arguments map `section.field` to a value. Left out are those that change no result (`run.`), and the
    weight and form of a mutual-information term, which have values for every run, where the method has none.
    """
    first = {name: settings[name] for name in ("objective.method", "run.seed")}
    unused = () if METHODS[settings["objective.method"]].mi else ("objective.beta", "objective.estimator")
    return first | {
        name: value
        for name, value in settings.items()
        if value != defaults[name] and not name.startswith("run.") and name not in (*first, *unused)
    }
