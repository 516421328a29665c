"""The run folder: which settings, data and models its run belongs to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_models
from harness import steps

from ibdistill.config.load import load_settings, to_yaml
from ibdistill.runtime import version
from ibdistill.training import pseudo_labels, run_folder


def rows_of(n: int) -> list[dict[str, str]]:
    """Questions, all different, with a label and a rationale."""
    return [
        {"question": f"is {i} odd ?", "label": "n1" if i % 2 else "n0", "rationale": f"half of {i} is"}
        for i in range(n)
    ]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder with its three splits."""
    folder = tmp_path / "data"
    for split, n in (("train", 40), ("valid", 6), ("test", 8)):
        write(folder / f"{split}.jsonl", rows_of(n))
    return folder


@pytest.fixture
def begun(make_job, data):
    """Settings of a run on `data` that has a checkpoint, and what makes the job again."""
    settings = {"data.task": "jsonl", "data.path": str(data), "data.subsample": 1.0, "student.dropout": 0.0}
    settings |= {"run.report_to": []}

    def make(**overrides):
        return make_job(**(settings | overrides))

    job = make()
    steps(job, 1)
    assert job.checkpoints.save(job.engine, job.state)
    return make


def halved_and_reordered(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True)[::2])))


def with_another_first(field: str):
    def change(path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0][field] = "3" if rows[0][field] == "4" else f"{rows[0][field]} ?"
        write(path, rows)

    return change


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("data/train.jsonl", halved_and_reordered, "training records was '40 records, digest"),
        ("data/train.jsonl", with_another_first("label"), "training records was '40 records, digest"),
        ("data/train.jsonl", with_another_first("rationale"), "training records was '40 records, digest"),
        ("data/valid.jsonl", with_another_first("question"), "valid records of jsonl was '6 records, digest"),
        ("data/test.jsonl", with_another_first("label"), "test records of jsonl was '8 records, digest"),
    ],
)
def test_a_run_is_not_continued_on_other_data(begun, tmp_path, file, change, named):
    assert begun().state.step == 1
    change(tmp_path / file)
    with pytest.raises(ValueError, match="holds a run of other data or models") as refused:
        begun()
    text = str(refused.value)
    assert named in text and text.count(" was ") == 1
    assert "Choose another --run.dir, or continue it all the same with --run.allow_config_change" in text
    assert begun(**{"run.allow_config_change": True}).state.step == 1
    assert begun().state.step == 1  # the run has taken the change


@pytest.mark.parametrize(
    ("folder", "change", "named"),
    [
        ("student", {"seed": 1}, ["folder of the student was "]),
        ("teacher", {"seed": 1}, ["teacher was "]),
        ("student", {"num_hidden_layers": 3}, ["student was 'digest ", "folder of the student was "]),
        ("student", {"bos": True}, ["tokenizer was 'digest "]),
    ],
)
def test_a_run_is_not_continued_with_models_that_were_replaced(make_job, tmp_path, folder, change, named):
    """Names and settings stay, and what is in the folders changes."""
    models = {name: tiny_models.save(tmp_path / name, "qwen2") for name in ("student", "teacher")}
    settings = {f"{name}.model": path for name, path in models.items()}
    settings |= {"objective.method": "kd", "teacher.placement": "replica", "data.max_question_tokens": 100}
    job = make_job(**settings)
    steps(job, 1)
    job.checkpoints.save(job.engine, job.state)
    assert make_job(**settings).state.step == 1
    shutil.rmtree(tmp_path / folder)
    tiny_models.save(tmp_path / folder, "qwen2", **change)
    with pytest.raises(ValueError, match="holds a run of other data or models") as refused:
        make_job(**settings)
    text = str(refused.value)
    assert all(part in text for part in named) and "allow_config_change" in text


def test_a_run_is_not_continued_with_other_unlabelled_questions(make_job, monkeypatch):
    job = make_job(**{"data.unlabelled": 16})
    steps(job, 1)
    job.checkpoints.save(job.engine, job.state)
    honest = pseudo_labels.questions
    monkeypatch.setattr(pseudo_labels, "questions", lambda *given: honest(*given)[::-1])
    with pytest.raises(
        ValueError, match="unlabelled questions was '16 records, digest .*' and is '16 records"
    ):
        make_job(**{"data.unlabelled": 16})


