"""The study: statistics by formulas of their own, what counts as finished, what is refused, real runs."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import resource
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import compare_runs
import pytest
import yaml
from harness import ROOT, WORKERS, Forked, launch, start_server
from miniatures import said, svamp
from study import arms as study_arms
from study import command, folders, paper, report, unfinished

from ibdistill.config import command_line
from ibdistill.config.load import load_settings
from ibdistill.evaluation import intervals

TINY = {
    "optim.max_steps": 2,
    "optim.batch_size": 4,
    "optim.warmup_steps": 0,
    "data.max_label_tokens": 8,
    "data.max_rationale_tokens": 16,
    "run.test_limit": 4,
    "run.report_to": [],
    "run.export": False,
}


def content(**changes):
    return {
        "recipe": "demo",
        "settings": dict(TINY),
        "seeds": [1, 2],
        "labels": [8],
        "baseline": "dss",
        "arms": {"dss": {"objective.method": "dss"}, "ib": {"objective.method": "ib", "seeds": [1]}},
    } | changes


def built(**changes):
    return study_arms.build(content(**changes), Path("x.yaml"))


def test_the_order_of_the_runs():
    """The usual number of labels first, one seed of all arms after the other; then other numbers."""
    arms = {
        "ib": {"objective.method": "ib", "labels": {8: [1, 2, 3], 4: [2, 1]}},
        "dss": {"objective.method": "dss"},
    }
    found = [(run.labels, run.seed, run.arm) for run in built(arms=arms).runs]
    usual = [(8, seed, arm) for seed in (1, 2) for arm in ("ib", "dss")]
    assert found == [*usual, (8, 3, "ib"), (4, 1, "ib"), (4, 2, "ib")]


def t_probability(t, degrees):
    """P(|T| < t) of Student's t by Simpson's rule on its density."""
    log_c = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)

    def density(x):
        return math.exp(log_c - (degrees + 1) / 2 * math.log1p(x * x / degrees))

    n = 20000
    h = t / n
    inner = sum((4 if i % 2 else 2) * density(i * h) for i in range(1, n))
    return 2 * h / 3 * (density(0) + inner + density(t))


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 15, 16, 24, 60, 500])
def test_quantiles_of_students_t(degrees):
    assert t_probability(intervals.t_quantile(degrees), degrees) == pytest.approx(0.95, abs=2e-4)


def test_paired_interval():
    """Against the textbook formula, in its one-pass form, on the seeds that both have."""
    rng = random.Random(0)
    a = {seed: rng.gauss(70, 5) for seed in range(12)}
    b = {seed: a[seed] - 4 + rng.gauss(0, 1) for seed in range(2, 14) if seed in a}
    b |= {99: 0.0}
    center, half, n = report.paired(a, b)
    d = [a[seed] - b[seed] for seed in range(2, 12)]
    variance = (sum(x * x for x in d) - sum(d) ** 2 / 10) / 9
    assert n == 10 and center == pytest.approx(sum(d) / 10)
    assert half == pytest.approx(2.262 * math.sqrt(variance / 10), rel=1e-6)
    assert half < compare_runs.interval(list(a.values()))[1] / 2  # what pairing is for
    with pytest.raises(ValueError, match="no seed in common"):
        report.paired({1: 0.0}, {2: 0.0})


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(1)
    hits = 0
    for _ in range(2000):
        a = {seed: rng.gauss(3, 2) for seed in range(5)}
        center, half, _ = report.paired(a, dict.fromkeys(range(5), 0.0))
        hits += abs(center - 3) < half
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_arms_labels_and_seeds_become_runs():
    arms = {
        "dss": {"objective.method": "dss", "labels": {4: [1, 2], 8: [1, 2]}},
        "ib": {"seeds": [2], "ranks": 2, "objective.method": "ib"},
    }
    assert built(arms=arms).runs == built(arms=arms | {"dss": arms["dss"] | {"labels": [4, 8]}}).runs
    found = built(arms=arms, comparisons=[["ib@8", "dss@4"]])
    # the study's own number of labels first, seed by seed; what takes all cores at the end
    assert [(r.arm, r.labels, r.seed) for r in found.runs] == [
        ("dss", 8, 1),
        ("dss", 8, 2),
        ("dss", 4, 1),
        ("dss", 4, 2),
        ("ib", 8, 2),
    ]
    flat = found.runs[0].settings
    assert (flat["run.seed"], flat["data.subsample"], flat["data.subsample_seed"]) == (1, 8, 1)
    assert found.comparisons == [("ib@8", "dss@4")]


def test_seeds_share_models_and_a_models_settings_change_its_users():
    models = {"pretrain": {"recipe": "demo_pretrain"}, "teacher": {"student.model": "{pretrain}"}}
    arms = {
        "dss": {"student.model": "{pretrain}", "seeds": [1, 2, 3]},
        "kd": {
            "objective.method": "kd",
            "teacher.placement": "replica",
            "teacher.model": "{teacher}",
            "teacher.cache": "{run}/signals",
            "seeds": [1],
        },
    }
    found = built(models=models, variants=2, arms=arms)
    assert [(m.arm, m.seed, m.stage) for m in found.models] == [
        ("pretrain", 0, 0),
        ("pretrain", 1, 0),
        ("teacher", 0, 1),
        ("teacher", 1, 1),
    ]
    pretrain, teacher = found.models[:2], found.models[2:]
    used = {r.seed: r.settings["student.model"] for r in found.runs if r.arm == "dss"}
    assert used == {s: f"runs/{pretrain[s % 2].name}/student" for s in (1, 2, 3)}
    kd = next(r for r in found.runs if r.arm == "kd")
    assert kd.stage == 2 and kd.settings["teacher.model"] == f"runs/{teacher[1].name}/student"
    out = Path("out")
    assert study_arms.resolved(kd, out).teacher.cache == f"out/runs/{kd.name}/signals"
    assert study_arms.resolved(kd, out, out / "x").teacher.cache == "out/x/signals"
    other = arms | {"kd": arms["kd"] | {"teacher.model": "{teacher+1}"}}
    kd = next(r for r in built(models=models, variants=2, arms=other).runs if r.arm == "kd")
    assert kd.settings["teacher.model"] == f"runs/{teacher[0].name}/student"
    further = {"settings": dict(TINY) | {"data.path": "/data"}, "recipe": "svamp"}
    read = {"teacher": {"recipe": "svamp", "student.model": "demo-teacher", "student.tokenizer": "train"}}
    found_read = built(models=read, **further)
    assert {run.settings["data.path"] for run in found_read.models + found_read.runs} == {"/data"}
    models["pretrain"]["optim.max_steps"] = 700
    changed = built(models=models, variants=2, arms=arms)
    assert not {r.name for r in found.runs + found.models} & {r.name for r in changed.runs + changed.models}


def test_a_changed_setting_is_another_run():
    names = {r.name for r in built().runs}
    assert names == {r.name for r in built().runs}
    assert names.isdisjoint(r.name for r in built(settings=TINY | {"optim.lr": 1e-3}).runs)
    more = {r.name for r in built(seeds=[1, 2, 3]).runs}
    assert names < more and len(more) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "must map `arms` to at least one arm"),
        ({"seed": [1]}, "unknown key seed; there are arms, baseline"),
        ({"baseline": "ds"}, "baseline is 'ds'; it must be one of the arms dss, ib"),
        ({"variants": 0}, "variants is 0; it must be a whole number above 0"),
        ({"seeds": []}, r"seeds of arm dss is \[\]; it must be a list of numbers"),
        ({"labels": None}, "labels of arm dss is None; it must be a list"),
        ({"arms": {"dss": {"sedes": [1]}}}, "arm dss has sedes; besides section.field there are labels"),
        ({"arms": {"dss": {"optim.lrr": 1}}}, "arm dss: unknown setting 'optim.lrr'. Did you mean optim.lr"),
        ({"arms": {"dss": {"student.model": "{pre}"}}}, "{pre} in dss is none of the models above it"),
        (
            {"arms": {"dss": {"objective.method": "kd"}}},
            "arm dss: objective.method kd needs an online teacher",
        ),
        (
            {"arms": {"dss": {"data.task": "gsm8k", "data.path": "x", "data.choice_labels": "letter"}}},
            r"arm dss: data.choice_labels is 'letter', which is for tasks of options \(.*\), not gsm8k",
        ),
        ({"comparisons": [["ib@8", "dss@9"]]}, r"\['ib@8', 'dss@9'\] must be two of dss@8, ib@8"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        built(**({"baseline": "dss"} | changes))


def test_files_that_are_no_study(tmp_path):
    (tmp_path / "a.yaml").write_text("arms: [")
    for path in (tmp_path / "a.yaml", tmp_path / "none.yaml"):
        with pytest.raises(ValueError, match="is no study"):
            study_arms.load(path)


def test_shipped_studies_are_valid():
    for path in (ROOT / "tools/study").glob("*.yaml"):
        assert study_arms.load(path).runs


def fake(accuracy, seconds=10.0):
    return {"test": {"demo": {"accuracy": accuracy}}, "steps": 5, "seconds": seconds, "commit": "abc"}


def test_table_json_and_figure(tmp_path):
    arms = {
        "dss": {"labels": [4, 8]},
        "ib": {"objective.method": "ib", "note": "as published"},
        "kd": {
            "objective.method": "kd",
            "teacher.placement": "replica",
            "teacher.model": "x",
            "seeds": [1],
        },
    }
    found = built(arms=arms, seeds=[1, 2, 3], variants=2, comparisons=[["ib@8", "dss@4"]])
    shown = {"dss": (0.6, 0.61, 0.62), "ib": (0.63, 0.65, 0.67)}
    results = {
        r.name: fake(shown[r.arm][r.seed - 1] - 0.1 * (r.labels == 4)) if r.arm in shown else None
        for r in found.runs
    }
    text = report.write(found, tmp_path, results)
    rows = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in text.splitlines()[2:6]}
    # differences 3, 4, 5: standard deviation 1, so the half width is 4.303 / sqrt(3) = 2.48
    assert "| 65.0 | 2.0 | 63.0 65.0 67.0 | +4.0 [+1.5, +6.5] | 10 |" in rows["ib", "8"]
    assert "| 51.0 | 1.0 | 50.0 51.0 52.0 |  |" in rows["dss", "4"]
    assert "not run" in rows["kd", "8"]
    assert "ib@8 against dss@4: +14.0 [+11.5, +16.5]" in text and "ib: as published" in text
    assert "3 arms were tried; 9 of 10 runs are finished" in text and "commit abc" in text
    saved = json.loads((tmp_path / "study.json").read_text())
    assert len(saved["runs"]) == 10 and saved["arms"]["ib@8"]["difference"]["variants"] == pytest.approx(
        {"0": 4.0, "1": 4.0}
    )
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no finished run"):
        report.write(found, tmp_path, dict.fromkeys(results))


def test_a_run_that_is_recorded_is_finished(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content()))
    runs = study_arms.load(tmp_path / "a.yaml").runs
    report.write(
        study_arms.load(tmp_path / "a.yaml"),
        tmp_path,
        {r.name: None for r in runs} | {runs[1].name: fake(0.5)},
    )
    found = study_arms.load(tmp_path / "a.yaml", recorded=tmp_path / "study.json").runs
    assert [study_arms.result(run, tmp_path / "out") for run in found] == [None, fake(0.5), None]
    here = tmp_path / "out/runs" / found[1].name
    here.mkdir(parents=True)
    (here / "result.json").write_text("{}")
    assert (
        study_arms.result(found[1], tmp_path / "out") == {}
    )  # what was run here counts before what is recorded
    results = "x", {"steps": 1}, {"test": {"demo": {}}, "steps": 1, "seconds": 1}, fake("half")
    damaged = [json.dumps({"runs": [{"name": "a", "result": result}]}) for result in results]
    for text in ("[]", "{", '{"runs": [1]}', *damaged):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="other.json is no study.json that `report` wrote"):
            study_arms.load(tmp_path / "a.yaml", recorded=tmp_path / "other.json")


def test_a_model_is_trained_where_a_run_without_a_result_needs_it(tmp_path):
    """Though its own result is recorded: the weights are not."""
    path, record = tmp_path / "a.yaml", tmp_path / "new/folder/study.json"
    path.write_text(yaml.safe_dump(content(models=MODELS, arms=LEARNERS, baseline="alone", seeds=[1])))
    study = study_arms.load(path)
    assert [run.arm for run in unfinished.of(study, tmp_path)] == [
        "one",
        "two",
        "alone",
        "from-one",
        "from-two",
    ]
    everything = {run.name: fake(0.5) for run in study.models + study.runs}
    for lacking, expected in (("", []), ("from-two", ["two", "from-two"]), ("alone", ["alone"])):
        known = {run.name: None for run in study.runs if run.arm == lacking}
        report.write(study, record.parent, everything | known)
        loaded = study_arms.load(path, recorded=record)
        assert [run.arm for run in unfinished.of(loaded, tmp_path / "out")] == expected
        assert all(study_arms.result(model, tmp_path / "out") == fake(0.5) for model in loaded.models)
    with pytest.raises(ValueError, match=r"study.json has no run of .*a.yaml with these settings and --set"):
        study_arms.load(path, {"optim.lr": 3e-3}, recorded=record)


def test_what_is_refused_before_a_run_starts(tmp_path, capsys):
    arms = {"dss": {"data.task": "jsonl", "data.path": "{data}/none"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content(arms=arms, folders={"data": str(tmp_path)})))
    out = tmp_path / "out"
    line = ["run", str(tmp_path / "a.yaml"), str(out)]
    for more, message in (
        ([], "a.yaml: data.path of dss is .*none', which does not exist; name its folder: --set data=FOLDER"),
        (["--jobs", "0"], "--jobs: '0' is no whole number from 1 on"),
        (["--jobs", "-1"], "--jobs: '-1' is no whole number from 1 on"),
        (["--set", f"data={tmp_path / 'a.yaml'}"], "--set: .* is no NAME=FOLDER"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(line + more)
        assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_differences_without_spread_have_no_interval():
    a = {seed: 50.0 + seed for seed in range(3)}
    assert report.difference(a, dict(a)) == "identical"
    assert report.difference(a, {seed: score - 2 for seed, score in a.items()}) == "+2.0 for each of 3 seeds"
    assert report.difference(a, {0: 49.0}) == "+1.0" and report.difference(a, {9: 1.0}) == "-"
    assert report.difference(a, a | {0: 49.7}) == "+0.1 [-0.3, +0.5]"


def test_the_figure_has_no_empty_panel_and_one_look_for_an_arm(tmp_path):
    """14 arms of 2 seeds, whose intervals are far wider than their scores differ."""
    arms = {f"arm{i}": {"optim.lr": 0.001 * (i + 1)} for i in range(14)}

    def drawn(found):
        groups = {}
        for run in found.runs:
            score = 0.3 + 0.01 * int(run.arm[3:]) + 0.04 * (run.seed % 2) - 0.1 * (run.labels == 4)
            groups.setdefault(report.key(run), {})[run.seed] = fake(score)
        return report.figure(found, groups)

    one_count = drawn(built(arms=arms, baseline="arm0"))
    ranked, compute = one_count.axes
    assert ranked.get_xlim() == pytest.approx((30 - 0.6 * 17, 47 + 0.6 * 17))
    colors = [line.get_color() for line in compute.lines]
    assert len(set(colors)) == 14
    runs = [line.get_color() for line in ranked.lines if len(line.get_xdata()) == 2]
    assert list(dict.fromkeys(runs)) == colors
    assert ranked.get_title() == "8 labels: mean, 95 % interval, seeds"
    [ranked, _] = drawn(built(arms=arms, baseline="arm0", labels=[0.25])).axes
    assert ranked.get_title().startswith("25% of the labels:")
    two_counts = drawn(built(arms=arms, baseline="arm0", labels=[4, 8]))
    assert [axes.get_title() for axes in two_counts.axes][1:] == ["compute", "labels needed"]


def test_arms_are_drawn_as_they_are_named(tmp_path):
    """matplotlib would typeset one of these names, fail at another, and leave the third out of the legend."""
    names = ["$a and $b", r"$\frac{$", "_hidden"]
    found = built(
        arms={name: {"optim.lr": 0.001 * (i + 1)} for i, name in enumerate(names)}, baseline=names[0]
    )
    groups = {}
    for run in found.runs:
        groups.setdefault(report.key(run), {})[run.seed] = fake(0.5)
    drawn = report.figure(found, groups)
    drawn.savefig(tmp_path / "figure.png")
    ranked, compute = drawn.axes
    shown = [r"\$a and \$b", r"\$\frac{\$", " _hidden"]
    assert [label.get_text() for label in ranked.get_yticklabels()] == shown
    assert [text.get_text() for text in compute.get_legend().get_texts()] == shown


def test_a_grid_says_what_a_run_would_do(tmp_path):
    models = {"pretrain": {"recipe": "demo_pretrain"}}
    arms = {"dss": {"student.model": "{pretrain}", "data.unlabelled": 9, "data.agree_at": [0.5, 0.75]}}
    found = built(models=models, arms=arms)
    commands = command.write_grids(found, tmp_path)
    assert [command.split()[-2:] for command in commands] == [
        [str(tmp_path / "grid-0.txt"), "demo_pretrain"],
        [str(tmp_path / "grid-1.txt"), "demo"],
    ]
    name, *settings = (tmp_path / "grid-1.txt").read_text().splitlines()[0].split()
    given = dict(command_line.parse(settings).settings)
    assert name == found.runs[0].name
    given |= {"run.dir": str(tmp_path / "runs" / name)}
    assert load_settings("demo", given) == study_arms.resolved(found.runs[0], tmp_path)
    with pytest.raises(ValueError, match="a grid takes no spaces: data.cache_dir 'a b'"):
        command.write_grids(built(settings=TINY | {"data.cache_dir": "a b"}), tmp_path)


def test_runs_side_by_side_and_only_what_is_missing(tmp_path):
    """Real runs: two that end well, one through two ranks, and one that does not; then nothing is left
    to do but that one."""
    arms = {"dss": {}, "lost": {"student.model": "no/such/model"}, "dss-2": {"ranks": 2}}
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(content(arms=arms, seeds=[1])))
    errors, logs = tmp_path / "errors", [tmp_path / "first", tmp_path / "again"]
    line = [str(WORKERS / "studying.py"), str(errors), "run", str(tmp_path / "mini.yaml")]
    line += [str(tmp_path / "out"), "--jobs", "3"]
    assert launch(line, log=logs[0]) == 1, errors.read_text()
    first = logs[0].read_text()
    done = re.findall(r"(\S+)-\w{8}: done", first)
    assert done == ["dss-n8-s1", "dss-2-n8-s1"]
    assert re.search(r"lost-n8-s1-\w{8}: failed with exit code 2, see .*\.log", first)
    assert "failed: lost-n8-s1-" in errors.read_text()
    folders = sorted((tmp_path / "out/runs").glob("dss-*"))
    assert [json.loads((f / "result.json").read_text())["ranks"] for f in folders] == [2, 1]
    assert not any((f / "checkpoints").exists() for f in folders)
    assert all((f / "predictions").is_dir() for f in folders)
    notes, of_one = (json.loads((f / "study.json").read_text()) for f in folders)
    assert notes["process_seconds"] > 0 and notes["commit"] and notes["machine"]
    assert notes["cpu_seconds"] > of_one["cpu_seconds"] > 0  # the launcher's ranks count
    before = [(f / "result.json").stat().st_mtime_ns for f in folders]
    assert launch(line, log=logs[1]) == 1, errors.read_text()
    again = logs[1].read_text()
    assert "1/1  lost-n8-s1-" in again and "dss-n8-s1" not in again
    assert [(f / "result.json").stat().st_mtime_ns for f in folders] == before


MODELS = {"one": {"recipe": "demo_pretrain"}, "two": {"recipe": "demo_pretrain", "optim.max_steps": 7}}
LEARNERS = {"from-two": {"student.model": "{two}"}, "from-one": {"student.model": "{one}"}, "alone": {}}


def test_a_run_starts_as_soon_as_its_models_are_there(tmp_path, monkeypatch):
    """Two at a time: `one` lasts until all that does not need it has been started."""
    begun, may_end = [], threading.Event()

    def start(run, out, slot, children):
        begun.append(run.arm)
        if run.arm == "alone":
            may_end.set()
        assert run.arm != "one" or may_end.wait(20)
        return 0

    monkeypatch.setattr(command, "_start", start)
    study = built(models=MODELS, arms=LEARNERS | {"dss-2": {"ranks": 2}}, baseline="alone", seeds=[1])
    assert command.execute(study, tmp_path, 2) == []
    assert sorted(begun[:2]) == ["one", "two"] and begun[2:] == ["from-two", "alone", "from-one", "dss-2"]


def test_what_needs_a_model_that_failed_is_left_out(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(command, "_start", lambda run, *_: begun.append(run.arm) or int(run.arm == "one"))
    study = built(models=MODELS, arms=LEARNERS, baseline="alone", seeds=[1, 2])
    assert command.execute(study, tmp_path, 1) == [study.models[0].name]
    assert begun == ["one", "two", "from-two", "alone", "from-two", "alone"]


def test_nothing_is_started_after_an_interruption(tmp_path, monkeypatch):
    begun = []

    def start(run, out, slot, children):
        begun.append(run.arm)
        if run.arm == "two":
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(command, "_start", start)
    with pytest.raises(KeyboardInterrupt):
        command.execute(built(models=MODELS, arms=LEARNERS, baseline="alone", seeds=[1]), tmp_path, 1)
    assert begun == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("step 1\nerror: optim.lr is -1\nerror: later\n", "error: optim.lr is -1"),
        ("Traceback (most recent call last):\n  File\nKeyError: 'a'\nbye\n", "KeyError: 'a'"),
        ("Killed\n", "Killed"),
        ("", "its log is empty"),
    ],
)
def test_a_failed_run_is_named_with_its_first_error(tmp_path, text, line):
    (tmp_path / "log").write_text(text)
    assert command.first_error(tmp_path / "log") == line


def test_what_an_interrupted_run_took_is_counted(tmp_path):
    command._note(tmp_path, 10.04, 7.0)
    command._note(tmp_path, 2.0, 1.5)
    assert json.loads((tmp_path / "study.json").read_text()) == {
        "process_seconds": 12.0,
        "cpu_seconds": 8.5,
        "commit": command.commit(),
        "machine": command.machine(),
    }


@pytest.fixture
def forked_runs(monkeypatch) -> None:
    """A study's runs are forks of a process that has imported all (harness.py)."""
    start_server()  # here, as runs are started in threads
    forks = {}

    def popen(command, *, stdout, env, **_):
        fork = Forked(command[1:], stdout.name, env)
        return forks.setdefault(fork.pid, fork)

    def wait4(pid, options):
        return pid, forks[pid].wait() << 8, resource.getrusage(resource.RUSAGE_CHILDREN)

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(command.os, "wait4", wait4)


