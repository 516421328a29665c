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


def test_what_the_figures_show(tmp_path):
    runs = [make_run(tmp_path / f"ib{seed}", 0.5 + 0.1 * seed, "ib", seed) for seed in range(3)]
    make_events(runs[0])
    grouped = compare_runs.groups(runs)
    assert compare_runs.score_panels(grouped)["demo accuracy"] == {"ib": [0.5, 0.6, 0.7]}
    panels, without = compare_runs.curve_panels(grouped)
    assert panels.keys() == {"loss/total", "eval/valid_demo_accuracy"} and without == runs[1:]
    name, steps, values = panels["loss/total"][0]
    assert (name, steps) == ("ib", [1, 2, 3, 4, 5])
    assert values == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    accuracy = compare_runs.draw_scores(grouped).axes[0]
    # 0.5, 0.6, 0.7: standard deviation 0.1, t of 2 degrees of freedom 4.303
    (bar,) = accuracy.collections
    ends = bar.get_segments()[0][:, 0]
    assert ends == pytest.approx([0.6 - 4.303 * 0.1 / math.sqrt(3), 0.6 + 4.303 * 0.1 / math.sqrt(3)])
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["ib (3)"]
    assert accuracy.get_xlim() == pytest.approx((0.38, 0.82))  # by the runs, not by the interval


def test_names_are_drawn_as_they_are_written(tmp_path):
    """matplotlib would typeset one of these names, fail at another, and leave the third out of the legend."""
    names = ["$a and $b", r"$\frac{$", "_hidden"]
    runs = [make_run(tmp_path / name, 0.5, "ib", 0) for name in names]
    for run in runs:
        make_events(run)
    grouped = {run.name: [run] for run in runs}
    scores = compare_runs.draw_scores(grouped)
    curves = compare_runs.draw_curves(grouped, compare_runs.curve_panels(grouped)[0])
    for figure in (scores, curves):
        figure.savefig(tmp_path / "figure.png")
    shown = [r"\$a and \$b", r"\$\frac{\$", " _hidden"]
    rows = [label.get_text() for label in scores.axes[0].get_yticklabels()]
    assert rows == [f"{name} (1)" for name in shown]
    assert [text.get_text() for text in curves.legends[0].get_texts()] == shown


def study_runs(folder: Path, arms: list[str]) -> list[Path]:
    """Three seeds of each arm, as a study names and sets them: the models differ with the seed."""
    return [
        make_run(
            folder / f"{arm}-n300-s{seed}-{(31 * i + seed):08x}",
            0.5 + 0.02 * i + 0.01 * seed,
            arm,
            seed,
            lr=seed / 10,
        )
        for i, arm in enumerate(arms)
        for seed in range(3)
    ]


def test_a_studys_runs_are_grouped_by_arm_and_an_arm_keeps_its_look(tmp_path):
    arms = [f"arm{i}" for i in range(14)]
    runs = study_runs(tmp_path, arms)
    for run in runs:
        make_events(run)
    grouped = compare_runs.groups(runs)
    assert {name: len(folders) for name, folders in grouped.items()} == {f"{arm}-n300": 3 for arm in arms}
    looks = [(style["color"], style["linestyle"]) for style in map(compare_runs.look, range(60))]
    assert len(set(looks)) == 60
    scores = compare_runs.draw_scores(grouped)
    curves = compare_runs.draw_curves(grouped, compare_runs.curve_panels(grouped)[0])
    for axes in scores.axes:
        colors = [line.get_color() for line in axes.lines if len(line.get_xdata()) == 3]  # the three runs
        assert colors == [compare_runs.look(i)["color"] for i in range(14)]
    for axes in curves.axes:
        assert [line.get_color() for line in axes.lines[::3]] == colors
    again = make_run(tmp_path / "arm0-n300-s0-ffffffff", 0.1, "arm0", 0)
    twice = compare_runs.groups([*runs, again])  # no repetitions: two configurations of one arm
    assert "arm0-n300" not in twice and len(twice["arm1-n300"]) == 3
    assert sum(map(len, twice.values())) == len(runs) + 1


