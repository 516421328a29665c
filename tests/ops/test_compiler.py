"""The probe for what Triton compiles with: no compiler, no Python.h, and what the losses do then."""

from __future__ import annotations

import sysconfig
from types import SimpleNamespace

import pytest
import torch

from ibdistill.ops import implementation


@pytest.fixture
def probe(monkeypatch):
    """The probe as in a fresh process without CC."""
    monkeypatch.delenv("CC", raising=False)
    implementation.compilation_trouble.cache_clear()
    yield implementation.compilation_trouble
    implementation.compilation_trouble.cache_clear()


def test_no_compiler_is_named(probe, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C compiler" in probe() and "python3-dev" in probe()


def test_a_missing_header_is_named(probe, monkeypatch, tmp_path):
    """Whether the compiler is there or not has been asked before; a stand-in for one fails as gcc does."""
    compiler = tmp_path / "gcc"
    compiler.write_text('#!/bin/sh\necho "fatal error: Python.h: No such file or directory" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    paths = sysconfig.get_paths() | {"include": str(tmp_path / "none")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: paths)
    assert probe() == f"{tmp_path / 'none'} has no Python.h (Debian, Ubuntu: apt-get install python3-dev)"


def test_a_compiler_that_fails_is_named(probe, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "false")
    assert probe().startswith("the C compiler false fails")
    probe.cache_clear()
    monkeypatch.setenv("CC", "/no/such/cc")
    assert probe().startswith("the C compiler /no/such/cc cannot be run")


def test_what_can_compile_has_no_trouble(probe, monkeypatch, tmp_path):
    compiler = tmp_path / "gcc"
    compiler.write_text('#!/bin/sh\ngrep -q "#include <Python.h>" "$1"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert probe() is None


@pytest.mark.parametrize("trouble", [None, "there is no C compiler"])
def test_the_losses_fall_back_to_torch(monkeypatch, trouble):
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(implementation, "compilation_trouble", lambda: trouble)
    monkeypatch.setattr(implementation.importlib.util, "find_spec", lambda name: name)
    chosen = "torch" if trouble else "triton"
    assert implementation.choose("a loss", "auto", on_gpu) == chosen
    if trouble:
        with pytest.raises(ValueError, match="impl = 'triton' can't run: there is no C compiler"):
            implementation.choose("a loss", "triton", on_gpu)