def test_the_papers_tables_dry(tmp_path, capsys, forked_runs):
    """All three methods through the real entry point, on the DSS release's layout, from random weights."""
    svamp(tmp_path / "data", [said(i) for i in range(2, 30)], [said(i) for i in range(2)])
    options = ["--dataset", "svamp", "--student", "t5-mini", "--data", str(tmp_path / "data"), "--dry-run"]
    options += ["--out", str(tmp_path / "out"), "--seeds", "0", "--jobs", "3"]
    options += ["--student.tokenizer", "train", "--student.vocab_size", "300"]
    with pytest.raises(SystemExit) as ended:
        paper.main(options, command.perform)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "svamp, t5-mini, DRY RUN" in out and re.search(r"^ib +\d+\.\d\d +-$", out, re.MULTILINE)
    folders = sorted((tmp_path / "out/runs").glob("ib-*"))
    config = yaml.safe_load((folders[0] / "config.yaml").read_text())
    assert config["objective"]["estimator"] == "paper" and config["objective"]["beta"] == 0.1
    assert (
        config["optim"]["lr"] == 5e-5 and json.loads((folders[0] / "result.json").read_text())["steps"] == 2
    )


def test_the_papers_settings_and_figures(tmp_path):
    options = paper.parser().parse_args(
        "--dataset svamp --student google/t5-v1_1-small --out x --seeds 0 1".split()
    )
    found = study_arms.build(paper.content(options, {}), Path("paper"))
    assert [run.arm for run in found.runs] == ["finetune", "dss", "ib"] * 2
    config = study_arms.resolved(found.runs[2], tmp_path)
    assert (config.optim.max_steps, config.optim.batch_size, config.objective.alpha) == (10000, 64, 0.5)
    for run in found.runs:
        folder = tmp_path / "runs" / run.name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(fake(0.45 + 0.01 * run.seed)))
    lines = paper.comparison(found, tmp_path, options).splitlines()
    assert lines[2].split() == ["finetune", "45.50", "45.00"] and lines[4].split() == ["ib", "45.50", "52.50"]


