"""How each data set's files are laid out and how one of their rows becomes question, label, rationale.

The `*_fields` functions take one JSON object; a KeyError or ValueError from them gets the
record's place from `sources`. Rationales in these rows are human ones (CoS-E, e-SNLI, ANLI,
GSM8K); `derived_rationale` makes one where there is none. The `*_files` functions read the files
that a data set was published in, and return None where a folder does not hold them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

Row = tuple[str, Any]  # "FILE:LINE", the JSON value there

NLI_LABELS = ("entailment", "neutral", "contradiction")


def read_rows(path: Path) -> list[Row]:
    """The values of a JSON-lines file, or of one JSON array, each with its place. Blank lines are skipped.

    Raises:
        ValueError: not UTF-8, or not JSON; the message begins with `FILE:LINE`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    if text.lstrip().startswith("["):
        return [(f"{path}: item {i}", value) for i, value in enumerate(_json(text, path, 1))]
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{path}:{i}", _json(line, path, i)) for i, line in lines if line.strip()]


def svamp_fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """The label is an equation, `( 8.0 - 3.0 )`. Rows of the DSS release and of the original file."""
    if "input" in row:
        return field_text(row, "input"), field_text(row, "label"), ""
    return f"{field_text(row, 'Body')}\n{field_text(row, 'Question')}", field_text(row, "Equation"), ""


def derived_rationale(row: dict[str, Any]) -> str:
    """A worked rationale from the fields Type and Equation of SVAMP.json, for `data.derive_rationales`.

    `( ( 3.0 - 2.0 ) + 26.0 )` of type Addition becomes `This is an addition problem: 3.0 - 2.0, then
    that + 26.0.` It says which operations are done in which order, and what the data set's authors call
    the problem; results of operations are left out, since they are no words of the question
    (`data.map_numbers`). An equation of one number is that number. Raises ValueError for other forms.
    """
    kind = field_text(row, "Type").rpartition("-")[2].lower().replace("divison", "division")
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


def asdiv_fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """The label is the answer's number: `9 (apples)` -> `9`."""
    row = {key.lower(): value for key, value in row.items()}
    return (
        f"{field_text(row, 'body')}\n{field_text(row, 'question')}",
        field_text(row, "answer").split(" ")[0],
        "",
    )


def cqa_fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """The label is the right option's text, without its letter."""
    rationale = field_text(row, "abstractive_explanation") if row.get("abstractive_explanation") else ""
    if "answerKey" in row:
        options = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
        stem, choices, label = row["question"]["stem"], list(options.values()), options[row["answerKey"]]
    else:
        stem, choices, label = field_text(row, "question"), row["choices"], field_text(row, "answer")
    if label not in choices:
        raise ValueError(f"the answer {label!r} is none of the choices {choices}")
    lines = [f"({letter}) {text}" for letter, text in zip("abcdefghij", choices, strict=False)]
    return "\n".join([stem, "Answer Choices:", *lines]), label, rationale


def nli_fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """Premise and hypothesis are joined by T5's end-of-sequence token, written out."""
    label = row["label"]
    if type(label) is int and 0 <= label < len(NLI_LABELS):
        label = NLI_LABELS[label]
    if label not in NLI_LABELS:
        raise ValueError(f"the label is {label!r}; it must be 0, 1, 2 or one of {', '.join(NLI_LABELS)}")
    rationale = next((field_text(row, key) for key in ("explanation_1", "reason") if row.get(key)), "")
    return f"{field_text(row, 'premise')}</s>{field_text(row, 'hypothesis')}", label, rationale


def gsm8k_fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """`She sold 48/2 = <<48/2=24>>24.` and `#### 24` -> label `24`, rationale without calculator marks."""
    solution, marker, label = field_text(row, "answer").rpartition("####")
    if not marker:
        raise ValueError("the answer has no '####' before its final number")
    return field_text(row, "question"), label.strip(), re.sub(r"<<[^<>]*>>", "", solution).strip()


def svamp_files(root: Path) -> dict[str, list[Row]] | None:
    """SVAMP.json has no splits. The DSS release permutes it and trains on the first 800 of 1000: so do we."""
    path = root / "SVAMP.json"
    if not path.is_file():
        return None
    rows = read_rows(path)
    order = np.random.RandomState(0).permutation(len(rows))
    cut = len(rows) * 4 // 5
    return {"train": [rows[i] for i in order[:cut]], "test": [rows[i] for i in order[cut:]]}


def cose_files(root: Path) -> dict[str, list[Row]] | None:
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


def gsm8k_files(root: Path) -> dict[str, list[Row]] | None:
    """The two published files."""
    files = {split: root / f"{split}.jsonl" for split in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        return None
    return {split: read_rows(file) for split, file in files.items()}


def field_text(row: dict[str, Any], key: str) -> str:
    """The field as text; numbers count as text."""
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {key!r} is {value!r}; it must be text or a number")
    return str(value)


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        raise ValueError(f"{path}:{first_line}: not usable JSON ({error})") from None
