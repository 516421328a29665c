"""Evaluation as a command: the same on one rank and two, its files, and what it refuses."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat_tokenizers import chatml
from harness import IN_FULL, ROOT, alone, launch
from miniatures import lines
from tiny_models import byte_tokenizer, tiny

from ibdistill import evaluate_student
from ibdistill.config import fields
from ibdistill.config.evaluation_sections import StudentEvaluation
from ibdistill.config.load import load_settings, to_yaml
from ibdistill.config.sections import Config, DataConfig, ObjectiveConfig, StudentConfig
from ibdistill.data import tokenizers
from ibdistill.models.prompt import Prompt
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
        "eval.samples": 2,
        "eval.ks": "1,2",
        "eval.seeds": 2,
    }
    arguments = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
    log = tmp_path / "log"
    two = [SCRIPT, str(student), *arguments, "--eval.dir", str(tmp_path / "two")]
    code = launch(two, ranks=2, log=log, env=IN_FULL)
    assert code == 0, log.read_text()[-3000:]
    result = run(student, world, eval__dir=str(tmp_path / "one"), **limits)
    written = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert written[0] == result and (written[0].pop("ranks"), written[1].pop("ranks")) == (1, 2)
    assert all(content.pop("seconds") >= 0 for content in written)
    assert all(content.pop("commit") for content in written)  # somebody may work on the code meanwhile
    assert written[0]["scores"] == pytest.approx(written[1].pop("scores"), rel=1e-4)
    sampled = written[0]["sampled"]["predict"]
    assert {"avg@2", "avg@2_low", "avg@2_seeds_high", "pass@1", "pass@2", "cut_off"} <= sampled.keys()
    assert written[0]["sampling"] == written[1]["sampling"]
    drawn = [(tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("one", "two")]
    # rounding depends on the padding of a batch, and may turn a token over
    assert sum(a != b for a, b in zip(*drawn, strict=True)) <= 2 and len(set(drawn[0])) == 21 * 2 * 2
    assert written[1].pop("sampled")["predict"] == pytest.approx(sampled, abs=0.05)
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
        eval__math_verify=True,
    )
    assert 0 <= again["scores"].pop("accuracy_math_verify") < 0.2
    assert again["scores"] == pytest.approx(result["scores"])
    read = str(tmp_path / "one/predictions.jsonl")
    first = run(None, world, eval__dir=str(tmp_path / "first"), eval__predictions=read, eval__limit=3)
    written = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "first")]
    assert first["records"] == 3 and written[1].splitlines() == written[0].splitlines()[:3]


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


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ibdistill"), "propagate", True)
    caplog.set_level(logging.INFO, "ibdistill")
    return lambda level: list(dict.fromkeys(r.getMessage() for r in caplog.records if r.levelno == level))


def run_folder(folder: Path, **overrides) -> Path:
    """A run folder with nothing but its settings and a student's folder."""
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    (folder / "student").mkdir(parents=True)
    (folder / "config.yaml").write_text("# ibdistill 0\n" + to_yaml(load_settings(None, given)))
    return folder


def test_a_run_s_settings_are_taken_and_given_ones_win(tmp_path, said):
    given = {
        "data__task": "jsonl",
        "data__path": "3",  # text, though it looks like a number
        "data__question_field": "ask",
        "data__max_label_tokens": 7,
        "data__subsample": 0.5,
        "data__valid_share": 0.2,
    }
    run_ = run_folder(tmp_path / "run", **given)
    for source in (run_, run_ / "student"):
        config = fields.from_flat(StudentEvaluation, evaluate_student.with_run(str(source), {}))
        data = config.data
        assert (data.task, data.path, data.question_field) == ("jsonl", "3", "ask")
        assert (data.max_label_tokens, data.valid_share, data.subsample) == (7, 0.2, 1.0)
        assert config.eval.rationales
    assert any("data.max_label_tokens 7" in line for line in said(logging.INFO))
    assert said(logging.WARNING) == []

    # of a file of predictions too
    predictions = {"eval.predictions": str(run_ / "predictions/step-00000001/test_jsonl.jsonl")}
    assert evaluate_student.with_run(None, predictions)["data.question_field"] == "ask"

    changed = evaluate_student.with_run(str(run_), {"data.max_label_tokens": "9", "data.valid_share": "0.2"})
    assert fields.from_flat(StudentEvaluation, changed).data.max_label_tokens == 9
    expected = f"data.max_label_tokens is 9 as given, and was 7 in {run_ / 'config.yaml'}"
    assert said(logging.WARNING) == [expected]

    # another task has other data; a task of a mixture has the mixture's
    assert evaluate_student.with_run(str(run_), {"data.task": "svamp"}).get("data.path") is None
    mixture = run_folder(
        tmp_path / "mixture",
        data__task=["svamp", "asdiv"],
        data__path="D",
        data__mixture_weights=[1, 2],
        data__map_numbers=True,
    )
    settings = evaluate_student.with_run(str(mixture), {"data.task": "asdiv"})
    data = fields.from_flat(StudentEvaluation, settings).data
    assert (data.task, data.path, data.map_numbers, data.mixture_weights) == ("asdiv", "D", True, None)


