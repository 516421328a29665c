"""Where the numbers, texts and figures of a run go: TensorBoard, JSON lines, Weights & Biases.

A reporter is one class and one line in REPORTERS. Each of its methods may raise: `board.Board` guards them.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import threading
import uuid
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ibdistill.runtime import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


class TensorBoard:
    """An events file in `RUN/tensorboard`."""

    def __init__(self, run: Path, step: int) -> None:
        """`step`: the step to continue from; later points of an interrupted run are purged."""
        _silence_writing_threads()
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._writer.add_custom_scalars(_LAYOUT)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int, *, markdown: bool) -> None:
        """A text; it is shown verbatim unless it is Markdown."""
        lines = text if markdown else "\n".join("    " + line for line in text.splitlines())
        self._writer.add_text(tag, lines, step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """A figure, as an image."""
        self._writer.add_figure(tag, figure, step, close=False)

    def summary(self, settings: dict[str, Any], scores: dict[str, float], first: dict[str, float]) -> None:
        """A row of the HPARAMS tab: settings, and scores under the tags of their scalars.

        The tab puts settings before scores, which a few settings push off the screen. So the scores `first`
        stand among the settings too, as the first columns.
        """
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in hparams(first | plain, scores):
            self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        """Finish the events file."""
        self._writer.close()


class JsonLines:
    """`RUN/metrics.jsonl`: one object per call of `scalars`, its step under `step`; for scripts.

    A number that is not finite is null there, because JSON has no word for it.
    """

    def __init__(self, run: Path, step: int) -> None:
        """`step`: the step to continue from; lines of later steps, and a line cut by a crash, are removed."""
        path = run / "metrics.jsonl"
        lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        run.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, "".join(line for line in lines if _step_of(line) <= step))
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One line."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def text(self, tag: str, text: str, step: int, *, markdown: bool) -> None:
        """Nothing: texts are in files of their own."""

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Nothing."""

    def summary(self, settings: dict[str, Any], scores: dict[str, float], first: dict[str, float]) -> None:
        """Nothing: `config.yaml` and `result.json` hold them."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WeightsAndBiases:
    """A run of Weights & Biases, by its own library; project, entity, key and mode come from its environment
    variables (WANDB_PROJECT, WANDB_API_KEY, WANDB_MODE=offline, ...).

    A run that is continued keeps its identity, which `RUN/wandb/id` holds. Points after the checkpoint that
    it continues from cannot be taken back there: they are drawn twice.
    """

    def __init__(self, run: Path, step: int) -> None:
        """`step` is unused."""
        import wandb

        self._library, folder = wandb, run / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / "id"
        if not name.exists():
            files.write_atomically(name, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ibdistill"),
            name=os.environ.get("WANDB_NAME", run.name),
            id=name.read_text("utf-8"),
            resume="allow",
            dir=run,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by tag, drawn over `step`."""
        self._run.log({"step": step, **values})

    def text(self, tag: str, text: str, step: int, *, markdown: bool) -> None:
        """A text, verbatim."""
        self._run.log({"step": step, tag: self._library.Html(f"<pre>{html.escape(text)}</pre>")})

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """A figure, as an image; the library would need pyplot for it, with state of the whole process."""
        from PIL import Image

        figure.savefig(content := io.BytesIO(), format="png")
        self._run.log({"step": step, tag: self._library.Image(Image.open(content))})

    def summary(self, settings: dict[str, Any], scores: dict[str, float], first: dict[str, float]) -> None:
        """The settings as the run's configuration, the scores as its summary."""
        self._run.config.update(settings, allow_val_change=True)
        self._run.summary.update(scores)

    def close(self) -> None:
        """Send or write what is left."""
        self._run.finish()


Reporter = TensorBoard | JsonLines | WeightsAndBiases
REPORTERS: dict[str, Callable[[Path, int], Reporter]] = {
    "tensorboard": TensorBoard,
    "jsonl": JsonLines,
    "wandb": WeightsAndBiases,
}
"""Name in `run.report_to` -> reporter. Another one joins this table and the setting's type."""


def _step_of(line: str) -> float:
    """The step of a line of `metrics.jsonl`; infinity for a line that is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) and line.endswith("\n") else math.inf


@cache
def _silence_writing_threads() -> None:
    """Print no traceback where TensorBoard's own thread cannot write: the next call raises its error
    again."""
    threading.excepthook = partial(_except_hook, threading.excepthook)


def _except_hook(inner: Callable[[Any], Any], given: threading.ExceptHookArgs) -> None:
    if not type(given.thread).__module__.startswith("tensorboard."):
        inner(given)
