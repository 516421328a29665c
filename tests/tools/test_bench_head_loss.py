"""tools/bench/head_loss.py: runs, measures what it says, and refuses on a red test."""

import csv
import importlib.util
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
from harness import start_server

PATH = Path(__file__).parents[2] / "tools/bench/head_loss.py"
TINY = {"B": 2, "predict": 2, "explain": 3, "D": 8, "V": 50, "D_t": 12, "rounds": 1}


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("head_loss", PATH)
    module = importlib.util.module_from_spec(spec)
    # processes that measure memory import it by name
    monkeypatch.setitem(sys.modules, "head_loss", module)
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec.loader.exec_module(module)
    # compiling takes longer than all else, and isn't what is tested
    monkeypatch.setattr("torch.compile", lambda function: function)
    return module


def test_nothing_is_measured_on_a_red_test(bench, tmp_path, monkeypatch, capsys):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert 1 + 1 == 3\n")
    monkeypatch.setattr(bench, "TESTS", tmp_path)
    monkeypatch.setattr(bench, "measure", None)
    with pytest.raises(SystemExit, match="the tests of the ops fail: nothing is measured"):
        bench.main(**TINY)


def test_a_green_test_lets_it_measure(bench, tmp_path, monkeypatch):
    (tmp_path / "test_green.py").write_text("def test_green():\n    pass\n")
    monkeypatch.setattr(bench, "TESTS", tmp_path)
    monkeypatch.setattr(bench, "in_a_process", lambda *_: (10, 2))
    bench.main(**TINY, out=str(tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {"eager", "compile", "torch", "twin", "products"}
    assert {row["implementation"] for row in rows} >= names and len(rows) >= 2 * len(names)
    assert all(float(row["seconds"]) > 0 for row in rows)


@pytest.mark.parametrize("entry", ["logits", "vid"])
def test_the_other_entries(bench, entry, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_a_process", lambda *_: (10, 2))
    bench.main(**TINY, entry=entry, check=False)
    out = capsys.readouterr().out
    assert "eager" in out and ("products" in out) == (entry == "vid")


def test_peak_memory_of_a_process(bench, monkeypatch):
    """Eager holds all logits, B (16 + 64) V float32 of them, several times; the lean path's chunk is less.

    The second process is a fork of one that has imported all.
    """
    sizes = bench.Sizes(4, 16, 48, 16, 32128, 0, bench.torch.float32, "cpu", "head", bench.MISettings())
    logits = sizes.tokens * sizes.V * 4
    eager = bench.in_a_process(sizes, "eager", True)
    start_server()
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: get_context("forkserver"))
    lean = bench.in_a_process(sizes, "torch", True)
    assert eager[1] == lean[1] == (sizes.tokens + sizes.V) * 16 * 4
    assert eager[0] - eager[1] > 2 * logits
    assert lean[0] - lean[1] < logits


def test_refusals(bench):
    with pytest.raises(ValueError, match="entry = 'hidden' is not one of: head, logits, vid"):
        bench.main(**TINY, entry="hidden", check=False)
    if not bench.torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--tune needs a GPU"):
            bench.main(**TINY, tune=True, check=False)
