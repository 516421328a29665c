"""GSM8K: word problems of several steps with written solutions (Cobbe et al., 2021, arXiv 2110.14168).

The label is the final number, and an answer is right by its exact value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ibdistill.data.amounts import amount, amount_text
from ibdistill.data.answer_rules import same_amount, same_value
from ibdistill.data.arithmetic_steps import last_value
from ibdistill.data.json_rows import Row, field_text, read_rows
from ibdistill.data.llm_text import FINAL, before, split_at_marker
from ibdistill.data.records import Record
from ibdistill.data.tasks.base import Task
from ibdistill.data.tasks.published import Published

_OFFICIAL = re.compile(r"-?[0-9.,]+")


def fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """`She sold 48/2 = <<48/2=24>>24.` and `#### 24` -> label `24`, rationale without calculator marks."""
    solution, *labels = field_text(row, "answer").split(FINAL)
    if not labels:
        raise ValueError(f"the answer has no '{FINAL}' before its final number")
    if len(labels) > 1:
        raise ValueError(f"the answer has '{FINAL}' {len(labels)} times; which final number is meant?")
    return field_text(row, "question"), labels[0].strip(), re.sub(r"<<[^<>]*>>", "", solution).strip()


def original_files(root: Path) -> dict[str, list[Row]] | None:
    """The two published files."""
    files = {split: root / f"{split}.jsonl" for split in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        return None
    return {split: read_rows(file) for split, file in files.items()}


def parse_amount(text: str) -> tuple[str, str] | None:
    """`24 + 48 = 72. The answer is $72.` -> the reason, `72`. GSM8K's own marker `####` is read too.

    The line behind the marker must state one amount (`amounts.amount`), and the markers the same one.
    """
    text = before(text, "Q:")
    parts = split_at_marker(text, "So the answer is", "The answer is", FINAL)
    label = amount_text(parts[1].split("\n")[0].partition(FINAL)[0]) if parts else None
    if label is None:
        return None
    final = split_at_marker(text, FINAL)
    return (parts[0], label) if final is None or amount(final[1]) == amount(label) else None


def official(prediction: str, record: Record) -> bool:
    """The rule of GSM8K's own code: the digits, points and commas at the start, without commas, are the
    label's text. So `1,200 dollars` is `1200`, and `1200.0`, `$1,200` and `2 * 600` are not."""
    said, gold = (_OFFICIAL.match(text.strip()) for text in (prediction, record.gold))
    return bool(said and gold) and said[0].replace(",", "") == gold[0].replace(",", "")


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
    is_strict=official,
    is_lenient=same_amount,
    parse_llm=parse_amount,
    implied=last_value,
    arithmetic=True,
)
