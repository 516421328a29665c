"""The comparison of runs: table, groups, intervals over seeds, runs without events, what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import compare_runs
import pytest
import yaml
from harness import ROOT


def make_run(folder: Path, accuracy: float, method: str, seed: int, **settings) -> Path:
    folder.mkdir(parents=True)
    scores = {"demo": {"accuracy": accuracy, "rationale_bleu": 50.0, "ece": 0.1}}
    result = {"method": method, "steps": 5, "tokens": 100, "seconds": 1.5, "test": scores}
    (folder / "result.json").write_text(json.dumps(result))
    content = {"run": {"seed": seed, "dir": str(folder)}, "objective": {"method": method}, "optim": settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


def make_events(folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step in range(1, 6):
            writer.add_scalar("loss/total", 1 / step, step)
            writer.add_scalar("eval/valid_demo_accuracy", step / 10, step)


def test_table_groups_and_figures(tmp_path):
    runs = [make_run(tmp_path / f"ib{seed}", 0.5 + 0.1 * seed, "ib", seed, lr=0.1) for seed in range(3)]
    runs += [
        make_run(tmp_path / "dss", 0.4, "dss", 0, lr=0.1),
        make_run(tmp_path / "lr", 0.3, "dss", 0, lr=0.2),
    ]
    for run in runs[:4]:
        make_events(run)
    command = [sys.executable, str(ROOT / "tools/compare_runs.py"), *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == "run method task accuracy % rationale BLEU steps tokens train s".split()
    assert lines[1].split() == "ib0 ib demo 50.0 50.0 5 100 2".split()
    for name in ("comparison_curves.png", "comparison_scores.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and name in lines[-1]
    assert f"no curves of {runs[4]}" in done.stderr and "has no events" in done.stderr
    grouped = compare_runs.groups(runs)
    assert grouped == {"ib lr 0.1": runs[:3], "dss lr 0.1": [runs[3]], "dss lr 0.2": [runs[4]]}
    alone = [runs[0], runs[3], runs[4]]
    assert compare_runs.groups(alone) == {"ib0": [runs[0]], "dss": [runs[3]], "lr": [runs[4]]}


def test_what_the_figures_show(tmp_path, monkeypatch):
    from ibdistill.evaluation import plots

    shown = {}
    for name in ("intervals", "lines"):
        draw = getattr(plots, name)
        monkeypatch.setattr(
            plots,
            name,
            lambda panels, title, name=name, draw=draw: shown.update({name: panels}) or draw(panels, title),
        )
    runs = [make_run(tmp_path / f"ib{seed}", 0.5 + 0.1 * seed, "ib", seed) for seed in range(3)]
    make_events(runs[0])
    compare_runs.main([*map(str, runs), "--out", str(tmp_path / "new")])
    center, half = shown["intervals"]["demo accuracy"]["ib\n(3 seeds)"]
    # 0.5, 0.6, 0.7: standard deviation 0.1, t of 2 degrees of freedom 4.303
    assert center == pytest.approx(0.6) and half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert shown["lines"].keys() == {"loss/total", "eval/valid_demo_accuracy"}
    name, steps, values = shown["lines"]["loss/total"][0]
    assert (name, steps) == ("ib", [1, 2, 3, 4, 5]) and values == pytest.approx(
        [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    )
    assert (tmp_path / "new/comparison_curves.png").is_file()


def test_intervals_over_seeds():
    assert compare_runs.interval([0.4])[0] == 0.4 and math.isnan(compare_runs.interval([0.4])[1])
    assert compare_runs.interval([0.0, 1.0]) == pytest.approx((0.5, 12.706 * math.sqrt(0.5) / math.sqrt(2)))
    many = [0.0, 1.0] * 20
    assert compare_runs.interval(many)[1] == pytest.approx(2.0227 * 0.50637 / math.sqrt(40), rel=1e-4)


def test_without_any_events_only_scores_are_drawn(tmp_path, capsys):
    run = make_run(tmp_path / "a", 0.5, "dss", 0)
    (run / "config.yaml").unlink()
    compare_runs.main([str(run)])
    assert not (tmp_path / "comparison_curves.png").exists()
    assert "comparison_scores.png" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"method": "dss"}'])
def test_folders_without_a_result_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(SystemExit, match="error: .*(has no result.json|is no result of train.py)"):
        compare_runs.main([str(tmp_path)])
