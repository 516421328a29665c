"""The user's own questions, one JSON object per line; the functions here serve any task in this form.

{"question": "Is a whale a fish?", "label": "no", "rationale": "Whales breathe air."}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ibdistill.config.sections import DataConfig
from ibdistill.data.answer_rules import same_text
from ibdistill.data.json_rows import SUFFIXES, field_text, read_rows
from ibdistill.data.llm_text import before, split_at_marker
from ibdistill.data.tasks.base import Example, Task, check_exists, examples


def read_jsonl(task: str, data: DataConfig, *, needs_rationale: bool) -> dict[str, list[Example]]:
    """A folder with train, test and perhaps valid.jsonl, or one file, with the fields that `data` names.

    The files may have the other forms of `json_rows` too, under the names that go with them
    (train.parquet). One file is split: a tenth of it is the test split, always the same. Records of a
    train.jsonl may lack a label where the teacher gives it. `task` names the records and stands in messages.

    Raises:
        ValueError: no `data.path`, missing files, or a bad line.
    """
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

    def optional(row: dict[str, Any], key: str) -> str:
        return field_text(row, key) if row.get(key) is not None else ""

    unlabelled = data.label_source == "teacher" and path.is_dir()

    def fields(row: dict[str, Any]) -> tuple[str, str, str]:
        label = optional if unlabelled else field_text
        return (
            field_text(row, data.question_field),
            label(row, data.label_field),
            optional(row, data.rationale_field),
        )

    rows = {split: read_rows(file) for split, file in files.items()}
    return examples(task, fields, rows, unlabelled=("train",) if unlabelled else ())


def _file_of(folder: Path, split: str) -> Path | None:
    """The file of a split; None if there is none. Raises ValueError if there are several."""
    found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{folder} holds the {split} split several times ({names}); keep one of them")
    return found[0] if found else None


def parse_text(text: str) -> tuple[str, str] | None:
    """`It rains. The answer is an umbrella.` -> the reason, `an umbrella`, which is the rest of the line."""
    parts = split_at_marker(before(text, "Q:"), "So the answer is", "The answer is", "####", "Answer:")
    label = parts[1].split("\n")[0].strip().removesuffix(".").strip() if parts else ""
    return (parts[0], label) if parts and label else None


JSONL = Task(name="jsonl", read=read_jsonl, is_correct=same_text, parse_llm=parse_text)
