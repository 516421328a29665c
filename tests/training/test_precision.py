"""`student.precision` auto: what it becomes, and where a run says so."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml
from harness import FORKED, as_arguments, launch, tiny

from ibdistill.config import consistency
from ibdistill.config.load import load_settings
from ibdistill.runtime import hardware
from ibdistill.training import device, prepare


@pytest.mark.parametrize("asked", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("multiplies", [False, True])
def test_auto_is_bf16_where_the_device_multiplies_in_it(asked, multiplies):
    config = load_settings(None, {"student.precision": asked})
    consistency.settle_precision(config, multiplies_bf16=multiplies)
    assert config.student.precision == (asked if asked != "auto" else "bf16" if multiplies else "fp32")


@pytest.mark.parametrize("has", [False, True])
def test_a_device_multiplies_in_bf16_if_it_has_the_units(monkeypatch, has):
    """Emulation does not count: it is slower than fp32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert hardware.multiplies_bf16(torch.device("cuda", 0)) == has
    assert not hardware.multiplies_bf16(torch.device("cpu"))


def test_a_run_on_a_gpu_settles_it_before_anything_is_written(monkeypatch, tmp_path, world):
    config = load_settings(None, tiny(tmp_path / "run"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(prepare.memory_check, "check", lambda *_: None)
    lines = []
    monkeypatch.setattr(device.implementation, "compilation_trouble", lambda: "there is no C compiler")
    monkeypatch.setattr(device.logger, "warning", lambda text, *values: lines.append(text % values))
    prepare.open_run(config, dataclasses.replace(world, device=torch.device("cuda", 0)))
    assert [line.split(": ")[1] for line in lines] == ["there is no C compiler"]  # probed at the start, too
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert settings["student"]["precision"] == config.student.precision == "bf16"


def test_fp32_on_a_gpu_is_full_precision():
    """Nothing here switches TF32 on."""
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_run_on_a_cpu_is_in_fp32_and_says_so(tmp_path):
    settings = tiny(tmp_path / "run", **{"optim.max_steps": 2, "run.export": False, "run.test_limit": 2})
    log = tmp_path / "log"
    assert launch([FORKED, "2", *as_arguments(settings)], log=log) == 0, log.read_text()[-2000:]
    assert json.loads((tmp_path / "run/result.json").read_text())["precision"] == "fp32"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["student"]["precision"] == "fp32"


@pytest.mark.parametrize("trouble", [None, "no Python.h (Debian, Ubuntu: apt-get install python3-dev)"])
def test_one_line_says_that_triton_cannot_compile(monkeypatch, world, trouble):
    lines = []
    monkeypatch.setattr(device.implementation, "compilation_trouble", lambda: trouble)
    monkeypatch.setattr(device.logger, "warning", lambda text, *values: lines.append(text % values))
    device.warn_of_slow_losses()
    expected = f"rank 0 computes the losses in torch, which is slower than in Triton: {trouble}"
    assert lines == ([expected] if trouble else [])
