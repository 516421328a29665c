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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np

from ibdistill.config.sections import DataConfig
from ibdistill.data.lazy import Mapped, chained, taken
from ibdistill.data.records import Record, map_numbers
from ibdistill.data.tasks.base import Example, Task, hold_out, warn_of_shared
from ibdistill.data.tasks.conversations import Spread, spread
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
    """`streamed`, with all records in memory."""
    found = streamed(data, needs_rationale=needs_rationale)
    valid, test = ({task: list(own) for task, own in part.items()} for part in (found.valid, found.test))
    return replace(found, train=list(found.train), valid=valid, test=test)


def streamed(data: DataConfig, *, needs_rationale: bool) -> Loaded:
    """Every task of `data.task`, read once to check it; `needs_rationale` is whether rationales are trained.

    Records are made from their sources each time they are asked for, fastest in their order. Of each there
    are some ten numbers in memory, and no text.

    Raises:
        ValueError: bad settings or bad data; the message names the setting or the file and line.
    """
    tasks = checked_tasks(data)
    loaded, parts = Loaded((), {}, {}, {}), []
    for task in tasks:
        counts: Counter[str] = Counter()
        train, valid, test = _load_task(task, data, needs_rationale, counts)
        parts.append(train)
        loaded.valid[task.name], loaded.test[task.name] = valid, test
        for split, part in (("train", train), ("valid", valid), ("test", test)):
            counts[f"{split}/records"] = len(part)
            if (task.arithmetic or task.answer_check) and split != "train" and not task.generated:
                counts[f"{split}/unscorable"] = sum(not task.is_correct(r.gold, r) for r in part)
        found = {f"{task.name}/{what}": n for what, n in counts.items() if n or what.endswith("/records")}
        loaded.report.update(found)
        logger.info("data: %s", ", ".join(f"{what} {n}" for what, n in found.items()))
    return replace(loaded, train=chained(parts))


def checked_tasks(data: DataConfig) -> list[Task]:
    """The tasks of data.task; reads no file. Raises ValueError for settings of data that they lack."""
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
) -> tuple[Sequence[Record], Sequence[Record], Sequence[Record]]:
    """One task's training (subsampled), validation and test records."""
    splits = task.read(task.name, data, needs_rationale=needs_rationale)
    wants_llm = data.label_source == "llm"
    resolved, facts = {}, {}
    for split, examples in splits.items():
        resolved[split] = Mapped(partial(_resolve, task), examples)
        found = _facts(task, split, resolved[split], data, needs_rationale, counts)
        facts[split] = np.fromiter(found, _FACTS, len(examples))
        if (wants_llm or needs_rationale) and 0 < counts[f"{split}/unparsable"] == len(examples):
            raise ValueError(
                f"none of the {len(examples)} LLM outputs for the {split} split of task {task.name!r} has a "
                f"rationale and an answer; the first is {(examples[0].llm or '')[:200]!r}. "
                "Are these this task's files?"
            )
    _refuse_empty(task, splits)
    if wants_llm and (task.parse_llm is None or splits["train"][0].llm is None):
        raise ValueError(
            f"data.label_source is 'llm', but task {task.name!r} has no LLM outputs here; set data.path to "
            "the folder of the DSS data release, or data.label_source to 'gt'"
        )
    train = np.arange(len(facts["train"]))
    if "valid" not in resolved:
        has_label = facts["train"]["labelled"]
        labelled, held = (np.array(part, int) for part in hold_out(train[has_label], data.valid_share))
        resolved["valid"], facts["valid"] = taken(resolved["train"], held), facts["train"][held]
        train = np.concatenate([labelled, train[~has_label]])
    # Only demo_pretrain has no test split: a stand-in for pretraining is no benchmark.
    resolved.setdefault("test", resolved["valid"])
    own = facts["train"][train]
    for split in (name for name in facts if name != "train"):
        warn_of_shared(f"{task.name}/{split}", facts[split]["hash"], own["hash"])
    order = np.random.RandomState(data.subsample_seed).permutation(len(train))
    predict_only = data.missing_rationales == "predict_only"
    if needs_rationale:
        missing = train[own["parsed"] & ~own["explained"]]
        first = resolved["train"][missing[0]].where if len(missing) else ""
        _refuse_missing_rationales(task, predict_only, first, len(missing), len(train))
    trainable = _trainable(own, wants_llm, needs_rationale, predict_only, counts)
    kept = order[trainable[order]]
    _refuse_empty(task, {**resolved, "train": kept})
    kept = np.sort(kept[: _sample_size(task, data.subsample, len(kept))])
    of_item = _with_llm_label if wants_llm else attrgetter("record")
    chosen = Mapped(of_item, taken(resolved["train"], train[kept]))
    if len(records := Spread(chosen, own["records"][kept], data, needs_rationale)) > len(kept):
        counts["train/questions"] = len(kept)
    finished = partial(_finished, task, data)
    return (
        Mapped(partial(finished, is_train=True), records),
        *(Mapped(lambda item: finished(item.record), resolved[split]) for split in ("valid", "test")),
    )


