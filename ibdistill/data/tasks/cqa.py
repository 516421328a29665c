"""CommonsenseQA (Talmor et al., NAACL 2019, arXiv 1811.00937) with the explanations of CoS-E (Rajani et al.,
ACL 2019, arXiv 1906.02361).

Multiple choice: the question lists the options under letters, and the label is the right option's text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ibdistill.data.answer_rules import named
from ibdistill.data.json_rows import Row, field_text, read_rows
from ibdistill.data.lettered_options import letter_of, options, same_choice, with_options
from ibdistill.data.llm_text import before, split_at_marker
from ibdistill.data.records import Record
from ibdistill.data.tasks.base import Task
from ibdistill.data.tasks.published import Published


def fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """Question with its options, the right option's text without its letter, and CoS-E's explanation."""
    rationale = field_text(row, "abstractive_explanation") if row.get("abstractive_explanation") else ""
    if "answerKey" in row:
        texts = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
        question, choices, label = row["question"]["stem"], list(texts.values()), texts[row["answerKey"]]
    else:
        question, choices, label = field_text(row, "question"), row["choices"], field_text(row, "answer")
    if label not in choices:
        raise ValueError(f"the answer {label!r} is none of the choices {choices}")
    return with_options(question, choices), label, rationale


def original_files(root: Path) -> dict[str, list[Row]] | None:
    """CommonsenseQA's questions joined by id with CoS-E's explanations; dev is our test split."""
    found = sorted(root.glob("cose_train_v*.jsonl"))
    if not found or not (root / "train_rand_split.jsonl").is_file():
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{root} holds several versions of CoS-E ({names}); keep one of them")
    splits = {}
    for split, theirs in (("train", "train"), ("test", "dev")):
        explanations, questions = (
            root / found[0].name.replace("train", theirs, 1),
            root / f"{theirs}_rand_split.jsonl",
        )
        for file in (explanations, questions):
            if not file.is_file():
                raise ValueError(f"{file} is missing: the task 'cqa' needs it beside {found[0].name}")
        texts = {}
        for where, row in read_rows(explanations):
            try:
                texts[str(row["id"])] = row["explanation"]["open-ended"]
            except (KeyError, TypeError):
                raise ValueError(f"{where}: no fields 'id' and 'explanation' -> 'open-ended'") from None
        splits[split] = [
            (where, {**row, "abstractive_explanation": texts.get(str(row.get("id")), "")})
            if isinstance(row, dict)
            else (where, row)
            for where, row in read_rows(questions)
        ]
    return splits


def parse_choice(text: str) -> tuple[str, str] | None:
    """`Money is kept there. So the answer is (b) bank.` -> the reason, `bank`."""
    parts = split_at_marker(before(text, "Q:"), "So the answer is")
    if parts is None:
        return None
    after_letters = re.split(r"\(.\)", parts[1].split("\n")[0])
    label = after_letters[1].strip().removesuffix(".").strip() if len(after_letters) > 1 else ""
    return (parts[0], label) if label else None


def named_options(rationale: str, record: Record) -> list[str]:
    """Every option that the rationale names word for word."""
    return named(rationale, options(record))


CQA = Task(
    name="cqa",
    read=Published(
        fields=fields,
        hub=("Salesforce/cos_e", "v1.11", None),
        hub_splits={"train": "train", "test": "validation"},  # CommonsenseQA's test labels are not public
        original=original_files,
        original_files="cose_train_v*.jsonl with train_rand_split.jsonl",
        folders=("cose", "cos_e"),
    ).read,
    is_correct=same_choice,
    parse_llm=parse_choice,
    implied=named_options,
    choices=options,
    letter_of=letter_of,
)