def test_further_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs start in the project's root, and still find the data
    given = study_arms.further_settings(["--optim.lr", "1e-3", "--run.export", "False", "--data.path", "a"])
    assert given == {"optim.lr": "1e-3", "run.export": "False", "data.path": str(tmp_path / "a")}
    assert study_arms.further_settings(["--run.export", "--data.path=none"]) == {
        "run.export": True,
        "data.path": "none",
    }
    for rest in (["--beta", "1"], ["--optim.lr", "1", "2"], ["x"]):
        with pytest.raises(ValueError, match="further settings are given as --section.field value"):
            study_arms.further_settings(rest)


def test_a_files_settings_are_read_as_they_are_written(tmp_path):
    """A study reads 10 as a recipe does: as a name where a name is asked for, else as a number."""
    (tmp_path / "a.yaml").write_text(
        "recipe: demo\nseeds: [1]\nlabels: {8: [1], 0.5: [1]}\nsettings: &all {optim.max_steps: 1e2}\narms:\n"
        "  a: {<<: *all, student.tokenizer: 10, teacher.cache: 1e3, run.export: false}\n"
        "  b: {student.tokenizer: 'x#1', teacher.cache: true, data.task: [demo]}\n"
    )
    a, _, b, _ = (study_arms.resolved(run, tmp_path) for run in study_arms.load(tmp_path / "a.yaml").runs)
    assert (a.student.tokenizer, a.teacher.cache, a.optim.max_steps) == ("10", "1e3", 100)
    assert (a.run.export, a.data.subsample) == (False, 8)
    assert (b.student.tokenizer, b.teacher.cache, b.data.task) == ("x#1", "true", ["demo"])


