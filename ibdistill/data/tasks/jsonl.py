"""The user's own questions, one JSON object per line; the functions here serve any task in this form.

{"question": "Is a whale a fish?", "label": "no", "rationale": "Whales breathe air."}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ibdistill.config.sections import DataConfig
from ibdistill.data.amounts import amount, lone_number
from ibdistill.data.answer_rules import plain, same_amount, same_exact_text, same_text_or_number, same_value
from ibdistill.data.json_rows import SUFFIXES, field_text, rows_of
from ibdistill.data.lettered_options import option_of, options, same_choice, same_stated_choice
from ibdistill.data.llm_text import FINAL, before, split_at_marker, stated
from ibdistill.data.records import Record
from ibdistill.data.tasks import conversations
from ibdistill.data.tasks.base import Example, Task, check_exists, examples


def read_jsonl(task: str, data: DataConfig, *, needs_rationale: bool) -> dict[str, Sequence[Example]]:
    """A folder with train, test and perhaps valid.jsonl, or one file, with the fields that `data` names.

    The files may have the other forms of `json_rows` too, under the names that go with them
    (train.parquet). One file is split: a tenth of it is the test split, always the same. A record may have
    `messages` or `rationales` too (`conversations`). Records of a
    train.jsonl may lack a label where the teacher gives it. `task` names the records and stands in messages.

    Raises:
        ValueError: no `data.path`, missing files, or a bad line.
    """
    files = split_files(task, data)
    unlabelled = data.label_source == "teacher" and Path(data.path).is_dir()

    def optional(row: dict[str, Any], key: str) -> str:
        return field_text(row, key) if row.get(key) is not None else ""

    def fields(row: dict[str, Any]) -> tuple[str, str, str]:
        if in_conversation(row):
            _, question, answer, rationale = conversations.conversation(row, data)
            return question, answer, next(iter(conversations.rationales(row, data)), rationale)
        label = optional if unlabelled else field_text
        samples = conversations.rationales(row, data)
        return (
            field_text(row, data.question_field),
            label(row, data.label_field),
            samples[0] if samples else optional(row, data.rationale_field),
        )

    def completed(record: Record, row: dict[str, Any]) -> Record:
        history = conversations.conversation(row, data).history if in_conversation(row) else ()
        samples = conversations.rationales(row, data)
        return replace(record, answer_check=data.answer_check, history=history, rationales=samples)

    def in_conversation(row: dict[str, Any]) -> bool:
        return conversations.MESSAGES in row and data.question_field not in row

    rows = {split: rows_of(file) for split, file in files.items()}
    return examples(task, fields, rows, ("train",) if unlabelled else (), completed)


def split_files(task: str, data: DataConfig) -> dict[str, Path]:
    """Split -> its file at `data.path`; one file stands under train. Raises as `read_jsonl`."""
    if data.path is None:
        raise ValueError(
            f"data.path is not set: the task {task!r} needs a file, or a folder with train.jsonl"
        )
    path = Path(data.path)
    check_exists(path)
    files = {"train": path}
    if path.is_dir():
        found = {split: _file_of(path, split) for split in ("train", "valid", "test")}
        files = {split: file for split, file in found.items() if file}
        if missing := [f"{split}.jsonl" for split in ("train", "test") if split not in files]:
            raise ValueError(
                f"data.path {data.path!r} lacks {' and '.join(missing)}: a folder for the task {task!r} has "
                "train.jsonl, test.jsonl and perhaps valid.jsonl (or such files ending in "
                f"{', '.join(SUFFIXES[1:])}); or name one file, which is then split"
            )
    return files


def _file_of(folder: Path, split: str) -> Path | None:
    """The file of a split; None if there is none. Raises ValueError if there are several."""
    found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{folder} holds the {split} split several times ({names}); keep one of them")
    return found[0] if found else None


def parse_text(text: str) -> tuple[str, str] | None:
    """`It rains. The answer is an umbrella.` -> the reason, `an umbrella`, which is the rest of the line.

    An answer that is said several times is one if it states one amount each time: LLMs write `The answer is
    2 + 3 = 5. The answer is 5.`
    """
    text = before(text, "Q:")
    said = text.split("The answer is ")
    if len(said) > 2:
        amounts = {amount(part.strip().removesuffix(".")) for part in said[1:]}
        if len(amounts) == 1 and None not in amounts:
            text = f"{''.join(said[:-1])}The answer is {said[-1]}"
    parts = split_at_marker(text, "So the answer is", "The answer is", FINAL, "Answer:")
    label = parts[1].split("\n")[0].partition(FINAL)[0].strip().removesuffix(".").strip() if parts else ""
    return (parts[0], stated(label) or label) if parts and label else None


def is_correct(prediction: str, record: Record) -> bool:
    """The rule that `data.answer_check` names. text: one text, or two numbers of one value; value: one
    exact value, of expressions too; choice: one of the options that the question lists."""
    return _can_be_met(record) and _RULES[record.answer_check][0](prediction, record)


def is_lenient(prediction: str, record: Record) -> bool:
    """What a reader would accept: the unit of a number, the form of a letter, `The answer is`."""
    return _can_be_met(record) and _RULES[record.answer_check][1](prediction, record)


def _can_be_met(record: Record) -> bool:
    """False for a choice whose label is none of the question's options."""
    return record.answer_check != "choice" or option_of(record.gold, record) in map(plain, options(record))


def _same_stated(prediction: str, record: Record) -> bool:
    if any(
        same_text_or_number(text, record) for text in (prediction, stated(prediction)) if text is not None
    ):
        return True
    return lone_number(record.gold) is not None and same_amount(prediction, record)


_RULES = {
    "text": (same_text_or_number, _same_stated),
    "value": (same_value, same_amount),
    "choice": (same_choice, same_stated_choice),
}
JSONL = Task(
    name="jsonl",
    read=read_jsonl,
    is_correct=is_correct,
    is_strict=same_exact_text,  # the user's own questions have no official rule
    is_lenient=is_lenient,
    parse_llm=parse_text,
    answer_check=True,
)
