"""tools/accept.py: how it judges and reports, and the small forms of its checks on a CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from harness import WORKERS, Forked

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from accept import budgets, conductor, lines, losses, report  # noqa: E402
from accept.checks import CHECKS, Check, named  # noqa: E402


def line(check: str, status: str, case: str = "case", **values) -> dict:
    return {"check": check, "case": case, "status": status, "message": "a | b", "values": values}


def all_passed() -> list[dict]:
    return [line(check.name, lines.PASSED) for check in CHECKS]


def test_accepted_needs_every_check_of_one_gpu():
    assert report.summary(all_passed(), on_cpu=False)[1] == 0
    alone = [x for x in all_passed() if named(x["check"]).ranks == 1]
    several = [check.name for check in CHECKS if check.ranks > 1]
    text, code = report.summary(alone + [line(name, lines.NOT_RUN) for name in several], on_cpu=False)
    assert code == 4 and text.endswith("not accepted: not all was run")  # there were GPUs, and no time
    alone += [line(name, lines.NOT_RUN, **{"too few GPUs": True}) for name in several]
    text, code = report.summary(alone, on_cpu=False)
    assert code == 0 and text.endswith("\naccepted on these GPUs, which are too few for some checks")
    text, code = report.summary(alone[1:], on_cpu=False)
    assert code == 4 and text.endswith("not accepted: not all was run")
    text, code = report.summary([*alone, line(CHECKS[0].name, lines.FAILED)], on_cpu=False)
    assert (
        code == 1 and text.endswith("not accepted: 1 cases failed") and "FAILED a. environment: case" in text
    )


def test_a_dry_run_never_accepts():
    text, code = report.summary(all_passed(), on_cpu=True)
    assert code == 0 and "accepted" not in text
    assert report.summary([line(CHECKS[0].name, lines.FAILED)], on_cpu=True)[1] == 1


def test_it_is_refused_without_a_gpu_and_over_an_earlier_report(tmp_path):
    run = subprocess.run(
        [sys.executable, str(TOOLS / "accept.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 2 and "torch sees no CUDA device" in run.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / lines.FILE).write_text("")
    with pytest.raises(ValueError, match="of an earlier acceptance; name another folder"):
        conductor.from_command_line([str(tmp_path), "--dry-run-on-cpu"])
    with pytest.raises(ValueError, match="--minutes is 0.0; it must be above 0"):
        conductor.from_command_line([str(tmp_path), "--dry-run-on-cpu", "--minutes", "0"])
    with pytest.raises(ValueError, match="--check is 'z'; choose from a. environment"):
        conductor.from_command_line([str(tmp_path), "--dry-run-on-cpu", "--check", "z"])


@pytest.mark.parametrize(
    ("script", "minutes", "said"),
    [
        ("import os; print('last words', flush=True); os._exit(7)", 1, "died with exit code 7; .*last words"),
        (
            "import os; print('last words', flush=True); os.kill(os.getpid(), 11)",
            1,
            "died by SIGSEGV; .*last words",
        ),
        ("import time; time.sleep(60)", -0.65, "it had not ended after 3 s"),
        ("pass", 1, "it ended without a word"),
    ],
)
def test_a_check_that_dies_hangs_or_says_nothing_has_failed(tmp_path, monkeypatch, script, minutes, said):
    entry = tmp_path / "entry.py"
    entry.write_text(script)
    monkeypatch.setattr(conductor, "ENTRY", entry)
    (tmp_path / "logs").mkdir()
    conductor.run_apart(Check("x", "nowhere:nothing", minutes), tmp_path, on_cpu=True)
    failed, time = lines.read_lines(tmp_path)
    assert failed["status"] == lines.FAILED and re.search(said, failed["message"])
    assert time["case"] == "time" and time["values"]["seconds"] < 30


def test_a_failed_case_does_not_hide_a_crash_behind_it(tmp_path, monkeypatch):
    entry = tmp_path / "entry.py"
    told = {"check": "x", "case": "first", "status": lines.FAILED, "message": "", "values": {}}
    file = str(tmp_path / lines.FILE)
    entry.write_text(f"import os\nopen({file!r}, 'a').write({json.dumps(told)!r} + '\\n')\nos.abort()")
    monkeypatch.setattr(conductor, "ENTRY", entry)
    (tmp_path / "logs").mkdir()
    conductor.run_apart(Check("x", "nowhere:nothing", 1), tmp_path, on_cpu=True)
    first, crash, _ = lines.read_lines(tmp_path)
    assert first["case"] == "first" and "died by SIGABRT" in crash["message"]


def test_ranks_of_a_check_that_hangs_are_ended_too(tmp_path, monkeypatch):
    entry = tmp_path / "entry.py"
    entry.write_text(
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "child = subprocess.Popen(sleep, start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\ntime.sleep(60)"
    )
    monkeypatch.setattr(conductor, "ENTRY", entry)
    (tmp_path / "logs").mkdir()
    conductor.run_apart(Check("x", "nowhere:nothing", -0.62), tmp_path, on_cpu=True)
    child = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 60  # a busy machine takes a moment to end what is killed
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_places_of_waits_are_those_of_the_caller():
    """torch's warnings come through warnings.py, which is nobody's place."""
    place = budgets.place_of([("train.py", 3), ("engine.py", 7), ("torch/x.py", 1), ("warnings.py", 109)])
    assert place == "engine.py:7"


def test_what_a_check_raises_is_a_failed_case(tmp_path, monkeypatch):
    def broken(context):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Check, "function", lambda self: broken)
    context = lines.Context(tmp_path, CHECKS[0].name, small=True)
    assert conductor.run_here(CHECKS[0], context) == 1
    (only,) = lines.read_lines(tmp_path)
    assert only["message"] == "it ended with RuntimeError: no such kernel"


def test_checks_that_do_not_fit_are_left_out(tmp_path):
    (tmp_path / "logs").mkdir()
    checks = [Check("long", "nowhere:nothing", 5.0), Check("wide", "nowhere:nothing", 0.1, ranks=3)]
    checks += [Check("gpu", "nowhere:nothing", 0.1, on_cpu=False)]
    conductor.conduct(tmp_path, 1.0, True, checks)
    said = {x["check"]: (x["status"], x["message"]) for x in lines.read_lines(tmp_path)}
    assert said == {
        "long": ("not run", "the 1 minutes are spent; --minutes gives it more"),
        "wide": ("not run", "it needs 3 GPUs, and 2 can be seen"),
        "gpu": ("not run", "it has no form for a CPU"),
    }


def test_a_line_that_a_crash_has_cut_is_left_out_and_the_table_stays_a_table(tmp_path):
    for x in all_passed():
        lines.write_line(tmp_path, **x)
    with (tmp_path / lines.FILE).open("a") as file:
        file.write('{"check": "b. he')
    assert len(lines.read_lines(tmp_path)) == len(CHECKS)
    report.write(tmp_path, on_cpu=False)
    text = (tmp_path / report.FILE).read_text()
    assert "| a. environment | case | passed | a \\| b |" in text


def test_time_on_two_streams_at_once():
    spans = [(0, 10, 1), (5, 12, 2), (6, 8, 2), (20, 30, 1), (29, 31, 3)]
    # busy from 0 to 12 and from 20 to 31; both from 5 to 10 and from 29 to 30
    assert budgets.overlapping(spans) == (23, 6)
    assert budgets.overlapping([]) == (0, 0)


def test_the_small_forms_pass_on_a_cpu(tmp_path, monkeypatch, capfd):
    """Each check is a process of its own as ever, forked where all is imported already, and so are its
    launchers."""
    out, accepting = tmp_path / "out", str(WORKERS / "accepting.py")
    forking = SimpleNamespace(
        Popen=lambda command, *, stdout, env, **_: Forked([accepting, *command[2:]], stdout.name, env),
        STDOUT=subprocess.STDOUT,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    monkeypatch.setattr(conductor, "subprocess", forking)
    code = conductor.from_command_line([str(out), "--dry-run-on-cpu", "--minutes", "60"])
    assert code == 0, "".join(capfd.readouterr())[-5000:]
    written = [json.loads(text) for text in (out / lines.FILE).read_text().splitlines()]
    passed = {x["check"] for x in written if x["status"] == lines.PASSED}
    small = {check.name for check in CHECKS if check.on_cpu}
    assert small - passed <= {
        "a. environment",
        "c. host syncs and kernels",
        "j. bus bandwidth",
    }  # figures alone
    assert not any(x["status"] == lines.FAILED for x in written)
    head_loss = [x for x in written if x["check"] == "b. head loss" and x["status"] == lines.PASSED]
    assert len(head_loss) == 2 * 2 * len(list(losses.cases()))  # vocabularies, dtypes
    assert (out / report.FILE).read_text().startswith("# Dry run on a CPU: nothing was accepted")
    assert not (out / "work").exists()