def test_further_settings_reach_all_arms(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content()))
    plain, changed = (study_arms.load(tmp_path / "a.yaml", f) for f in (None, {"optim.lr": 0.5}))
    assert [run.settings for run in changed.runs] == [r.settings | {"optim.lr": 0.5} for r in plain.runs]


def test_folders_are_arguments_and_quick_is_a_part(tmp_path):
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump(
            content(
                folders={"base": "org/model"},
                models={
                    "start": {"recipe": "demo", "student.model": "{base}"},
                    "teacher": {"recipe": "demo", "student.model": "{start}"},
                    "unused": {"recipe": "demo"},
                },
                arms={
                    "dss": {"student.model": "{base}", "objective.method": "dss"},
                    "kd": {"teacher.model": "{teacher}", "teacher.cache": "{base}/x", "labels": {8: [1, 2]}},
                },
                comparisons=[["kd@8", "dss@8"]],
                quick={"arms": ["kd"], "seeds": [3], "settings": {"optim.max_steps": 2}},
            )
        )
    )
    name, folder = folders.read_folder(f"base={tmp_path}")
    whole = study_arms.load(tmp_path / "a.yaml")
    assert whole.runs[0].settings["student.model"] == "org/model" and len(whole.runs) == 4
    part = study_arms.load(tmp_path / "a.yaml", given={name: folder}, quick=True)
    (model, teacher), (run,) = part.models, part.runs
    (tmp_path / "out").mkdir()
    assert [model.arm, teacher.arm] == ["start", "teacher"] and whole.models[2].arm == "unused"
    assert (run.arm, run.seed, run.labels, part.baseline, part.comparisons) == ("kd", 3, 8, "kd", [])
    assert run.settings["optim.max_steps"] == model.settings["optim.max_steps"] == "2"
    assert run.settings["teacher.model"] == f"runs/{teacher.name}/student"  # the folder of a model stays one
    assert (model.settings["student.model"], run.settings["teacher.cache"]) == (folder, f"{folder}/x")
    report.write(part, tmp_path / "out", {run.name: fake(0.5), model.name: None, teacher.name: None})
    rows = json.loads((tmp_path / "out/study.json").read_text())["runs"]
    assert folder not in str(rows) and rows[0]["settings"]["student.model"] == "{base}"
    assert rows[2]["settings"]["teacher.cache"] == "{base}/x"
    shutil.rmtree(tmp_path / "out")
    copy = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, copy)
    moved = study_arms.load(tmp_path / "a.yaml", given={name: str(copy)}, quick=True)
    names = [run.name, model.name, teacher.name]  # wherever the folder lies
    assert [run.name for run in moved.runs + moved.models] == names
    (copy / "a.yaml").write_text("other")
    changed = study_arms.load(tmp_path / "a.yaml", given={name: str(copy)}, quick=True)
    assert {run.name, model.name}.isdisjoint(run.name for run in changed.runs + changed.models)
    with pytest.raises(ValueError, match="--set other: the study has base"):
        study_arms.load(tmp_path / "a.yaml", given={"other": folder})
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(content()))
    with pytest.raises(ValueError, match="--quick needs the key `quick`"):
        study_arms.load(tmp_path / "b.yaml", quick=True)
    with pytest.raises(argparse.ArgumentTypeError, match="no NAME=FOLDER"):
        folders.read_folder("base=/no/such/folder")


