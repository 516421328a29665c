"""What a task is, and what the readers of data sets share.

A **task** is one data set as the rest of the system sees it: how its records are read, how an LLM's text
about a question is parsed, when an answer is right, what a rationale implies. Each is a value in a file
of its own beside this one, and one entry of `registry.TASKS`.

A **reader** returns `{split: examples}`, always with `train`, and with `valid` and `test` where the
source has them. `loading.streamed` turns examples into the records of a run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ibdistill.data.json_rows import Row
from ibdistill.data.lazy import Mapped, taken
from ibdistill.data.records import Record

logger = logging.getLogger("ibdistill")

T = TypeVar("T")
PREFIXES = {"predict": "predict: ", "explain": "explain: ", "reason": "reason: "}
Fields = Callable[[dict[str, Any]], tuple[str, str, str]]
"""Row -> question, label, rationale. A KeyError or ValueError becomes a message with the row's place."""
_TEST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Example:
    """A record as its source has it, not yet with an LLM's label or rationale."""

    record: Record
    where: str
    """`FILE:LINE` or the like, for messages."""
    llm: str | None = None
    """What the LLM wrote about this question; None where the source has no LLM outputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One data set. Functions that take a prediction or an LLM's text never raise."""

    name: str
    """What `data.task` says; also the first part of every record's id."""
    read: Callable[..., dict[str, Sequence[Example]]]
    """(name, data: DataConfig, *, needs_rationale: bool) -> the splits. `jsonl.read_jsonl` reads the user's
    own files, `published.Published` the places where public data sets are found. Raises ValueError."""
    is_correct: Callable[[str, Record], bool]
    """(prediction, record) -> whether it answers the record."""
    is_strict: Callable[[str, Record], bool] | None = None
    """The official rule of the data set, for `accuracy_strict`. None: `is_correct`."""
    is_lenient: Callable[[str, Record], bool] | None = None
    """A rule that accepts more than the other two, for `accuracy_lenient`, which counts what any of them
    accepts. None: there is no such rule."""
    parse_llm: Callable[[str], tuple[str, str] | None] | None = None
    """LLM text -> (rationale, label), or None if it has no such parts. None: no LLM text for this task."""
    implied: Callable[[str, Record], list[str]] | None = None
    """(rationale, record) -> the labels that the rationale implies, none, one or several. None: the task
    has no such rule, so that the two streams cannot be compared."""
    choices: Callable[[Record], Sequence[str]] | None = None
    """The labels that an answer is chosen from. None: any label that `is_correct` finds equal to itself."""
    letter_of: Callable[[str, Record], str] | None = None
    """(label, record) -> the letter of the option with this text, for `data.choice_labels`. None: the
    questions list no options under letters."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """Stream -> what precedes the question; streams that are left out have those of `PREFIXES`."""
    answer_marker: str = "The answer is:"
    """What stands between rationale and answer in the stream `reason`; in words, apart from white space."""
    arithmetic: bool = False
    """Labels are numbers or equations, so that numbers may be mapped (`data.map_numbers`)."""
    generated: bool = False
    """The records are made here: the task takes no `data.path`."""
    answer_check: bool = False
    """`data.answer_check` chooses the rule for answers."""
    partial_rationales: bool = False
    """The source explains some records only; the others are left out where rationales are needed."""
    derives_rationales: bool = False
    """Rationales can be made from other fields of the source (`data.derive_rationales`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", PREFIXES | dict(self.prefixes))


def examples(
    task: str,
    fields: Fields,
    splits: Mapping[str, Sequence[Row]],
    unlabelled: Collection[str] = (),
    completed: Callable[[Record, dict[str, Any]], Record] = lambda record, row: record,
) -> dict[str, Sequence[Example]]:
    """Rows to examples, which are made each time they are asked for. A tenth of `train` becomes the test
    split where the source has none. Records of the splits in `unlabelled` may lack a label. `completed` adds
    to a record what else its row says.

    Raises ValueError for an empty split; examples raise it for a row without a question or label, with the
    row's place.
    """
    made: dict[str, Sequence[Example]] = {}
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(f"the {split} split of task {task!r} is empty; give a file with records")
        make = partial(_example, task, split, rows, fields, split in unlabelled, completed)
        made[split] = Mapped(make, range(len(rows)))
    if "test" not in made:
        made["train"], made["test"] = hold_out(made["train"], _TEST_SHARE)
    return made


def hold_out(items: Sequence[T], share: float) -> tuple[Sequence[T], Sequence[T]]:
    """Splits off `share` of the items (rounded up), the same ones every time.

    They are those of `datasets.Dataset.train_test_split(seed=0)`, with which the "Distilling Step-by-Step!"
    release splits off its validation records; both parts stay in the order of the items.
    """
    order = np.random.default_rng(0).permutation(len(items))
    held = int(np.ceil(share * len(items)))
    return taken(items, np.sort(order[held:])), taken(items, np.sort(order[:held]))


def warn_of_shared(split: str, asked: np.ndarray, trained: np.ndarray) -> None:
    """Say how many questions of a split, by their hashes, are training questions too."""
    if shared := int(np.isin(asked, trained).sum()):
        logger.warning(
            "%s: %d of %d questions stand in the training records too, so their scores say little about new "
            "ones; where a question has several lines, give its texts as one record's `rationales`, or the "
            "splits as files of their own",
            *(split, shared, len(asked)),
        )


def check_exists(path: Path) -> None:
    """Raises ValueError if `path`, the value of `data.path`, is neither a file nor a folder."""
    if not path.exists():
        raise ValueError(f"data.path {str(path)!r} does not exist (seen from {Path.cwd()})")


def _example(
    task: str,
    split: str,
    rows: Sequence[Row],
    fields: Fields,
    unlabelled: bool,
    completed: Callable[[Record, dict[str, Any]], Record],
    index: int,
) -> Example:
    where, row = rows[index]
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    try:
        question, label, rationale = fields(row)
    except KeyError as error:
        raise ValueError(
            f"{where}: no {error.args[0]!r} for task {task!r}; the record has the fields {', '.join(row)}"
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    for key, text in (("question", question), ("label", label)):
        if not text.strip() and not (unlabelled and key == "label"):
            raise ValueError(f"{where}: the {key} is empty; every record needs one")
    label, name = label.strip(), f"{task}/{split}/{index}"
    return Example(completed(Record(name, task, question, label, rationale.strip(), gold=label), row), where)
