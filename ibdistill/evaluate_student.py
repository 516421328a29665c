"""Evaluate a student on a task, on one or several processes:

    python ibdistill/evaluate_student.py STUDENT --data.task svamp --data.path FOLDER ...
    deepspeed --num_gpus 2 ibdistill/evaluate_student.py STUDENT ...
    python ibdistill/evaluate_student.py --eval.predictions FILE.jsonl --data.task svamp ...

STUDENT: a folder that `train.py` exported, its run folder, or a model of the hub. Give the data
settings that it was trained with (`data.map_numbers` above all). Writes `result.json`,
`predictions.jsonl` and PNG plots to `eval.dir`. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

from ibdistill.config import fields
from ibdistill.config.evaluation_sections import StudentEvaluation
from ibdistill.config.sections import StudentConfig
from ibdistill.runtime import startup

if __name__ == "__main__":
    startup.answer_help(lambda: f"{__doc__}{fields.describe(StudentEvaluation)}")

import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ibdistill.config import command_line
from ibdistill.data import loading
from ibdistill.data.records import STREAMS, Record
from ibdistill.data.tokenizers import load_tokenizer
from ibdistill.evaluation import calibration, report, text_scores
from ibdistill.evaluation import predictions as evaluation_predictions
from ibdistill.evaluation.predictions import Prediction
from ibdistill.models import presets
from ibdistill.models.student import load_student
from ibdistill.runtime import distributed, files
from ibdistill.runtime.distributed import World
from ibdistill.runtime.version import version
from ibdistill.training.checkpoint import MARKER

logger = logging.getLogger("ibdistill")


def main() -> None:
    """Evaluate the student of the command line."""
    world = distributed.init()
    with distributed.user_errors():
        given = command_line.parse(sys.argv[1:])
        evaluate = prepare(given.first, fields.from_flat(StudentEvaluation, given.settings), world)
    evaluate()
    dist.destroy_process_group()


def prepare(student: str | None, config: StudentEvaluation, world: World) -> Callable[[], dict[str, Any]]:
    """Load all that is needed; what is returned decodes, scores, writes, and gives `result.json`'s content.

    Both are collective. Raises ValueError for what the user can mend.
    """
    start, task, eval_ = time.perf_counter(), config.data.task, config.eval
    if not isinstance(task, str):
        raise ValueError(f"data.task is {task}; evaluate one task at a time")
    if (student is None) == (not eval_.predictions):
        raise ValueError(
            "give either a STUDENT (an exported folder, a run folder, a hub name) or --eval.predictions"
        )
    folder = Path(eval_.dir or Path("evaluation") / f"{_name(student or eval_.predictions)}-{task}")
    encoder = text_scores.load_encoder(eval_.embedding_model) if eval_.embedding_model else None
    records = getattr(loading.load(config.data, needs_rationale=False), eval_.split)[task]
    if student is None:
        answer = list(evaluation_predictions.read_predictions(Path(eval_.predictions), records)).copy
    else:
        answer = _decoder(student, records[: eval_.limit or None], config, world)

    def write(predictions: list[Prediction]) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        result = {
            "student": student,
            "predictions": eval_.predictions or None,
            "task": task,
            "split": eval_.split,
            "records": len(predictions),
            "ranks": world.size,
            **version(),
            "calibration_bins": calibration.BINS,
            "scores": evaluation_predictions.scores(predictions, encoder),
            "seconds": round(time.perf_counter() - start, 1),
        }
        evaluation_predictions.write_predictions(folder / "predictions.jsonl", predictions)
        for name, figure in report.figures(predictions, folder.name).items():
            figure.savefig(folder / f"{name}.png", dpi=120)
        files.write_json(folder / "result.json", result)
        return result

    def evaluate() -> dict[str, Any]:
        predictions = answer()
        result = distributed.run_on_rank_0(lambda: write(predictions))
        for name, value in result["scores"].items():
            logger.info("%-24s %.4g", name, value)
        logger.info("%d %s records of %s: %s", len(predictions), eval_.split, task, folder / "result.json")
        return result

    return evaluate


def _name(source: str) -> str:
    path = Path(source)
    return path.parent.name if path.name == "student" else path.stem


def _decoder(
    student: str, records: list[Record], config: StudentEvaluation, world: World
) -> Callable[[], list[Prediction]]:
    """Load the student; what is returned lets it answer."""
    if student in presets.PRESETS:
        raise ValueError(f"{student!r} is a preset, whose weights are random; give a trained student")
    path = Path(student)
    if (path / MARKER).is_file():
        raise ValueError(
            f"{student!r} is a checkpoint for resuming a run; give RUN/student, which a finished run exports"
        )
    if (path / "config.yaml").is_file():
        path = path / "student"
        if not path.is_dir():
            raise ValueError(
                f"{student!r} is a run without a student: it is not finished, or run.export is off"
            )
    source = str(path) if path.is_dir() else student
    tokenizer = load_tokenizer(source, "STUDENT")
    model = load_student(StudentConfig(model=source), tokenizer, seed=0).eval().to(world.device)
    streams = STREAMS if config.eval.rationales else STREAMS[:1]
    return partial(
        evaluation_predictions.evaluate,
        model,
        tokenizer,
        records,
        streams,
        config.data,
        world,
        config.eval.batch_size,
    )


if __name__ == "__main__":
    main()
