"""From the settings of a run to its records: every task of `data.task` read, split, checked and sub-sampled.

What is held fixed, so that figures can be compared:

- the validation split of a task that has none is the same for every seed and subsample (and,
  for a tenth of the records, the same as the DSS release's, see `tasks.base.hold_out`);
- subsamples of one seed are nested, so the points of a data-efficiency curve share records;
- validation and test records keep the ground truth, whatever the training labels are.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ibdistill.config.sections import DataConfig
from ibdistill.data.records import Record, map_numbers
from ibdistill.data.tasks.base import Example, Task, hold_out
from ibdistill.data.tasks.conversations import spread
from ibdistill.data.tasks.registry import TASKS

logger = logging.getLogger("ibdistill")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The records of a run."""

    train: Sequence[Record]
    """The training records of all tasks, one task after the other."""
    valid: dict[str, Sequence[Record]]
    test: dict[str, Sequence[Record]]
    report: dict[str, int]
    """`TASK/SPLIT/WHAT` -> how many. WHAT is records, questions (if training records are several turns or
    rationales of one), unparsable (LLM outputs), dropped, no_rationale
    (left out, or with `data.missing_rationales` predict_only trained on their labels alone),
    llm_correct (LLM labels that equal the ground truth) or unscorable (ground truths that no answer can
    equal, as they have no value)."""
    content: str = ""
    """Of records in a table (`stored_records`): a name for their content."""


def load(data: DataConfig, *, needs_rationale: bool) -> Loaded:
    """Reads every task of `data.task`; `needs_rationale` is whether rationales are trained.

    Raises:
        ValueError: bad settings or bad data; the message names the setting or the file and line.
    """
    tasks = _checked_tasks(data)
    loaded = Loaded([], {}, {}, {})
    for task in tasks:
        counts: Counter[str] = Counter()
        train, valid, test = _load_task(task, data, needs_rationale, counts)
        questions = len(train)
        train = [one for r in train for one in spread(r, data, needs_rationale=needs_rationale)]
        if len(train) > questions:
            counts["train/questions"] = questions
        if data.map_numbers:
            train, valid, test = (
                [r if r.quantities else map_numbers(r) for r in part] for part in (train, valid, test)
            )
        if data.choice_labels == "letter":
            train = [replace(record, label=task.letter_of(record.label, record)) for record in train]
        loaded.train.extend(train)
        loaded.valid[task.name], loaded.test[task.name] = valid, test
        for split, part in (("train", train), ("valid", valid), ("test", test)):
            counts[f"{split}/records"] = len(part)
            if (task.arithmetic or task.answer_check) and split != "train" and not task.generated:
                counts[f"{split}/unscorable"] = sum(not task.is_correct(r.gold, r) for r in part)
        found = {f"{task.name}/{what}": n for what, n in counts.items() if n or what.endswith("/records")}
        loaded.report.update(found)
        logger.info("data: %s", ", ".join(f"{what} {n}" for what, n in found.items()))
    return loaded


def _checked_tasks(data: DataConfig) -> list[Task]:
    names = [data.task] if isinstance(data.task, str) else list(data.task)
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(str(name), TASKS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"data.task {name!r} is unknown: choose from {', '.join(TASKS)}{hint}")
    tasks = [TASKS[name] for name in names]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"data.task is {names}: name at least one task, and each only once")
    weights = data.mixture_weights
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"data.mixture_weights is {weights}: give one positive number for each of the "
            f"{len(names)} tasks of data.task ({', '.join(names)}), or leave it out"
        )
    if data.map_numbers and (others := [task.name for task in tasks if not task.arithmetic]):
        raise ValueError(
            f"data.map_numbers is for arithmetic tasks ({_those_with('arithmetic')}), not "
            f"{', '.join(others)}: turn it off"
        )
    if data.derive_rationales and not all(task.derives_rationales for task in tasks):
        raise ValueError(
            f"data.derive_rationales is for task {_those_with('derives_rationales')}, not "
            f"{', '.join(names)}: turn it off"
        )
    if data.choice_labels == "letter" and not all(task.letter_of for task in tasks):
        raise ValueError(
            f"data.choice_labels is 'letter', which is for tasks of options ({_those_with('letter_of')}), "
            f"not {', '.join(names)}; leave it at text"
        )
    if data.answer_check != "text" and not any(task.answer_check for task in tasks):
        raise ValueError(
            f"data.answer_check is {data.answer_check!r}, which is for task {_those_with('answer_check')}; "
            f"{', '.join(names)} has its own rule for answers: leave it at text"
        )
    if data.path is not None and all(task.generated for task in tasks):
        raise ValueError(f"data.path {data.path!r}: {', '.join(names)} is generated; leave data.path empty")
    return tasks


def _those_with(attribute: str) -> str:
    """The names of the tasks that have an optional part of `Task`, for messages."""
    return ", ".join(task.name for task in TASKS.values() if getattr(task, attribute))


