"""The tool that kills runs: whether it sees what is wrong with one, and two kills of a real one."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from kills import killing, phases
from safetensors.torch import save_file


def finished(folder, losses, weight=1.0, name="head", first=1):
    """A folder that looks like that of a finished run."""
    student = folder / "run" / "student"
    student.mkdir(parents=True)
    rows = [{"step": first, "eval/test_demo_accuracy": 0.0}]
    rows += [{"step": i, "loss/total": loss} for i, loss in enumerate(losses, first)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file({name: torch.tensor([1.0, weight])}, student / "model.safetensors")
    return folder


def test_differences_are_seen_and_named(tmp_path):
    whole = finished(tmp_path / "whole", [2.0, 1.0])
    same = finished(tmp_path / "same", [2.0, 1.0])
    assert killing.difference(whole, same, 0.0) == ""
    rounded = finished(tmp_path / "rounded", [2.0, 1.0 + 5e-7], 1.0 + 1e-6)
    assert killing.difference(whole, rounded, 0.0) == "has a loss of 1.0000005 instead of 1.0 at step 2"
    assert killing.difference(whole, rounded, 1e-6) == ""
    # a difference of 1e-4 in one of two ones: over a norm of sqrt 2
    other = finished(tmp_path / "other", [2.0, 1.0], 1.0001)
    assert killing.difference(whole, other, 1e-6) == "has weights that are off by 7.1e-05"
    assert killing.difference(whole, other, 0.0) == "has weights that are off by 7.1e-05"
    twice = finished(tmp_path / "twice", [2.0, 1.0, 1.0])
    assert killing.difference(whole, twice, 1.0) == "has losses of the steps [1, 2, 3]"
    assert killing.difference(whole, finished(tmp_path / "n", [2.0, 1.0], name="tail"), 0.0)


def test_a_phase_is_known_by_what_this_start_has_left(tmp_path):
    start = phases.Start(tmp_path / "run", tmp_path / "log", 1000.0)
    caught = {name: phase.caught for name, phase in phases.PHASES.items()}
    assert not any(look(start) for look in caught.values())
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    os.utime(folder, (999, 999))
    assert not caught["writing"](start), "an earlier start has left it"
    os.utime(folder, (1001, 1001))
    assert caught["writing"](start) and not phases.PHASES["sharing"].begun(start)
    (folder / "complete.json").touch()
    assert not caught["writing"](start) and phases.PHASES["sharing"].begun(start)
    start.log.write_text("... is shared out anew among 1 with ...")
    assert caught["sharing"](start)
    start.log.write_text("... is shared out anew among 1 with ...\nresumed from ...")
    assert not caught["sharing"](start)
    (tmp_path / "run" / "on_policy").mkdir()
    (tmp_path / "run" / "on_policy" / "step-00000004-ab.part").touch()
    assert caught["sampling"](start)


def test_the_table_adds_up():
    counts = {"writing": {"kills": 2, "within": 1, "runs": 1}, "sharing": {"kills": 3, "runs": 2, "lost": 1}}
    lines = killing.table(counts).splitlines()
    assert lines[0] == "| phase | kills | within the phase | of one rank | runs | lost | unequal |"
    assert lines[2:] == [
        "| writing | 2 | 1 | 0 | 1 | 0 | 0 |",
        "| sharing | 3 | 0 | 0 | 2 | 1 | 0 |",
        "| all | 5 | 1 | 0 | 3 | 1 | 0 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phases", "writing,slep"], r"names 'slep'; there are writing, copying, sharing, sampling, tab"),
        (["--kills", "1"], r"--kills is 1; it must be at least the number of phases, \d"),
        (["--out", "."], r"--out '.*' is not empty; name another folder"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        killing.from_command_line(arguments)


def test_two_kills_of_a_run_that_changes_its_zero_stage(tmp_path, monkeypatch, capsys):
    """One rank, a fork of the tests' server, which has the imports: four starts in a few seconds."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)  # the command does, and this gives them back
    for setting, value in {"optim.max_steps": 4, "run.test_limit": 1}.items():
        monkeypatch.setitem(killing.SETTINGS, setting, value)
    one_rank = phases.PHASES["sharing"]._replace(starts=[(1, "zero1"), (1, "zero0"), (1, "zero2")])
    monkeypatch.setitem(phases.PHASES, "sharing", one_rank)
    out = tmp_path / "out"
    code = killing.from_command_line(["--kills", "2", "--phases", "sharing", "--out", str(out)])
    said = capsys.readouterr().out
    assert code == 0, said
    assert re.search(r"^\| all \| 2 \| [012] \| [012] \| [12] \| 0 \| 0 \|$", said, re.MULTILINE), said
    assert not out.exists()
