"""What the student of a run can do so far: it answers records, and its answers are scored and shown."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedModel

from ibdistill.data.records import Record
from ibdistill.evaluation import predictions as evaluation_predictions
from ibdistill.evaluation import report
from ibdistill.evaluation.predictions import Prediction
from ibdistill.monitor.board import draws
from ibdistill.runtime import distributed
from ibdistill.training.job import Job

logger = logging.getLogger("ibdistill")


def evaluate(job: Job, split: str, limit: int = 0) -> dict[str, float]:
    """Decode a split and `show` it; the accuracy of each task, by its name. Collective."""
    scores: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    with job.whole() as model:
        for task, records in getattr(job.records, split).items():
            predictions = answers(job, model, records[: limit or None])
            shown = partial(show, job, f"{split}_{task}", predictions, final=split == "test")
            scores[task] = distributed.run_on_rank_0(shown)
    seconds = time.perf_counter() - start
    job.meter.exclude(seconds)
    job.results |= {split: scores, f"{split}_seconds": round(seconds, 1)}
    return {task: values["accuracy"] for task, values in scores.items()}


def answers(job: Job, model: PreTrainedModel, records: Sequence[Record]) -> list[Prediction]:
    """The student's answers to records of one task. Collective; `model` is whole on every rank."""
    config = job.config
    return evaluation_predictions.evaluate(
        model, job.tokenizer, records, job.streams, config.data, job.world, config.run.eval_batch_size
    )


def show(job: Job, name: str, predictions: Sequence[Prediction], *, final: bool = False) -> dict[str, float]:
    """Score one task's predictions, and show them: file, scalars, figures, samples, console. On rank 0.

    What cannot be written or drawn is reported, and never ends a run. If it is the file of the `final` test,
    the end of the run says so once more.
    """
    step = job.state.step
    scores = evaluation_predictions.scores(predictions)
    path = job.folder / "predictions" / f"step-{step:08d}" / f"{name}.jsonl"
    try:
        evaluation_predictions.write_predictions(path, predictions)
    except OSError as error:
        logger.error("the predictions %s cannot be written: %s", path, error)
        if final:
            job.unwritten.append(f"{path} ({error})")
    job.board.scalars({f"eval/{name}_{key}": value for key, value in report.curves(scores).items()}, step)
    if draws(job.config.run.report_to):
        try:
            _picture(job, name, predictions)
        except Exception as error:  # whatever a drawing library makes of somebody's texts
            logger.warning("the figures of %s at step %d are left out: %r", name, step, error)
    brief = ("accuracy", "ece", "rationale_bleu", "rationale_rouge_l", "faithful")
    brief += ("reason_accuracy", "reason_cut_off", "reason_tokens")
    logger.info("%s  %s", name, "  ".join(f"{key} {scores[key]:.4g}" for key in brief if key in scores))
    return scores


def _picture(job: Job, name: str, predictions: Sequence[Prediction]) -> None:
    """Report figures and samples of one task's predictions."""
    step = job.state.step
    job.board.text(f"{name}/samples", report.samples(predictions), step, markdown=True)
    figures = report.figures(predictions, f"{name}, step {step}")
    curve = report.learning_curve(job.folder / "predictions", f"{name}.jsonl", step)
    figures |= {"accuracy_by_length": curve} if curve else {}
    job.board.figures({f"{name}/{key}": figure for key, figure in figures.items()}, step)
