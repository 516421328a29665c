"""Where a run is shown: TensorBoard and the progress bar."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from ibdistill.config.methods import METHODS
from ibdistill.runtime.distributed import World

if TYPE_CHECKING:
    from matplotlib.figure import Figure
logger = logging.getLogger("ibdistill")

_LAYOUT = {
    "training": {
        "losses": ["Multiline", ["loss/.*"]],
        "mutual information": ["Multiline", ["mi/(bound|kl|entropy|constant)$", "loss/(mi|vid|vib)$"]],
        "share of the gradient": ["Multiline", ["grad/share_.*"]],
        "token accuracy": ["Multiline", ["accuracy/.*"]],
    },
    "evaluation": {
        "accuracy": ["Multiline", ["eval/.*_accuracy$"]],
        "calibration error": ["Multiline", ["eval/.*_ece.*"]],
        "faithfulness": ["Multiline", ["eval/.*_(faithful|implies|agreement|leakage)$"]],
        "rationale text": ["Multiline", ["eval/.*_rationale_(bleu|chrf|rouge_l)$"]],
    },
    "machine": {
        "seconds per step": ["Multiline", ["speed/.*_s$"]],
        "tokens per second": ["Multiline", ["speed/tokens_per_s.*"]],
        "memory": ["Multiline", ["memory/.*"]],
    },
}
"""The CUSTOM SCALARS tab: chart -> patterns of the tags in it. `mi` is there for every estimator, and
`leakage` for every task with rationales."""
_ACCURACY = re.compile(r"(?<!rationale)_accuracy$")
_HEADLINE = re.compile(r"_(accuracy|(?<!first_token_)ece|faithful|rationale_bleu|rationale_rouge_l)$")
"""Tags of the scores that the HPARAMS tab shows."""


def _never_raises(method: Callable[..., None]) -> Callable[..., None]:
    """Let a method of `Board` that writes events never end a run.

    After an error of the file system (a full disk) no more events are written until the run is started again.
    Any other error costs what was to be written by this call.
    """

    @wraps(method)
    def guarded(self: Board, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except OSError as error:
            logger.warning("no more TensorBoard events until the next start, since %s", error)
            self._drop_writer()
        except Exception as error:
            logger.warning("a TensorBoard event is left out: %r", error)

    return guarded


class Board:
    """The TensorBoard events of a run and its progress bar, on rank 0.

    On other ranks, and without events if `off`, every call does nothing. Nothing here raises: events that
    cannot be written are left out with a warning.
    """

    def __init__(
        self, folder: Path, world: World, step: int, last_step: int = 0, *, off: bool = False
    ) -> None:
        """`step`: the step to continue from; later points of an interrupted run are purged.

        `last_step`: the length of the progress bar, which is shown if standard error is a terminal; 0: none.
        """
        self._writer = self._bar = None
        if world.rank == 0 and not off:
            self._open(folder, step)
        if world.rank == 0 and last_step and sys.stderr.isatty():
            self._bar = tqdm(total=last_step, initial=step, unit="step", dynamic_ncols=True)
            for handler in logger.handlers:
                handler.setStream(_AboveBar())

    @_never_raises
    def _open(self, folder: Path, step: int) -> None:
        _silence_writing_threads()
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._writer.add_custom_scalars(_LAYOUT)

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(Exception):
                writer.close()

    @_never_raises
    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write scalars by tag."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    @_never_raises
    def text(self, tag: str, text: str, step: int, *, markdown: bool = False) -> None:
        """Write a text; it is shown verbatim unless it is Markdown."""
        if self._writer is not None:
            lines = text if markdown else "\n".join("    " + line for line in text.splitlines())
            self._writer.add_text(tag, lines, step)

    def figures(self, figures: dict[str, Figure], step: int) -> None:
        """Write figures by tag, as images."""
        for tag, figure in figures.items():
            self._figure(tag, figure, step)

    @_never_raises
    def _figure(self, tag: str, figure: Figure, step: int) -> None:
        if self._writer is not None:
            self._writer.add_figure(tag, figure, step, close=False)

    @_never_raises
    def hparams(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Write a row of the HPARAMS tab: settings, and the main scores under the tags of their scalars.

        The tab puts settings before scores, which a few settings push off the screen. So the accuracies stand
        among the settings too, as the first columns.
        """
        if self._writer is not None:
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
            first = {tag.removeprefix("eval/"): v for tag, v in scores.items() if _ACCURACY.search(tag)}
            shown = {tag: v for tag, v in scores.items() if _HEADLINE.search(tag)}
            for summary in hparams(dict(sorted(first.items())) | plain, shown):
                self._writer.file_writer.add_summary(summary)

    def advance(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Finish the events file and the progress bar."""
        if self._bar is not None:
            self._bar.close()
            for handler in logger.handlers:
                handler.setStream(sys.stderr)
        self._close_writer()

    @_never_raises
    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@cache
def _silence_writing_threads() -> None:
    """Print no traceback where TensorBoard's own thread cannot write: the next call raises its error
    again."""
    threading.excepthook = partial(_except_hook, threading.excepthook)


def _except_hook(inner: Callable[[Any], Any], given: threading.ExceptHookArgs) -> None:
    if not type(given.thread).__module__.startswith("tensorboard."):
        inner(given)


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