def _load_task(
    task: Task, data: DataConfig, needs_rationale: bool, counts: Counter[str]
) -> tuple[list[Record], list[Record], list[Record]]:
    """One task's training (subsampled), validation and test records."""
    splits = task.read(task.name, data, needs_rationale=needs_rationale)
    _refuse_empty(task, splits)
    wants_llm = data.label_source == "llm"
    if wants_llm and (task.parse_llm is None or splits["train"][0].llm is None):
        raise ValueError(
            f"data.label_source is 'llm', but task {task.name!r} has no LLM outputs here; set data.path to "
            "the folder of the DSS data release, or data.label_source to 'gt'"
        )
    resolved = {
        split: _resolve(task, split, examples, wants_llm or needs_rationale, counts)
        for split, examples in splits.items()
    }
    if "valid" not in resolved:
        labelled = [item for item in resolved["train"] if item.record.label]
        unlabelled = [item for item in resolved["train"] if not item.record.label]
        labelled, resolved["valid"] = hold_out(labelled, data.valid_share)
        resolved["train"] = labelled + unlabelled
    # Only demo_pretrain has no test split: a stand-in for pretraining is no benchmark.
    resolved.setdefault("test", resolved["valid"])
    train = resolved["train"]
    order = np.random.RandomState(data.subsample_seed).permutation(len(train))
    predict_only = data.missing_rationales == "predict_only"
    if needs_rationale:
        _refuse_missing_rationales(task, predict_only, train)
    trainable = [_trainable(item, wants_llm, needs_rationale, predict_only, counts) for item in train]
    kept = [i for i in order if trainable[i]]
    _refuse_empty(task, {**resolved, "train": kept})
    kept = sorted(kept[: _sample_size(task, data.subsample, len(kept))])
    labels = [(train[i].record, train[i].label) for i in kept]
    records = [replace(record, label=label) if wants_llm else record for record, label in labels]
    return records, *([item.record for item in resolved[split]] for split in ("valid", "test"))


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A record with the rationale to train on, and the LLM's label for it."""

    record: Record
    where: str
    label: str
    """The LLM's label; empty without LLM outputs."""
    parsed: bool
    """False where the LLM's text has no label and rationale."""


def _resolve(
    task: Task, split: str, examples: list[Example], needed: bool, counts: Counter[str]
) -> list[_Resolved]:
    """Parses the LLM's outputs, which replace the source's own rationales."""
    if task.parse_llm is None or examples[0].llm is None:
        return [_Resolved(example.record, example.where, "", True) for example in examples]
    resolved = []
    for example in examples:
        parts = task.parse_llm(example.llm or "")
        rationale, label = parts or ("", "")
        record = replace(example.record, rationale=rationale)
        resolved.append(_Resolved(record, example.where, label, parts is not None))
        counts[f"{split}/unparsable"] += parts is None
        counts[f"{split}/llm_correct"] += parts is not None and task.is_correct(label, record)
    if needed and counts[f"{split}/unparsable"] == len(examples):
        raise ValueError(
            f"none of the {len(examples)} LLM outputs for the {split} split of task {task.name!r} has a "
            f"rationale and an answer; the first is {(examples[0].llm or '')[:200]!r}. "
            "Are these this task's files?"
        )
    return resolved


def _trainable(
    item: _Resolved, wants_llm: bool, needs_rationale: bool, predict_only: bool, counts: Counter[str]
) -> bool:
    """Whether to train on the record. One without a target for a stream that is trained is counted; with
    `predict_only` it may train the predict stream alone."""
    if not item.parsed and (wants_llm or (needs_rationale and not predict_only)):
        counts["train/dropped"] += 1
        return False
    if item.record.rationale or not needs_rationale:
        return True
    counts["train/no_rationale"] += 1
    return predict_only


def _refuse_missing_rationales(task: Task, predict_only: bool, train: Sequence[_Resolved]) -> None:
    """Raise ValueError if records lack a rationale, unless task or user allows that for some of them."""
    missing = [item for item in train if item.parsed and not item.record.rationale]
    all_missing = len(missing) == len(train)
    if not missing or (not all_missing and (predict_only or task.partial_rationales)):
        return
    ways = {
        "--data.missing_rationales predict_only (they train on their labels alone, with a method "
        "that has a predict stream)": not all_missing,
        "--teacher.rationales missing (a teacher writes them)": True,
        "--data.derive_rationales true (they are made from the equations)": task.derives_rationales,
        "--objective.method finetune (no record needs one)": True,
        "data.path with rationales (the DSS data release, or your own with --data.task jsonl)": True,
    }
    raise ValueError(
        f"{missing[0].where}: no rationale, and the method trains on rationales; {len(missing)} of "
        f"{len(train)} training records of task {task.name!r} lack one. Ways out: "
        + "; ".join(way for way, is_open in ways.items() if is_open)
    )


def _refuse_empty(task: Task, splits: Mapping[str, list]) -> None:
    for split, part in splits.items():
        if not part:
            raise ValueError(
                f"task {task.name!r} has no {split} records left; give it more, or change data.valid_share"
            )


def _sample_size(task: Task, subsample: float, available: int) -> int:
    size = round(subsample * available) if subsample <= 1 else int(subsample)
    if not 1 <= size <= available:
        raise ValueError(
            f"data.subsample {subsample} asks for {size} of the {available} training records of task "
            f"{task.name!r}; it must leave 1 to {available}"
        )
    return size