def _finished(task: Task, data: DataConfig, record: Record, *, is_train: bool = False) -> Record:
    """The record with the numbers and letters that `data` asks for."""
    if data.map_numbers and not record.quantities:
        record = map_numbers(record)
    if is_train and data.choice_labels == "letter":
        record = replace(record, label=task.letter_of(record.label, record))
    return record


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A record with the rationale to train on, and the LLM's label for it."""

    record: Record
    where: str
    label: str
    """The LLM's label; empty without LLM outputs."""
    parsed: bool
    """False where the LLM's text has no label and rationale."""
    has_llm: bool


def _with_llm_label(item: _Resolved) -> Record:
    return replace(item.record, label=item.label)


def _resolve(task: Task, example: Example) -> _Resolved:
    """Parses the LLM's output, which replaces the source's own rationale."""
    if task.parse_llm is None or example.llm is None:
        return _Resolved(example.record, example.where, "", True, False)
    parts = task.parse_llm(example.llm)
    rationale, label = parts or ("", "")
    return _Resolved(
        replace(example.record, rationale=rationale), example.where, label, parts is not None, True
    )


_FACTS = [("labelled", bool), ("parsed", bool), ("explained", bool)]
_FACTS += [("records", np.int64), ("hash", np.int64)]
"""What decides which records are trained: whether there is a label, an LLM's output with its parts, and a
rationale, and how many training records it becomes; and a hash of the conversation up to its answer."""


def _facts(
    task: Task,
    split: str,
    items: Sequence[_Resolved],
    data: DataConfig,
    needs_rationale: bool,
    counts: Counter[str],
) -> Iterator[tuple[bool, bool, bool, int, int]]:
    """`_FACTS` of each item, all of which are read here; what LLMs wrote is counted."""
    for item in items:
        record = item.record
        if item.has_llm:
            counts[f"{split}/unparsable"] += not item.parsed
            counts[f"{split}/llm_correct"] += item.parsed and task.is_correct(item.label, record)
        number = sum(1 for _ in spread(record, data, needs_rationale=needs_rationale))
        asked = hash((record.history, record.question))
        yield bool(record.label), item.parsed, bool(record.rationale), number, asked


def _trainable(
    facts: np.ndarray, wants_llm: bool, needs_rationale: bool, predict_only: bool, counts: Counter[str]
) -> np.ndarray:
    """Which records to train on, [records] bool. Those without a target for a stream that is trained are
    counted; with `predict_only` they may train the predict stream alone."""
    dropped = ~facts["parsed"] & (wants_llm or (needs_rationale and not predict_only))
    unexplained = ~dropped & ~facts["explained"] & needs_rationale
    counts["train/dropped"] += int(dropped.sum())
    counts["train/no_rationale"] += int(unexplained.sum())
    return ~dropped & (predict_only | ~unexplained)


def _refuse_missing_rationales(task: Task, predict_only: bool, first: str, missing: int, total: int) -> None:
    """Raise ValueError if records lack a rationale, unless task or user allows that for some of them.
    `first`: the place of the first one."""
    all_missing = missing == total
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
        f"{first}: no rationale, and the method trains on rationales; {missing} of "
        f"{total} training records of task {task.name!r} lack one. Ways out: "
        + "; ".join(way for way, is_open in ways.items() if is_open)
    )


def _refuse_empty(task: Task, splits: Mapping[str, Collection]) -> None:
    for split, part in splits.items():
        if not len(part):
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
