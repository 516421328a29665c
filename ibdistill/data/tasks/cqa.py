"""CommonsenseQA (Talmor et al., NAACL 2019, arXiv 1811.00937) with the explanations of CoS-E (Rajani et al.,
ACL 2019, arXiv 1906.02361).

Multiple choice: the question lists the options under letters, and the label is the right option's text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ibdistill.data.answer_rules import named
from ibdistill.data.json_rows import Row, field_text, read_rows, shown
from ibdistill.data.lettered_options import (
    letter_of,
    options,
    same_choice,
    same_exact_choice,
    same_stated_choice,
    with_options,
)
from ibdistill.data.llm_text import before, split_at_marker
from ibdistill.data.records import Record
from ibdistill.data.tasks.base import Task
from ibdistill.data.tasks.published import Published


def fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """Question with its options, the right option's text without its letter, and CoS-E's explanation.

    Three forms are read: `question` with its `choices` within it and `answerKey` (CommonsenseQA's own
    files), `choices` as columns with `answerKey` (CommonsenseQA on the hub), and a list of texts with
    `answer` (CoS-E on the hub, the DSS release).
    """
    rationale = field_text(row, "abstractive_explanation") if row.get("abstractive_explanation") else ""
    if "answerKey" not in row:
        question, label = field_text(row, "question"), field_text(row, "answer")
        choices = [_text({"text": choice}, "text") for choice in _list(row, "choices")]
        if label not in choices:
            raise ValueError(f"the answer {shown(label)} is none of the choices {shown(choices)}")
        return with_options(question, choices), label, rationale
    if isinstance(row["question"], dict):
        pairs = [_pair(choice) for choice in _list(row["question"], "choices")]
        question = _text(row["question"], "stem")
    else:
        question, columns = field_text(row, "question"), row["choices"]
        if not isinstance(columns, dict):
            raise ValueError(
                f"field 'choices' is {shown(columns)}; beside 'answerKey' it must be "
                '{"label": [...], "text": [...]}'
            )
        letters, texts = _list(columns, "label"), _list(columns, "text")
        if len(letters) != len(texts):
            raise ValueError(f"the choices have {len(letters)} labels and {len(texts)} texts")
        pairs = [_pair({"label": one, "text": two}) for one, two in zip(letters, texts, strict=True)]
    options_ = dict(pairs)
    if len(options_) < len(pairs):
        raise ValueError(f"two choices have one label: {shown([letter for letter, _ in pairs])}")
    if (key := field_text(row, "answerKey")) not in options_:
        raise ValueError(
            f"field 'answerKey' is {shown(key)}; it must be one of the choices' labels {', '.join(options_)} "
            "(the labels of CommonsenseQA's own test split are not public)"
        )
    return with_options(question, options_.values()), options_[key], rationale


def _pair(choice: Any) -> tuple[str, str]:
    """Letter and text of a choice."""
    if not isinstance(choice, dict):
        raise ValueError(f"a choice is {shown(choice)}; it must be an object with 'label' and 'text'")
    return _text(choice, "label"), _text(choice, "text")


def _text(values: dict[str, Any], key: str) -> str:
    """A field's text, which must not be blank."""
    if not (text := field_text(values, key)).strip():
        raise ValueError(f"field {key!r} is {shown(text)}; it must not be blank")
    return text


def _list(values: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(values[key], list):
        raise ValueError(f"field {key!r} is {shown(values[key])}; it must be a list")
    return values[key]


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
                name, text = str(row["id"]), row["explanation"]["open-ended"]
            except (KeyError, TypeError):
                raise ValueError(f"{where}: no fields 'id' and 'explanation' -> 'open-ended'") from None
            if not isinstance(text, str | None):
                raise ValueError(f"{where}: 'open-ended' is {shown(text)}; it must be text or null")
            texts[name] = text
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
    is_strict=same_exact_choice,
    is_lenient=same_stated_choice,
    parse_llm=parse_choice,
    implied=named_options,
    choices=options,
    letter_of=letter_of,
)