@pytest.mark.parametrize("given", [["0", "1"], ["0,1"], ["0", "1,0"], ["0, 1"]])
def test_seeds_in_either_form_replace_those_of_the_file(tmp_path, monkeypatch, given):
    arms = {"dss": {}, "ib": {"seeds": [7]}, "finetune": {"labels": {4: [1], 8: [2, 3]}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content(arms=arms)))
    seen = []
    monkeypatch.setattr(command, "perform", lambda action, study, *_: seen.extend(study.runs) or 0)
    with pytest.raises(SystemExit):
        command.main(["run", str(tmp_path / "a.yaml"), "out", "--seeds", *given, "--optim.lr", "0.5"])
    shown = {(run.arm, run.labels, run.seed) for run in seen}
    cells = [("dss", 8), ("ib", 8), ("finetune", 4), ("finetune", 8)]
    assert shown == {(*cell, seed) for cell in cells for seed in (0, 1)} and len(seen) == 8
    assert {run.settings["optim.lr"] for run in seen} == {"0.5"}
    options = paper.parser().parse_args(
        ["--dataset", "svamp", "--student", "x", "--out", "y", "--seeds", *given]
    )
    assert options.seeds == [0, 1]


@pytest.mark.parametrize("given", [["one"], ["-1"], ["0..3"], ["0", "a.yaml", "out"]])
def test_what_is_no_seed_is_refused_by_name(capsys, given):
    with pytest.raises(SystemExit) as ended:
        command.main(["run", "--seeds", *given])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "argument --seeds: " in said and ("-1" in given or "as in `--seeds 0 1` or `--seeds 0,1`" in said)