def test_a_student_that_was_not_taught_rationales_is_not_asked_for_them(tmp_path):
    run_ = run_folder(tmp_path / "run", objective__method="finetune")
    assert evaluate_student.with_run(str(run_), {})["eval.rationales"] is False
    assert evaluate_student.with_run(str(run_), {"eval.rationales": True})["eval.rationales"] is True


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"- a\n", b"data: 3\n", b"{", b"data: {task: []"])
def test_a_damaged_config_of_a_run_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="config.yaml cannot be read as the settings of a run"):
        evaluate_student.with_run(str(tmp_path), {})


@pytest.mark.parametrize("method", ["finetune", "dss", "cot", "dss+cot"])
@pytest.mark.parametrize("form", ["plain", "chat"])
def test_a_student_without_its_run_is_asked_as_its_prompt_says(tmp_path, method, form):
    """Copied elsewhere, it has the settings that its run gives an evaluation."""
    data = {"task": "svamp", "format": form, "max_question_tokens": 70, "map_numbers": True}
    if form == "chat":
        data |= {"system": "Be brief.", "think_open": "<t>", "think_close": "</t>"}
    data |= {"max_rationale_tokens": 40} if method != "finetune" else {}
    data |= {"answer_marker": "so:"} if "cot" in method and form == "plain" else {}
    config = Config(data=DataConfig(**data), objective=ObjectiveConfig(method=method))
    prompt = Prompt.of(tiny("llama"), chatml() if form == "chat" else byte_tokenizer(), config)
    given, folder = {"eval.limit": 3}, tmp_path / "student"
    folder.mkdir()
    prompt.write(folder)
    copied = evaluate_student.with_run(str(folder), given)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    of_run = evaluate_student.with_run(str(folder), given)
    assert fields.from_flat(StudentEvaluation, copied) == fields.from_flat(StudentEvaluation, of_run)
    (tmp_path / "config.yaml").unlink()
    assert evaluate_student.with_run(str(folder), {"data.system": "x"})["data.system"] == "x"


@pytest.mark.parametrize("label, rationale", [(2, 2), (3, 40), (20, 9)])
def test_a_reasoning_keeps_its_limit_where_its_prompt_has_only_the_sum(tmp_path, label, rationale):
    data = DataConfig(task="svamp", max_label_tokens=label, max_rationale_tokens=rationale)
    config = Config(data=data, objective=ObjectiveConfig(method="cot"))
    Prompt.of(tiny("llama"), byte_tokenizer(), config).write(tmp_path)
    settings = evaluate_student.with_run(str(tmp_path), {})
    found = fields.from_flat(StudentEvaluation, settings).data
    assert found.answer_limits()["reason"] == label + rationale


def test_without_a_run_the_given_settings_are_all(tmp_path):
    for source in ("org/student", str(tmp_path / "student"), None):
        assert evaluate_student.with_run(source, {"data.task": "svamp"}) == {"data.task": "svamp"}


