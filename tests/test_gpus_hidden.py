"""Tests see no GPU unless `-m gpu` chooses those that need one: see conftest.py."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, alone


@pytest.fixture
def conftest(request):
    """The file of that name in tests/."""
    return request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))


def configured(conftest, monkeypatch, expression: str) -> str | None:
    """What CUDA is told to show, given the expression behind `-m`."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    conftest.pytest_configure(SimpleNamespace(getoption={"markexpr": expression}.get))
    return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("expression", ["", "not gpu", "gpu or slow"])
def test_gpus_are_hidden(conftest, monkeypatch, expression):
    assert configured(conftest, monkeypatch, expression) == ""
    assert alone()["CUDA_VISIBLE_DEVICES"] == ""  # from the processes that tests start, too


def test_gpus_are_seen_where_the_tests_for_them_are_chosen(conftest, monkeypatch):
    assert configured(conftest, monkeypatch, "gpu") == "0,1"


def test_this_process_sees_none(request):
    if request.config.getoption("markexpr") != "gpu":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0


@pytest.mark.parametrize("there", [False, True])
def test_tests_for_a_gpu_are_skipped_without_one(conftest, monkeypatch, there):
    added = []
    item = SimpleNamespace(
        path=ROOT / "tests" / "test_any.py",
        get_closest_marker=lambda name: name == "gpu",
        add_marker=added.append,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    conftest.pytest_collection_modifyitems([item])
    assert [marker.name for marker in added] == ([] if there else ["skip"])