def test_what_is_no_run_is_skipped_with_a_word(tmp_path, capsys):
    """The second time `runs/*` holds the pictures of the first."""
    run = make_run(tmp_path / "dss", 0.5, "dss", 0)
    (tmp_path / "notes").mkdir()
    for _ in range(2):
        compare_runs.main([str(path) for path in sorted(tmp_path.iterdir())])
    said = capsys.readouterr().err
    assert f"skipped: {tmp_path / 'comparison_scores.png'} has no result.json" in said
    assert f"skipped: {tmp_path / 'notes'} has no result.json: no run, or not finished" in said
    assert f"skipped: {run}" not in said


def test_a_run_that_is_given_twice_counts_once_and_a_copy_of_it_is_no_seed_more(tmp_path, capsys):
    run = make_run(tmp_path / "runs/dss", 0.5, "dss", 0)
    copy, other = (
        make_run(tmp_path / "runs/copy", 0.5, "dss", 0),
        make_run(tmp_path / "runs/b", 0.6, "dss", 1),
    )
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "runs/gone").symlink_to(tmp_path / "none")
    given = [run, run.parent / "b/../dss", tmp_path / "link", run.parent / "gone", other]
    assert compare_runs.runs_among(given) == [run, other]
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [f"skipped: {path} is the run {run} again" for path in given[1:3]]
    assert said[2].startswith(f"skipped: {given[3]} has no result.json") and len(said) == 3
    assert compare_runs.groups([run, other]) == {"dss": [run, other]}
    twice = compare_runs.groups([run, copy, other])
    assert twice == {folder.name: [folder] for folder in (run, copy, other)}
    again = (
        make_run(tmp_path / "lr", 0.5, "dss", 0, lr=0.2),
        make_run(tmp_path / "lr1", 0.5, "dss", 1, lr=0.2),
    )
    assert compare_runs.groups([run, copy, *again]) == {
        str(run): [run],
        str(copy): [copy],
        "dss lr 0.2": list(again),
    }


def test_scores_that_a_run_lacks_are_left_out(tmp_path, capsys):
    """A task without a test split has none; NaN and null are no scores."""
    tests = [{}, {"demo": {}}, {"demo": {"accuracy": None, "ece": math.nan}}, {"demo": {"accuracy": 0.5}}]
    runs = [make_run(tmp_path / str(i), 0, f"m{i}", 0) for i in range(4)]
    for run, test in zip(runs, tests, strict=True):
        content = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(content | {"test": test}))
    compare_runs.main([str(run) for run in runs[:3]])
    said = capsys.readouterr().out
    assert said.endswith("figures: none, as no run has curves or scores\n") and not list(
        tmp_path.glob("*.png")
    )
    assert [line.split()[2:4] for line in said.splitlines()[1:4]] == [
        ["-", "-"],
        ["demo", "-"],
        ["demo", "-"],
    ]
    compare_runs.main([str(run) for run in runs])
    assert (tmp_path / "comparison_scores.png").is_file()
    assert compare_runs.score_panels(compare_runs.groups(runs)) == {"demo accuracy": {"3": [0.5]}}


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


NO_TEST = b'{"method": "dss", "test": null, "steps": 1, "tokens": 1, "seconds": 1}'


@pytest.mark.parametrize(
    "content", [None, b"{", b"[]", b'{"method": "dss"}', b"\xff\x00", b"[" * 10**5, NO_TEST]
)
def test_folders_without_a_result_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(SystemExit, match="error: .*(has no result.json|is no result of train.py)"):
        compare_runs.main([str(tmp_path)])


@pytest.mark.parametrize("content", [b"\xff\x00", b"run: [", b"a: \x01"])
def test_a_damaged_config_yaml_is_named(tmp_path, content):
    run = make_run(tmp_path / "dss", 0.5, "dss", 0)
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(SystemExit, match=r"error: .*dss/config\.yaml is damaged: "):
        compare_runs.main([str(run)])