@pytest.mark.parametrize("ranks", [1, 2])
def test_speed_measures_the_arms_of_so_many_ranks(tmp_path, ranks):
    steps = {"optim.max_steps": 300}
    arms = {"dss": {}, "dss-2": {"ranks": 2}, "twice-2": {"ranks": 2, "optim.max_steps": 600}}
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(content(arms=arms, seeds=[1], settings=TINY | steps)))
    script, log, tools = tmp_path / "fewer_rounds.py", tmp_path / "log", ROOT / "tools"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(tools)!r})\nfrom study import speed\n"
        "speed.ROUNDS, speed.STEPS = 3, 2\n"
        f"runpy.run_path({str(tools / 'study.py')!r}, run_name='__main__')\n"
    )
    given = [str(script), "speed", str(tmp_path / "mini.yaml"), str(tmp_path / "out")]
    assert launch(given, ranks=ranks if ranks > 1 else None, log=log) == 0, log.read_text()[-2000:]
    table = re.findall(r"^(\S+) +([\d.]+) +([\d.]+) +([\d.]+)  (\d+)$", log.read_text(), re.MULTILINE)
    found = {arm: tuple(map(float, row)) for arm, *row in table}
    assert found.keys() == ({"dss"} if ranks == 1 else {"dss-2", "twice-2"})
    milliseconds, seconds, ratio, base_steps = found["dss" if ranks == 1 else "dss-2"]
    assert seconds == pytest.approx(300 * milliseconds / 1000, abs=0.1) and (ratio, base_steps) == (1.0, 300)
    if ranks == 2:
        milliseconds, seconds, _, base_steps = found["twice-2"]
        assert seconds == pytest.approx(600 * milliseconds / 1000, abs=0.1)
        assert base_steps == pytest.approx(300 * seconds / found["dss-2"][1], rel=0.05)
