"""What is refused before anything starts: by the job scripts in a dry run, and by `train.py` itself."""

from __future__ import annotations

import gzip
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import output_of, tiny

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.training import device, early_checks
from ibdistill.training.prepare import prepare

ROW = '{"question": "q", "label": "l", "rationale": "r"}\n'


def refused(**settings: object) -> str:
    """What `check` says about the settings; a double underscore stands for the point in a name."""
    given = {name.replace("__", "."): value for name, value in settings.items()}
    with pytest.raises(ValueError) as error:
        early_checks.check(load_settings(None, given))
    return str(error.value)


def file(path: Path, content: bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "begins"),
    [
        ("data.csv", b"question,label\nq,l\n", "'question,label\\nq,l\\n'"),
        ("data.jsonl", b'\xef\xbb\xbf"question";"label"\n', '\'"question";'),
        ("train.xlsx", b"PK\x03\x04\x14", "'PK\\x03\\x04\\x14'"),
    ],
)
def test_a_table_is_refused_with_the_way_out(tmp_path, name, content, begins):
    path = file(tmp_path / name, content)
    for setting in ({"data__path": path}, {"data__unlabelled": path, "data__path": "."}):
        task = "svamp" if "data__unlabelled" in setting else "jsonl"
        message = refused(data__task=task, **setting)
        assert f"{path} begins with {begins}" in message and "one JSON object per line" in message
        assert 'load_dataset("csv"' in message


def test_files_of_a_folder_are_looked_at_too(tmp_path):
    file(tmp_path / "train.csv", b"question,label\n")
    message = refused(data__task="jsonl", data__path=str(tmp_path))
    assert "lacks train.jsonl and test.jsonl" in message
    file(tmp_path / "train.jsonl", ROW.encode())
    file(tmp_path / "test.jsonl", b"question,label\n")
    assert "test.jsonl begins with 'question,label" in refused(data__task="jsonl", data__path=str(tmp_path))
    assert "data.path is not set" in refused(data__task="jsonl")


@pytest.mark.parametrize(
    "content",
    [ROW.encode(), b"\n  [\n]", gzip.compress(ROW.encode()), b"PAR1...", b"", b"\xff\xfe{\x00"],
    ids=["row", "list", "gzip", "parquet", "empty", "UTF-16"],  # gzip's bytes hold the time
)
def test_what_the_reader_takes_or_explains_itself_passes(tmp_path, content):
    path = file(tmp_path / "any name.csv", content)
    early_checks.check(load_settings(None, {"data.task": "jsonl", "data.path": path}))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (
            {"model_type": "t5", "architectures": ["T5EncoderModel"], "is_encoder_decoder": False},
            "T5EncoderModel",
        ),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel"),
        ({"model_type": "xlm-roberta"}, "xlm-roberta"),
    ],
)
def test_an_encoder_is_neither_student_nor_teacher(tmp_path, model, named):
    file(tmp_path / "config.json", json.dumps(model).encode())
    said = f"'{tmp_path}', by its config.json a {named}: an encoder, which writes no text. Take a model with"
    assert f"student.model is {said}" in refused(student__model=str(tmp_path))
    message = refused(teacher__model=str(tmp_path), teacher__placement="replica", objective__method="kd")
    assert f"teacher.model is {said}" in message


def test_a_model_whose_configuration_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert "config.json is a named pipe, a device or a socket" in refused(student__model=str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b'{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}',
        b'{"model_type": "llama", "architectures": ["LlamaModel"]}',
        b'{"model_type": "llama", "architectures": null}',
        b"[]",
        b"{",
        b"\xff",
    ],
)
def test_other_models_and_damaged_ones_are_left_to_those_who_load_them(tmp_path, content):
    file(tmp_path / "config.json", content)
    early_checks.check(load_settings(None, {"student.model": str(tmp_path)}))


@pytest.mark.parametrize(("part", "stage"), [("offload_optimizer", 2), ("offload_param", 3)])
def test_offload_to_nvme_needs_libaio(world, tmp_path, monkeypatch, part, stage):
    """Where DeepSpeed would end with a traceback once the student is loaded."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops import op_builder

    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    content = json.dumps({"zero_optimization": {"stage": stage, part: offload}}).encode()
    settings = tiny(tmp_path / "run", **{"deepspeed.config": file(tmp_path / "nvme.json", content)})
    found = SimpleNamespace(is_compatible=lambda: False)
    monkeypatch.setattr(op_builder, "AsyncIOBuilder", lambda: found)
    monkeypatch.setitem(installed_ops, "async_io", False)
    said = (
        rf"deepspeed.config is '.*nvme.json', which offloads to nvme, and {socket.gethostname()} lacks libaio"
    )
    with pytest.raises(ValueError, match=f"{said} or a compiler.*install libaio-dev g..., or take the dev"):
        prepare(load_settings(None, settings), world)
    found.is_compatible = lambda: True
    device.check_node(load_settings(None, settings), world)
    found.is_compatible = lambda: False
    monkeypatch.setitem(installed_ops, "async_io", True)  # it was built when DeepSpeed was installed
    device.check_node(load_settings(None, settings), world)
    monkeypatch.setitem(installed_ops, "async_io", False)
    settings["deepspeed.config"] = "zero3_offload"
    device.check_node(load_settings(None, settings), world)


def test_train_refuses_before_it_makes_the_runs_folder(world, tmp_path, monkeypatch, capsys):
    path = file(tmp_path / "data.csv", b"question,label\n")
    run = tmp_path / "run"
    command = ["train.py", "--data.task", "jsonl", "--data.path", path, "--run.dir", str(run)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(train.distributed, "init", lambda: world)
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2 and f"{path} begins with" in capsys.readouterr().err
    assert not run.exists()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("data.path", "data.unlabelled"):
        config = load_settings(None, {"data.task": "jsonl", "data.path": str(tmp_path)})
        setattr(config.data, name.split(".")[1], str(tmp_path / "pipe.jsonl"))
        with pytest.raises(ValueError, match="pipe.jsonl is neither a file nor a folder"):
            early_checks.check(config)


def test_the_checks_need_no_torch():
    code = "import sys, ibdistill.training.early_checks; print('torch' in sys.modules)"
    assert output_of("-c", code).strip() == "False"
