"""Writes the data folders of tools/study/real.yaml from SVAMP.json and an LLM's text about it:

    python tools/study/real_data.py SVAMP_FOLDER OUT

OUT/derived      all training questions, with rationales derived from the file's equations
OUT/written      those that the LLM explained with a right answer, with its rationale
OUT/same         the same questions as `written`, with derived rationales
OUT/both         all training questions, with the LLM's rationale as a second one where there is one

All labels are the file's equations, and all folders have the same 200 test questions. The LLM's text is
tools/study/svamp_qwen.jsonl, as it came: one object a line with `question` and `text`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ibdistill.data.arithmetic import evaluate
from ibdistill.data.tasks import svamp
from ibdistill.data.tasks.jsonl import parse_text

TEXT = Path(__file__).parent / "svamp_qwen.jsonl"

Row = dict[str, Any]


def right_rationales(text: Path, gold: dict[str, str]) -> dict[str, str]:
    """Question -> the LLM's rationale, where its answer has the value of the question's gold equation."""
    found, asked, parsed = {}, 0, 0
    for line in text.read_text().splitlines():
        row = json.loads(line)
        if row["question"] not in gold:
            continue
        parts = parse_text(row["text"])
        asked, parsed = asked + 1, parsed + (parts is not None)
        if parts and evaluate(parts[1]) == evaluate(gold[row["question"]]):
            found[row["question"]] = parts[0]
    print(f"{text.name}: {asked} training questions, {parsed} answers parsed, {len(found)} of them right")
    return found


def folders(svamp_folder: Path, text: Path) -> dict[str, list[Row]]:
    """Folder -> its training rows; `test` -> the test rows. Raises ValueError if there is no SVAMP.json."""
    splits = svamp.original_files(svamp_folder)
    if splits is None:
        raise ValueError(f"{svamp_folder} has no SVAMP.json")
    rows: dict[str, list[Row]] = {}
    for split, found in splits.items():
        rows[split] = []
        for _, row in found:
            question, equation, _ = svamp.fields(row)
            derived = svamp.derived_rationale(row)
            rows[split].append({"question": question, "label": equation, "rationale": derived})
    written = right_rationales(text, {row["question"]: row["label"] for row in rows["train"]})
    same = [row for row in rows["train"] if row["question"] in written]
    both = []
    for row in rows["train"]:
        texts = [row["rationale"], written.get(row["question"])]
        both.append({**row, "rationales": [text for text in texts if text]})
        del both[-1]["rationale"]
    return {
        "derived": rows["train"],
        "written": [row | {"rationale": written[row["question"]]} for row in same],
        "same": same,
        "both": both,
        "test": rows["test"],
    }


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        sys.exit(__doc__)
    out = Path(arguments[1])
    rows = folders(Path(arguments[0]), TEXT)
    test = rows.pop("test")
    for name, train in rows.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for split, part in (("train", train), ("test", test)):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (out / name / f"{split}.jsonl").write_text(lines)
        print(f"{out / name}: {len(train)} training questions, {len(test)} test questions")


if __name__ == "__main__":
    main(sys.argv[1:])
