"""`load` with an LLM's rationales and labels: what is used, counted, left out and refused."""

import json
import logging

import numpy as np
import pytest
from miniatures import array, ids, load_refused, loaded, said, svamp

from ibdistill.data.tasks.registry import TASKS


def test_llm_rationales_with_ground_truth_labels(tmp_path):
    svamp(tmp_path, [said(i) for i in range(10)], [said(0), "no idea"])
    result = loaded("svamp", tmp_path)
    assert len(result.train) == 9 and len(result.valid["svamp"]) == 1
    for record in result.train:
        i = record.id.split("/")[2]
        assert record.label == record.gold == f"( {i}.0 - 1.0 )"
        assert record.rationale == f"There are {i} and 1."
    # Test records stay, whatever the LLM wrote.
    assert [record.rationale for record in result.test["svamp"]] == ["There are 0 and 1.", ""]
    assert result.report == {
        "svamp/train/records": 9,
        "svamp/valid/records": 1,
        "svamp/test/records": 2,
        "svamp/train/llm_correct": 10,
        "svamp/test/llm_correct": 1,
        "svamp/test/unparsable": 1,
    }


def test_llm_labels_only_train(tmp_path):
    svamp(tmp_path, [said(i, answer=i + 1) for i in range(10)], [said(0, answer=7), said(1, answer=7)])
    result = loaded("svamp", tmp_path, label_source="llm")
    for record in result.train:
        i = int(record.id.split("/")[2])
        assert (record.label, record.gold) == (f"({i + 1} - 1)", f"( {i}.0 - 1.0 )")
    for record in [*result.valid["svamp"], *result.test["svamp"]]:
        assert record.label == record.gold
    assert "svamp/train/llm_correct" not in result.report


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"label_source": "llm", "needs_rationale": False}, 16),
        ({"label_source": "gt", "needs_rationale": True}, 16),
        ({"label_source": "gt", "needs_rationale": False}, 18),
    ],
)
def test_unparsable_llm_outputs_are_counted_and_left_out_where_needed(tmp_path, settings, kept, caplog):
    valid = set(np.random.default_rng(0).permutation(20)[:2])
    bad = [*[i for i in range(20) if i not in valid][:2], min(valid)]
    svamp(tmp_path, ["?" if i in bad else said(i) for i in range(20)])
    with caplog.at_level(logging.INFO, logger="ibdistill"):
        result = loaded("svamp", tmp_path, **settings)
    assert len(result.train) == result.report["svamp/train/records"] == kept
    assert result.report["svamp/train/unparsable"] == 3
    assert result.report.get("svamp/train/dropped", 0) == 18 - kept
    # The validation split is the same for all of them.
    assert ids(result.valid["svamp"]) == [f"svamp/train/{i}" for i in sorted(valid)]
    assert "svamp/train/unparsable 3" in caplog.text
    if kept == 18:
        assert sum(record.rationale == "" for record in result.train) == 2


def test_a_split_without_any_usable_llm_output(tmp_path):
    svamp(tmp_path, ["So the answer is (b) bank."] * 10)
    message = "none of the 10 LLM outputs for the train split of task 'svamp' has a rationale and an answer"
    load_refused(message, "svamp", tmp_path)
    load_refused(
        "the first is 'So the answer is (b) bank.'",
        "svamp",
        tmp_path,
        needs_rationale=False,
        label_source="llm",
    )
    assert len(loaded("svamp", tmp_path, needs_rationale=False).train) == 9


def test_llm_labels_without_llm_outputs(tmp_path):
    row = json.dumps({"question": "q", "label": "1"}) + "\n"
    (tmp_path / "all.jsonl").write_text(row * 20)
    message = (
        "data.label_source is 'llm', but task 'jsonl' has no LLM outputs here; set data.path to the folder"
    )
    load_refused(message, "jsonl", tmp_path / "all.jsonl", label_source="llm")
    load_refused("data.label_source is 'llm', but task 'demo' has no", "demo", label_source="llm")


def test_mapped_numbers(tmp_path):
    svamp(tmp_path, [said(i) for i in range(2, 12)])
    rows = [{"input": f"{i} less 1?", "label": f"( {i}.0 - 1.0 )"} for i in range(2, 12)]
    array(tmp_path / "svamp/svamp_train.json", rows)
    result = loaded("svamp", tmp_path, map_numbers=True, label_source="llm")
    record = next(r for r in result.train if r.id == "svamp/train/0")
    assert (record.question, record.label, record.gold) == ("n0 less n1?", "(n0 - n1)", "( n0 - n1 )")
    assert (record.rationale, record.quantities) == ("There are n0 and n1.", ("2", "1"))
    assert TASKS["svamp"].is_correct("1", record)
    assert result.report["svamp/train/llm_correct"] == 10
    load_refused(
        "for arithmetic tasks (demo, demo_pretrain, svamp, asdiv, gsm8k), not cqa: turn it off",
        ["svamp", "cqa"],
        map_numbers=True,
    )
