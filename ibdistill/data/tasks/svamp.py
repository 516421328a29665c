"""SVAMP: word problems of one or two operations (Patel et al., NAACL 2021, arXiv 2103.07191).

The label is an equation, `( 8.0 - 3.0 )`, and an answer is right by its exact value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ibdistill.data.answer_rules import same_amount, same_python_value, same_value
from ibdistill.data.arithmetic import evaluate
from ibdistill.data.arithmetic_steps import last_value
from ibdistill.data.json_rows import Row, field_text, read_rows, shown
from ibdistill.data.llm_text import before, split_at_marker
from ibdistill.data.tasks.base import Task
from ibdistill.data.tasks.published import Published

_OPERATOR_BEFORE = re.compile(r"[-+*/\u2212\u00d7\u00f7]\s*$")
_OPERATOR_AFTER = re.compile(r"\s*[-+*/\u2212\u00d7\u00f7]\s*[0-9.$]")


def fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """Question, equation and no rationale, from rows of the DSS release or of the original file."""
    if "input" in row:
        return field_text(row, "input"), field_text(row, "label"), ""
    return f"{field_text(row, 'Body')}\n{field_text(row, 'Question')}", field_text(row, "Equation"), ""


def original_files(root: Path) -> dict[str, list[Row]] | None:
    """SVAMP.json has no splits. The DSS release permutes it and trains on the first 800 of 1000: so do we."""
    path = root / "SVAMP.json"
    if not path.is_file():
        return None
    rows = read_rows(path)
    order = np.random.RandomState(0).permutation(len(rows))
    cut = len(rows) * 4 // 5
    return {"train": [rows[i] for i in order[:cut]], "test": [rows[i] for i in order[cut:]]}


def derived_rationale(row: dict[str, Any]) -> str:
    """A worked rationale from the fields Type and Equation of SVAMP.json, for `data.derive_rationales`.

    `( ( 3.0 - 2.0 ) + 26.0 )` of type Addition becomes `This is an addition problem: 3.0 - 2.0, then
    that + 26.0.` It says which operations are done in which order, and what the data set's authors call
    the problem; results of operations are left out, since they are no words of the question
    (`data.map_numbers`). An equation of one number is that number. Raises ValueError for other forms.
    """
    kind = field_text(row, "Type").rpartition("-")[2].strip().lower().replace("divison", "division")
    if not kind.isalpha():
        raise ValueError(
            f"field 'Type' is {shown(row['Type'])}; a rationale is derived from the name of an operation, "
            "such as 'Addition' or 'Common-Division'"
        )
    equation, steps = field_text(row, "Equation"), []
    inner = re.compile(r"\(\s*([^\s()]+) ([-+*/]) ([^\s()]+)\s*\)")
    while found := inner.search(equation):
        steps.append(" ".join(found.groups()))
        equation = equation[: found.start()] + "that" + equation[found.end() :]
    if not steps and not re.search(r"[-+*/()\s]", equation):
        steps, equation = [equation], "that"
    if equation != "that" or any(step.count("that") > (i > 0) for i, step in enumerate(steps)):
        raise ValueError(
            f"the equation {field_text(row, 'Equation')!r} is no chain of operations in parentheses"
        )
    article = "an" if kind[0] in "aeiou" else "a"
    return f"This is {article} {kind} problem: {', then '.join(steps)}."


def parse_equation(text: str) -> tuple[str, str] | None:
    """`He ate 3 of 8. The answer is (8 - 3).` -> the reason, `(8 - 3)`.

    The answer is what the outermost parentheses of the line hold, and must be arithmetic. Where an operator
    stands outside them, as in `-(8 - 3)` or `(8 - 3) / 2`, they are not the whole answer, and there is none
    (the "Distilling Step-by-Step!" code takes the part).
    """
    parts = split_at_marker(before(text, "Q:"), "The answer is")
    if parts is None:
        return None
    line = parts[1].split("\n")[0]
    start, end = line.find("("), line.rfind(")") + 1
    if _OPERATOR_BEFORE.search(line[: max(0, start)]) or _OPERATOR_AFTER.match(line[end:]):
        return None
    label = line[start:end]
    return (parts[0], label) if evaluate(label) is not None else None


SVAMP = Task(
    name="svamp",
    read=Published(
        fields=fields,
        hub=("ChilleD/SVAMP", None, None),
        hub_splits={"train": "train", "test": "test"},
        original=original_files,
        original_files="SVAMP.json",
        derive=derived_rationale,
    ).read,
    is_correct=same_value,
    is_strict=same_python_value,
    is_lenient=same_amount,
    parse_llm=parse_equation,
    implied=last_value,
    arithmetic=True,
    derives_rationales=True,
)
