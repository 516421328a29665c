"""Evaluate a student on a task, on one or several processes:

    python ibdistill/evaluate_student.py STUDENT --data.task svamp --data.path FOLDER ...
    deepspeed --num_gpus 2 ibdistill/evaluate_student.py STUDENT ...
    python ibdistill/evaluate_student.py --eval.predictions FILE.jsonl --data.task svamp ...

STUDENT: a run folder, the student that `train.py` exported to it, or any other folder or model of
the hub. Where the command line gives no others, the data settings are those of the run, or of an
exported student's `prompt.json`. Of other models give those that they were trained with.
`--eval.questions FILE.jsonl` answers questions that need no labels, `--eval.samples N` also draws answers.
Writes `result.json`, `predictions.jsonl`, `samples.jsonl` and PNG plots to `eval.dir`. Exit codes: 0 done,
2 bad input.
"""

from __future__ import annotations

from ibdistill.config import fields
from ibdistill.config.evaluation_sections import EvaluationConfig, StudentEvaluation
from ibdistill.config.sections import StudentConfig
from ibdistill.runtime import startup

if __name__ == "__main__":
    startup.answer_help(lambda: f"{__doc__}{fields.describe(StudentEvaluation)}")

import difflib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ibdistill.config import command_line
from ibdistill.config.load import read_yaml
from ibdistill.config.methods import METHODS
from ibdistill.data import loading
from ibdistill.data.chat import adopt_turn_end
from ibdistill.data.records import STREAMS, Record, with_numbers
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.text_checks import check_split
from ibdistill.data.tokenizers import load_tokenizer
from ibdistill.evaluation import calibration, math_equal, report, sampled, text_scores, vllm_engine
from ibdistill.evaluation import predictions as evaluation_predictions
from ibdistill.evaluation.predictions import Prediction
from ibdistill.evaluation.sampled import Samples
from ibdistill.models import decoding, families
from ibdistill.models.prompt import FILE as PROMPT
from ibdistill.models.prompt import Prompt
from ibdistill.models.student import load_student
from ibdistill.runtime import distributed, files
from ibdistill.runtime.distributed import World
from ibdistill.runtime.version import version
from ibdistill.training import pseudo_labels, run_folder

logger = logging.getLogger("ibdistill")

_OF_TRAINING = {
    f"data.{name}"
    for name in (
        *("subsample", "subsample_seed", "mixture_weights", "mixture_temperature", "bucket_batches"),
        *("unlabelled", "agree_at", "agree_share", "taught", "choice_labels"),
        "loss_on",
    )
}
"""Settings of a run that say nothing of how a student is asked."""


def main() -> None:
    """Evaluate the student of the command line."""
    world = distributed.init()
    with distributed.user_errors():
        given = command_line.parse(sys.argv[1:])
        settings = with_run(given.first, given.settings)
        evaluate = prepare(given.first, fields.from_flat(StudentEvaluation, settings), world)
    evaluate()
    dist.destroy_process_group()


