"""GSM8K: word problems of several steps with written solutions (Cobbe et al., 2021, arXiv 2110.14168).

The label is the final number, and an answer is right by its exact value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ibdistill.data.answer_rules import same_value
from ibdistill.data.arithmetic_steps import last_value
from ibdistill.data.json_rows import Row, field_text, read_rows
from ibdistill.data.llm_text import before, split_at_marker
from ibdistill.data.tasks.base import Task
from ibdistill.data.tasks.published import Published

_AMOUNT = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")


def fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """`She sold 48/2 = <<48/2=24>>24.` and `#### 24` -> label `24`, rationale without calculator marks."""
    solution, marker, label = field_text(row, "answer").rpartition("####")
    if not marker:
        raise ValueError("the answer has no '####' before its final number")
    return field_text(row, "question"), label.strip(), re.sub(r"<<[^<>]*>>", "", solution).strip()


def original_files(root: Path) -> dict[str, list[Row]] | None:
    """The two published files."""
    files = {split: root / f"{split}.jsonl" for split in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        return None
    return {split: read_rows(file) for split, file in files.items()}


def parse_amount(text: str) -> tuple[str, str] | None:
    """`24 + 48 = 72. The answer is $72.` -> the reason, `72`. GSM8K's own marker `####` is read too."""
    parts = split_at_marker(before(text, "Q:"), "So the answer is", "The answer is", "####")
    label = _AMOUNT.search(parts[1].split("\n")[0]) if parts else None
    return (parts[0], label[0].rstrip(",")) if parts and label else None


GSM8K = Task(
    name="gsm8k",
    read=Published(
        fields=fields,
        hub=("openai/gsm8k", "main", None),
        hub_splits={"train": "train", "test": "test"},
        original=original_files,
        original_files="train.jsonl with test.jsonl",
    ).read,
    is_correct=same_value,
    parse_llm=parse_amount,
    implied=last_value,
    arithmetic=True,
)
