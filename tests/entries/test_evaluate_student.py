"""Evaluation as a command: the same on one rank and two, its files, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, alone, launch
from miniatures import lines

from ibdistill import evaluate_student
from ibdistill.config import fields
from ibdistill.config.evaluation_sections import StudentEvaluation
from ibdistill.config.sections import StudentConfig
from ibdistill.data import tokenizers
from ibdistill.models.student import load_student

SCRIPT = str(ROOT / "ibdistill" / "evaluate_student.py")
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """An exported student with random weights."""
    folder = tmp_path_factory.mktemp("run") / "student"
    tokenizer = tokenizers.demo_tokenizer()
    load_student(StudentConfig(), tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(student: Path | None, world, **overrides):
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    config = fields.from_flat(StudentEvaluation, given)
    return evaluate_student.prepare(student and str(student), config, world)()


def test_one_rank_and_two_agree_and_write_all_files(student, tmp_path, world):
    limits = {
        "eval.limit": 21,
        "eval.batch_size": 8,
        "data.max_label_tokens": 8,
        "data.max_rationale_tokens": 8,
    }
    arguments = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
    log = tmp_path / "log"
    code = launch([SCRIPT, str(student), *arguments, "--eval.dir", str(tmp_path / "two")], ranks=2, log=log)
    assert code == 0, log.read_text()[-3000:]
    result = run(student, world, eval__dir=str(tmp_path / "one"), **limits)
    written = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert written[0] == result and (written[0].pop("ranks"), written[1].pop("ranks")) == (1, 2)
    assert all(content.pop("seconds") >= 0 for content in written)
    assert all(content.pop("commit") for content in written)  # somebody may work on the code meanwhile
    assert written[0]["scores"] == pytest.approx(written[1].pop("scores"), rel=1e-4)
    assert written[1].items() <= written[0].items() and result["records"] == 21
    rows = [
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").open()]
        for name in ("one", "two")
    ]
    assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]]
    assert [row["label"] for row in rows[0]] == [row["label"] for row in rows[1]]
    for name in ("reliability", "first_token_reliability", "risk_coverage", "accuracy_by_steps"):
        assert (tmp_path / "two" / f"{name}.png").read_bytes().startswith(PNG)
    assert result["version"] == "0.1.0" and result["commit"]
    assert result["calibration_bins"] == 15 and result["scores"]["accuracy"] < 0.2

    # the file of predictions, scored without the student, has the same scores
    again = run(
        None,
        world,
        eval__dir=str(tmp_path / "again"),
        eval__predictions=str(tmp_path / "one/predictions.jsonl"),
    )
    assert again["scores"] == pytest.approx(result["scores"])


def test_a_task_with_few_labels_gets_a_confusion_matrix(tmp_path, world):
    for split, n in (("train", 9), ("test", 6)):
        rows = [
            {"question": f"{split} {i}", "label": "yes" if i % 2 else "no", "rationale": "So it is."}
            for i in range(n)
        ]
        lines(tmp_path / "data" / f"{split}.jsonl", rows)
    said = [
        {
            "id": f"jsonl/test/{i}",
            "question": f"test {i}",
            "label": "yes",
            "rationale": None,
            "confidence": 0.5,
            "first_confidence": 0.5,
        }
        for i in range(6)
    ]
    lines(tmp_path / "p.jsonl", said)
    settings_ = {
        "data__task": "jsonl",
        "data__path": str(tmp_path / "data"),
        "eval__dir": str(tmp_path / "out"),
    }
    result = run(None, world, eval__predictions=str(tmp_path / "p.jsonl"), **settings_)
    assert result["scores"]["accuracy"] == 0.5 and result["scores"]["ece"] == 0.0
    assert "faithful" not in result["scores"] and "rationale_bleu" not in result["scores"]
    assert (tmp_path / "out/confusion.png").read_bytes().startswith(PNG)


def test_what_it_refuses(student, tmp_path, world):
    def refused(message: str, student_, **overrides) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            run(student_, world, eval__dir=str(tmp_path / "out"), **overrides)

    refused("give either a STUDENT", None)
    refused("give either a STUDENT", student, eval__predictions="p.jsonl")
    refused("evaluate one task at a time", student, data__task=["demo", "demo_pretrain"])
    refused("is a preset, whose weights are random", "demo-student")
    refused("data.task 'dmo' is unknown", student, data__task="dmo")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((student / name).read_bytes())
    refused(f"STUDENT is {str(bare)!r}, which holds no tokenizer", bare)
    (bare / "complete.json").write_text("{}")
    refused("is a checkpoint for resuming a run", bare)
    (tmp_path / "config.yaml").write_text("")
    refused("is a run without a student", tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_command_line(student, tmp_path):
    env = alone()

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=env,
            cwd=tmp_path,
        )

    bad = command(str(student), "--eval.splitt", "test")
    assert bad.returncode == 2 and "error: unknown setting 'eval.splitt'" in bad.stderr
    shown = command("--help")
    assert shown.returncode == 0 and "--eval.embedding_model" in shown.stdout