def test_questions_without_labels_are_answered_and_those_with_one_are_scored(student, tmp_path, world):
    settings = {
        "eval__questions": str(tmp_path / "q.jsonl"),
        "data__task": "jsonl",
        "data__question_field": "ask",
        "data__max_label_tokens": 4,
        "data__max_rationale_tokens": 4,
    }
    lines(tmp_path / "q.jsonl", [{"ask": "tom had 3 apples ."}, {"ask": "ann had 4 ."}])
    result = run(student, world, eval__dir=str(tmp_path / "bare"), **settings)
    assert (result["records"], result["scored"], result["scores"]) == (2, 0, {})
    assert json.loads((tmp_path / "bare/result.json").read_text()) == result
    bare = [json.loads(line) for line in (tmp_path / "bare/predictions.jsonl").open()]
    assert [row["question"] for row in bare] == ["tom had 3 apples .", "ann had 4 ."]
    assert all(row["correct"] is None and row["gold"] == "" and row["rationale"] is not None for row in bare)
    assert not list((tmp_path / "bare").glob("*.png"))

    # the student's own answer as the label of one of them
    label = bare[1]["label"] or "x"
    lines(tmp_path / "q.jsonl", [{"ask": "tom had 3 apples ."}, {"ask": "ann had 4 .", "label": label}])
    result = run(student, world, eval__dir=str(tmp_path / "one"), **settings)
    assert (result["records"], result["scored"]) == (2, 1)
    assert result["scores"]["accuracy"] == float(bool(bare[1]["label"]))
    one = [json.loads(line) for line in (tmp_path / "one/predictions.jsonl").open()]
    assert [row["label"] for row in one] == [row["label"] for row in bare]
    assert one[0]["correct"] is None and one[1]["correct"] == bool(bare[1]["label"])

    # the file of predictions against the same questions
    again = {**settings, "eval__predictions": str(tmp_path / "one/predictions.jsonl")}
    assert run(None, world, eval__dir=str(tmp_path / "again"), **again)["scores"] == result["scores"]


@pytest.mark.parametrize("rationales, streams", [(True, ["predict", "explain"]), (False, ["predict"])])
def test_cut_questions_are_counted_in_the_streams_that_are_asked(
    student, tmp_path, world, said, rationales, streams
):
    lines(tmp_path / "q.jsonl", [{"question": "tom had 3 apples ."}, {"question": "tom ."}])
    settings = {
        "eval__questions": str(tmp_path / "q.jsonl"),
        "eval__rationales": rationales,
        "data__task": "jsonl",
        "data__max_question_tokens": 6,
        "data__max_label_tokens": 4,
        "data__max_rationale_tokens": 4,
    }
    run(student, world, eval__dir=str(tmp_path / "out"), **settings)
    longer = "evaluation: 1 of 2 {} questions are longer than 6 tokens and were cut"
    told = [line for line in said(logging.WARNING) if "were cut" in line and "questions" in line]
    assert sorted(told) == sorted(map(longer.format, streams))


def test_a_plot_that_cannot_be_written_is_a_warning(student, tmp_path, world, said):
    (tmp_path / "out/risk_coverage.png").mkdir(parents=True)
    settings = {"eval__limit": 2, "eval__rationales": False, "data__max_label_tokens": 4}
    run(student, world, eval__dir=str(tmp_path / "out"), **settings)
    warnings = [line for line in said(logging.WARNING) if "evaluation: " not in line]
    assert ["risk_coverage.png is left out" in line for line in warnings] == [True]  # besides cut labels
    assert (tmp_path / "out/result.json").is_file() and (tmp_path / "out/reliability.png").is_file()


def test_what_it_refuses(student, tmp_path, world):
    def refused(message: str, student_, **overrides) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            run(student_, world, eval__dir=str(tmp_path / "out"), **overrides)

    refused("give either a STUDENT", None)
    refused("give either a STUDENT", student, eval__predictions="p.jsonl")
    refused("evaluate one task at a time", student, data__task=["demo", "demo_pretrain"])
    refused("is a preset, whose weights are random", "demo-student")
    refused("data.task 'dmo' is unknown", student, data__task="dmo")
    refused("eval.samples is 2, and eval.predictions has one", None, eval__predictions="p", eval__samples=2)
    refused("eval.ks is [1, 4], and eval.samples 3", student, eval__samples=3, eval__ks=[1, 4])
    refused("eval.temperature is 0.7, which is for samples, and", student, eval__temperature=0.7)
    refused("eval.ks is [1, 4], which is for samples, and eval.samples is 0", student, eval__ks=[1, 4])
    refused("eval.seeds is 3, which is for samples", None, eval__predictions="p", eval__seeds=3)
    refused("eval.engine is 'vllm', and vllm is not installed", student, eval__engine="vllm")
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match=f"eval.dir is '.*{name}', which cannot be written"):
            run("no/student", world, eval__dir=str(tmp_path / name))
    questions = {"eval__questions": str(tmp_path / "none.jsonl")}
    refused("data.task 'dmo' is unknown", student, data__task="dmo", **questions)
    refused(f"eval.questions {questions['eval__questions']!r} is no file", student, **questions)
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
    log = tmp_path / "log"
    assert launch([SCRIPT, str(student), "--eval.splitt", "test"], log=log) == 2
    assert "error: unknown setting 'eval.splitt'" in log.read_text()
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, env=alone())
    assert shown.returncode == 0 and "--eval.embedding_model" in shown.stdout
