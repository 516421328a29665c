"""Learning from unlabelled questions, where the student's own two streams agree.

At the points `data.agree_at` of a run the student answers the questions of `data.unlabelled`
in both streams. Where its rationale implies one label and the predict stream gave that
label, question, label and rationale become a **pseudo-labelled record** of both streams.
The new records replace the earlier ones and take `data.agree_share` of every later batch
(`data/sampler.py`, `MixedSampler`). With an online teacher its terms apply to this text too.

Two streams with different errors agree where both are right more often than either is right
alone; that is all the filter knows. Hence the defaults: the student must be good before it
starts (0.4 of the run), and half of each batch stays labelled records. On the demo, an earlier start,
more pseudo-labels, and labels that nothing filters each lost accuracy.

    RUN/agree/step-STEP-DIGEST.jsonl    the records, written before training goes on

The checkpoint names the file in force, by its content. A run that is killed while it answers
has its last checkpoint at that step or before, so it answers again with the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ibdistill.config.sections import Config, DataConfig
from ibdistill.data.json_rows import field_text, read_rows
from ibdistill.data.records import Record, map_numbers
from ibdistill.data.tasks import demo
from ibdistill.data.tasks.registry import TASKS
from ibdistill.evaluation.faithfulness import agrees
from ibdistill.evaluation.predictions import Prediction
from ibdistill.training import step_files

FOLDER = "agree"


def questions(data: DataConfig, setting: str = "unlabelled") -> list[Record]:
    """The records of `data.unlabelled`, or of `data.taught`, without label and rationale; none if it is off.

    A record's `gold` is its label in the source, where there is one, to measure the labels that it gets.

    Raises:
        ValueError: several tasks; for `unlabelled` one without a rule for what a rationale implies; a
            missing or bad file; more questions than the demo has.
    """
    name, value = f"data.{setting}", getattr(data, setting)
    if value is None:
        return []
    names = [data.task] if isinstance(data.task, str) else data.task
    if len(names) > 1:
        raise ValueError(
            f"{name} goes with one task, and data.task is a mixture of {', '.join(names)}; "
            "which one its questions are of would be unknown"
        )
    task = names[0]
    ruled = [name for name, own in TASKS.items() if own.implied and name != "demo_pretrain"]
    if setting == "unlabelled" and task not in ruled:
        raise ValueError(
            f"data.unlabelled needs a rule for the label that a rationale implies, and task {task!r} has "
            f"none; tasks with one: {', '.join(ruled)}"
        )
    if (task == "demo") != isinstance(value, int):
        needs = "a number of questions to generate" if task == "demo" else "the path of a JSONL file"
        raise ValueError(f"{name} is {value!r}; for task {task!r} it is {needs}")
    if isinstance(value, int):
        try:
            return demo.unlabelled(value)
        except ValueError as error:
            raise ValueError(f"{name} is {value}: {error}") from None
    return from_file(Path(value), task, data, name)


def from_file(path: Path, task: str, data: DataConfig, name: str) -> list[Record]:
    """The questions of a JSONL file as records of a task, without label and rationale; `gold` as in
    `questions`.

    Raises ValueError, which calls the file by the name of its setting, if it is missing or bad.
    """
    if not path.is_file():
        raise ValueError(f"{name} {str(path)!r} is no file (seen from {Path.cwd()})")
    records = []
    for i, (where, row) in enumerate(read_rows(path)):
        try:
            question = field_text(row, data.question_field)
            gold = field_text(row, data.label_field) if row.get(data.label_field) is not None else ""
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{where}: no question ({type(error).__name__}: {error}); each line is an object with the "
                f"field {data.question_field!r} (data.question_field) and perhaps {data.label_field!r}"
            ) from None
        if not question.strip():
            raise ValueError(f"{where}: the question is empty")
        name_, check = f"{task}/unlabelled/{i}", data.answer_check
        records.append(Record(name_, task, question, "", "", gold=gold.strip(), answer_check=check))
    if not records:
        raise ValueError(f"{name} {str(path)!r} holds no questions")
    return [map_numbers(record) for record in records] if data.map_numbers else records


def due_steps(config: Config) -> set[int]:
    """The steps before which the unlabelled questions are answered."""
    if config.data.unlabelled is None:
        return set()
    steps = config.optim.max_steps
    return {min(round(share * steps), steps - 1) for share in config.data.agree_at}


def agreed(predictions: Sequence[Prediction]) -> list[Record]:
    """The predictions whose rationale implies exactly one label, the predicted one, as training records."""
    return [
        dataclasses.replace(p.record, label=p.label, rationale=p.rationale)
        for p in predictions
        if len(implied := p.implied) == 1 and agrees(p.label, implied, p.record)
    ]


def scalars(predictions: Sequence[Prediction], pseudo: Sequence[Record], seconds: float) -> dict[str, float]:
    """TensorBoard tag -> value. `agree/asked` and `agree/agreed` count questions, `agree/seconds` is time.

    Where there is ground truth, `agree/precision` is the share of right labels among the pseudo-labels, and
    `agree/accuracy` that among all answers, which is what training without the filter would get.
    """
    result = {"agree/asked": len(predictions), "agree/agreed": len(pseudo), "agree/seconds": seconds}
    correct = {p.record.id: p.correct for p in predictions if p.record.gold}
    kept = [correct[record.id] for record in pseudo if record.id in correct]
    if correct:
        result["agree/accuracy"] = sum(correct.values()) / len(correct)
    if kept:
        result["agree/precision"] = sum(kept) / len(kept)
    return result


def write(run: Path, step: int, pseudo: Sequence[Record]) -> str:
    """Write the records before training goes on; returns the file's name, empty without records. Raises
    OSError."""
    return step_files.write(run / FOLDER, step, map(dataclasses.asdict, pseudo)) if pseudo else ""


def read(run: Path, name: str) -> list[Record]:
    """The records of a file that `write` made. Raises ValueError if it is missing or has changed."""
    rows = step_files.read(run / FOLDER / name)
    return [Record(**row | {"quantities": tuple(row["quantities"])}) for row in rows]