def with_run(student: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings, and those of the run that the student or the file of predictions is of.

    What is given wins, and a warning says where it differs from the run. Without a run folder around it, a
    student's settings are those of its prompt. Raises ValueError if these files cannot be read.
    """
    path = _run_settings(student or given.get("eval.predictions"))
    if path is None and student and (Path(student) / PROMPT).is_file():
        return Prompt.read(Path(student)).evaluation_settings() | given
    if path is None:
        return dict(given)
    known = fields.to_flat(StudentEvaluation())
    of_run = _read_run(path)
    settings = {name: value for name, value in of_run.items() if name in known and name not in _OF_TRAINING}
    method = METHODS.get(of_run.get("objective.method"))
    if method and "explain" not in method.streams:
        settings["eval.rationales"] = False
    if method and "reason" in method.streams:
        settings["eval.reason"] = "also" if "predict" in method.streams else "only"
    tasks = settings.get("data.task", [])
    if given.get("data.task", tasks) not in (tasks, *([tasks] if isinstance(tasks, str) else tasks)):
        settings.pop("data.path", None)  # it holds the data of the run's tasks
    ours, theirs = (
        fields.to_flat(fields.from_flat(StudentEvaluation, values)) for values in (given, settings)
    )
    taken = [name for name in settings if name not in given and theirs[name] != known[name]]
    shown = [f"{name} {fields.shown(theirs[name])}" for name in taken]
    logger.info("from %s: %s", path, ", ".join(shown) or "nothing but defaults")
    for name in settings:
        if name in given and ours[name] != theirs[name]:
            values = fields.shown(ours[name]), fields.shown(theirs[name])
            logger.warning("%s is %s as given, and was %s in %s", name, *values, path)
    return settings | given


def _run_settings(source: str | bool | None) -> Path | None:
    """The `config.yaml` of the run that a student or a file of predictions is of; None if there is none."""
    if not isinstance(source, str):
        return None
    path = Path(source)
    folders = [path]
    if path.name == "student":
        folders.append(path.parent)
    if path.parent.parent.name == "predictions":
        folders.append(path.parent.parent.parent)
    return next((file for folder in folders if (file := folder / "config.yaml").is_file()), None)


def _read_run(path: Path) -> dict[str, Any]:
    """`section.field` -> value of a run's `config.yaml`. Raises ValueError."""
    try:
        content = read_yaml(path.read_bytes()) or {}
        return {f"{section}.{name}": value for section, own in content.items() for name, value in own.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as the settings of a run ({error}); mend it, or copy the student to "
            "another folder and give the data settings"
        ) from error


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
    sampled.check(student is not None, eval_)
    if eval_.math_verify:
        math_equal.check_installed()
    folder = Path(eval_.dir or Path("evaluation") / f"{_name(student or eval_.predictions)}-{task}")
    distributed.run_on_rank_0(lambda: files.check_can_hold(folder, "eval.dir", str(folder)))
    encoder = text_scores.load_encoder(eval_.embedding_model) if eval_.embedding_model else None
    if eval_.questions:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"data.task {task!r} is unknown: choose from {', '.join(TASKS)}{hint}")
        records = pseudo_labels.from_file(Path(eval_.questions), task, config.data, "eval.questions")
    else:
        records = getattr(loading.load(config.data, needs_rationale=False), eval_.split)[task]
    if student is None:
        read = list(evaluation_predictions.read_predictions(Path(eval_.predictions), records))
        answer = partial(tuple, (read[: eval_.limit or None], {}))
    else:
        answer = _decoder(student, records[: eval_.limit or None], config, world)

    def write(predictions: list[Prediction], samples: dict[str, Samples]) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        labelled = [p for p in predictions if p.record.gold]
        result = {
            "student": student,
            "predictions": eval_.predictions or None,
            "task": task,
            "split": eval_.questions or eval_.split,
            "records": len(predictions),
            "scored": len(labelled),
            "ranks": world.size,
            **version(),
            "calibration_bins": calibration.BINS,
            "scores": scores(labelled, encoder, eval_) if labelled else {},
            **sampled.results(samples, [p.record for p in predictions], eval_, folder),
            "seconds": round(time.perf_counter() - start, 1),
        }
        # of a question without a label nobody knows whether the answer is right
        rows = [p if p.record.gold else replace(p, correct=None) for p in predictions]
        evaluation_predictions.write_predictions(folder / "predictions.jsonl", rows)
        files.write_json(folder / "result.json", result)
        for name, figure in report.figures(labelled, folder.name).items() if labelled else ():
            try:
                figure.savefig(folder / f"{name}.png", dpi=120)
            except Exception as error:
                logger.warning("%s is left out: %r", folder / f"{name}.png", error)
        return result

    def evaluate() -> dict[str, Any]:
        predictions, samples = answer()
        result = distributed.run_on_rank_0(lambda: write(predictions, samples))
        sampled_scores = [own for stream in result.get("sampled", {}).values() for own in stream.items()]
        for name, value in [*result["scores"].items(), *sampled_scores]:
            logger.info("%-24s %.4g", name, value)
        source = fields.shown(eval_.questions) if eval_.questions else eval_.split
        logger.info("%d %s records of %s: %s", len(predictions), source, task, folder / "result.json")
        return result

    return evaluate


def scores(
    labelled: list[Prediction], encoder: text_scores.Encoder, config: EvaluationConfig
) -> dict[str, float]:
    """All scores of predictions that have a gold label."""
    found = evaluation_predictions.scores(labelled, encoder)
    if config.math_verify:
        texts = [(p.label, p.record.gold, p.record.quantities) for p in labelled]
        pairs = [tuple(with_numbers(text, numbers) for text in pair) for *pair, numbers in texts]
        same = math_equal.equal(pairs)
        found["accuracy_math_verify"] = sum(same) / len(same)
    return found


def _name(source: str) -> str:
    path = Path(source)
    return path.parent.name if path.name == "student" else path.stem


def _decoder(
    student: str, records: list[Record], config: StudentEvaluation, world: World
) -> Callable[[], tuple[list[Prediction], dict[str, Samples]]]:
    """Load the student; what is returned lets it answer, greedily and in samples by stream."""
    eval_ = config.eval
    source = run_folder.student_folder(student)
    tokenizer = load_tokenizer(source, "STUDENT")
    streams = STREAMS if eval_.rationales else STREAMS[:1]
    streams = {"no": streams, "only": ("reason",), "also": (*streams, "reason")}[eval_.reason]
    if config.data.format == "chat":
        adopt_turn_end(tokenizer, config.data, streams)
    counted = ("predict", *(stream for stream in streams if stream == "explain"))
    check_split("evaluation", records, tokenizer, config.data, streams=counted)
    if eval_.engine == "vllm":
        model = families.load_config(source, "STUDENT")
        decoder = vllm_engine.Engine(source, model, world).decode
    else:
        model = load_student(StudentConfig(model=source), tokenizer, seed=0).eval().to(world.device)
        decoder = partial(decoding.decode, cache=_cache(model, eval_.cache, world))

    def answer() -> tuple[list[Prediction], dict[str, Samples]]:
        given = records, streams, config.data, world, eval_.batch_size, decoder
        predictions = evaluation_predictions.evaluate(model, tokenizer, *given)
        drawn = [stream for stream in streams if stream != "explain"] if eval_.samples else []
        return predictions, {
            stream: sampled.sample(model, tokenizer, records, stream, config.data, eval_, world, decoder)
            for stream in drawn
        }

    return answer


def _cache(model: nn.Module, wanted: str, world: World) -> str:
    """The cache of `decoding.decode` for `eval.cache`. Raises ValueError if the model cannot have it."""
    possible = getattr(model, "_can_compile_fullgraph", False)
    if wanted in ("static", "compiled") and not possible:
        raise ValueError(
            f"eval.cache is {wanted!r}, which a {model.config.model_type!r} model cannot use; take dynamic"
        )
    if wanted == "auto":
        return "static" if possible and world.device.type == "cuda" else "dynamic"
    return wanted


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        distributed.exit_at_once(end.code)
