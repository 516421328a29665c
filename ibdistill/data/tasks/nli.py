"""Natural language inference with explanations: e-SNLI and the three rounds of ANLI.

e-SNLI: Camburu et al., NeurIPS 2018, arXiv 1812.01193. ANLI: Nie et al., ACL 2020, arXiv 1910.14599; it
explains only some of its records. The label is the relation of hypothesis to premise.
"""

from __future__ import annotations

import re
from typing import Any

from ibdistill.data.answer_rules import named, same_exact_text, same_stated_text, same_text
from ibdistill.data.json_rows import field_text, shown
from ibdistill.data.llm_text import before, split_at_marker
from ibdistill.data.records import Record
from ibdistill.data.tasks.base import Task
from ibdistill.data.tasks.published import Published

RELATIONS = ("entailment", "neutral", "contradiction")
"""The labels, in the order of the data sets' numbers."""
_RELATION = re.compile(r"\W*(entailment|neutral|contradiction)\b", re.IGNORECASE)


def fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """Premise and hypothesis, joined by T5's end-of-sequence token, written out; relation; explanation."""
    label = row["label"]
    if type(label) in (int, float) and label in range(len(RELATIONS)):  # a bool is no label
        label = RELATIONS[int(label)]
    if label not in RELATIONS:
        raise ValueError(f"the label is {shown(label)}; it must be 0, 1, 2 or one of {', '.join(RELATIONS)}")
    rationale = next((field_text(row, key) for key in ("explanation_1", "reason") if row.get(key)), "")
    return f"{field_text(row, 'premise')}</s>{field_text(row, 'hypothesis')}", label, rationale


def parse_esnli(text: str) -> tuple[str, str] | None:
    """`A dog is an animal. Answer: entailment` -> the reason, `entailment`.

    Only the first answer counts: what follows it is a next example's.
    """
    rationale, _, answer = text.partition("Answer:")
    label = _RELATION.match(answer)
    return (rationale.strip(), label[1].lower()) if rationale.strip() and label else None


def parse_anli(text: str) -> tuple[str, str] | None:
    """`The text names no year. So the answer is neutral.` -> the reason, `neutral`."""
    parts = split_at_marker(before(text, "Premise:"), "So the answer is", "The answer is")
    label = _RELATION.match(parts[1]) if parts else None
    return (parts[0], label[1].lower()) if parts and label else None


def named_relations(rationale: str, record: Record) -> list[str]:
    """Every relation that the rationale names."""
    return named(rationale, RELATIONS)


def relations(record: Record) -> tuple[str, ...]:
    """The labels to choose from, the same for every record."""
    return RELATIONS


ESNLI = Task(
    name="esnli",
    read=Published(
        fields=fields,
        # The hub's main branch of this data set is a script, which `datasets` no longer runs.
        hub=("esnli/esnli", None, "refs/convert/parquet"),
        hub_splits={"train": "train", "valid": "validation", "test": "test"},
    ).read,
    is_correct=same_text,
    is_strict=same_exact_text,
    is_lenient=same_stated_text,
    parse_llm=parse_esnli,
    implied=named_relations,
    choices=relations,
)

ANLI1, ANLI2, ANLI3 = (
    Task(
        name=f"anli{n}",
        read=Published(
            fields=fields,
            hub=("facebook/anli", None, None),
            hub_splits={"train": f"train_r{n}", "valid": f"dev_r{n}", "test": f"test_r{n}"},
        ).read,
        is_correct=same_text,
        is_strict=same_exact_text,
        is_lenient=same_stated_text,
        parse_llm=parse_anli,
        implied=named_relations,
        choices=relations,
        partial_rationales=True,
    )
    for n in (1, 2, 3)
)