def test_a_folder_without_a_checkpoint_takes_new_settings_and_inputs(make_job, tmp_path):
    """This is the case of a command that was refused for its data and then corrected."""
    trained = {"student.tokenizer": "train", "student.vocab_size": 200}
    first = make_job(**trained)
    vocabulary = len(first.tokenizer)
    again = make_job(
        **{"optim.lr": 0.1, "run.seed": 5, "data.subsample": 50}, **trained | {"student.vocab_size": 100}
    )
    assert again.config.optim.lr == 0.1 and len(again.features) == 50
    assert len(again.tokenizer) < vocabulary  # trained anew, not the one that lay there
    assert load_settings(str(again.folder / "config.yaml"), {}) == again.config
    found = json.loads((again.folder / "inputs.json").read_text())
    assert found["training records"].startswith("50 records, digest ")


@pytest.mark.parametrize("evidence", ["checkpoint", "result"])
def test_a_run_folder_of_another_configuration_is_refused(make_job, evidence, caplog):
    job = make_job()
    if evidence == "checkpoint":
        steps(job, 1)
        job.checkpoints.save(job.engine, job.state)
    else:  # a finished run whose checkpoints were deleted to save space
        (job.folder / "result.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"another configuration: optim.lr was 0.002 and is 0.1. Choose another"
    ):
        make_job(**{"optim.lr": 0.1})
    make_job(**{"run.log_every": 7, "optim.micro_batch_size": 4, "deepspeed.config": "zero1"})
    text = "the run continues though optim.micro_batch_size was 0 and is 4; deepspeed.config was 'zero0' and"
    assert any(text in record.getMessage() for record in caplog.records)
    assert make_job(**{"optim.lr": 0.1, "run.allow_config_change": True}).config.optim.lr == 0.1
    with pytest.raises(
        ValueError, match="weights have other shapes: student.lora_rank was 0 and is 4. Choose"
    ):
        make_job(**{"student.lora_rank": 4, "run.allow_config_change": True})


def test_other_code_may_continue_a_run_and_config_yaml_names_each(make_job, monkeypatch):
    """The lines are comments: no settings that could differ, and the file stays a recipe."""
    first = make_job()
    path = first.folder / "config.yaml"
    ours = "# ibdistill {version}, commit {commit}".format_map(version.version())
    assert path.read_text() == f"{ours}\n" + to_yaml(first.config)
    again = make_job()
    assert path.read_text() == f"{ours}\n" + to_yaml(again.config)
    monkeypatch.setattr(run_folder, "version", lambda: {"version": "9.9", "commit": "abc-dirty"})
    make_job()
    heads = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert heads == [ours, "# ibdistill 9.9, commit abc-dirty"]
    assert load_settings(str(path), {}) == first.config


@pytest.mark.parametrize("content", [b"just text", b"\xff\xfe\x00 binary", b"- a\n- list\n"])
def test_a_damaged_config_yaml_is_named(make_job, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"run/config.yaml is damaged"):
        make_job()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00 binary", b"[1]", b"{"])
def test_a_damaged_inputs_json_is_named(make_job, content):
    job = make_job()
    steps(job, 1)
    job.checkpoints.save(job.engine, job.state)
    (job.folder / "inputs.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run/inputs.json is damaged"):
        make_job()


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "checkpoints/step-00000001/complete.json"])
def test_a_pipe_in_the_run_folder_is_refused_and_not_read(make_job, tmp_path, name):
    pipe = tmp_path / "run" / name
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=f"run/{name} is a named pipe, a device or a socket, and a file bel"):
        make_job()


def test_an_unwritable_run_folder_is_refused(make_job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run.dir is '.*file/run', which cannot be written"):
        make_job(tmp_path / "file" / "run")
    (tmp_path / "run" / "inputs.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot be written: .*run/inputs.json"):
        make_job()


def test_a_run_that_cannot_be_continued_keeps_its_settings(begun):
    job = begun()
    path = job.folder / "config.yaml"
    settings = path.read_text()
    with pytest.raises(ValueError, match="another model|cannot be"):
        begun(**{"student.model": "demo-student-decoder", "run.allow_config_change": True})
    assert path.read_text() == settings
    assert begun().state.step == 1
