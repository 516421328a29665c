"""Answers compared by their mathematical value, whatever a model wrote."""

from __future__ import annotations

import importlib.util
import time

import pytest

from ibdistill.evaluation import math_equal

pytest.importorskip("math_verify")


def test_values_and_forms():
    same = [
        *(("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), ("8", "8.0"), ("1,200", "1200"), ("x+1", "1+x")),
        *((r"\sqrt{8}", r"2\sqrt{2}"), ("$5$", "5"), ("12 - 5", "7"), ("Paris", "Paris"), ("", "")),
    ]
    different = [("", "7"), ("8", "9"), ("1/3", "0.33"), ("x", "y"), ("7\n8", "9"), ("1" * 400, "2")]
    assert math_equal.equal(same) == [True] * len(same)
    assert math_equal.equal(different) == [False] * len(different)


def test_what_a_model_writes_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path('{mark}').touch()"
    assert (
        math_equal.equal([(code, "1"), (f"eval({code!r})", "1"), (f"${code}$ 1", "1 + 0")])[:2] == [False] * 2
    )
    assert not mark.exists()


def test_endless_work_is_cut_off_and_the_next_pair_is_compared(monkeypatch):
    monkeypatch.setattr(math_equal, "SECONDS", 2.0)
    start = time.monotonic()
    pairs = [("9^{9^{9^{9}}} - 1", "3"), ("7.0", "7"), ("9!!!!!!", "3"), ("7", "14/2")]
    found = math_equal.equal(pairs)
    assert (found[1], found[3]) == (True, True) and found[0] is False and found[2] is False
    assert time.monotonic() - start < 40


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="eval.math_verify needs the package math-verify, which is not installed"
    ):
        math_equal.check_installed()
