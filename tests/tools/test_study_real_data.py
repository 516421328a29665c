"""The data folders of the study on a pretrained student."""

from __future__ import annotations

import json
import sys

from harness import ROOT

sys.path.append(str(ROOT / "tools"))
from study import real_data


def test_folders_share_questions_labels_and_test_split(tmp_path, capsys):
    body = [
        {"Body": f"Q{i}", "Question": "?", "Equation": f"( {i}.0 + 1.0 )", "Type": "Addition"}
        for i in range(20)
    ]
    (tmp_path / "SVAMP.json").write_text(json.dumps(body))
    empty = tmp_path / "text.jsonl"
    empty.write_text("")
    plain = real_data.folders(tmp_path, empty)
    first, second, third = (row["question"] for row in plain["derived"][:3])
    value = eval_of(plain["derived"][0]["label"])
    lines = [
        {"question": first, "text": f"Because. The answer is {value}."},
        {"question": second, "text": "Wrong. The answer is 1000."},
        {"question": third, "text": "I do not know."},
        {"question": plain["test"][0]["question"], "text": "Of the test split. The answer is 1."},
    ]
    empty.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = real_data.folders(tmp_path, empty)
    assert capsys.readouterr().out.endswith("3 training questions, 2 answers parsed, 1 of them right\n")
    assert found["derived"] == plain["derived"] and len(found["derived"]) == 16 and len(found["test"]) == 4
    (written,), (same,) = found["written"], found["same"]
    assert (written["rationale"], written["question"], same) == ("Because.", first, plain["derived"][0])
    assert [len(row["rationales"]) for row in found["both"]] == [2] + [1] * 15
    assert found["both"][0]["rationales"] == [same["rationale"], "Because."]


def eval_of(equation: str) -> int:
    a, b = equation.strip("() ").split(" + ")
    return int(float(a) + float(b))
