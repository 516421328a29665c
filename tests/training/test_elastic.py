"""A run that goes on with another number of ranks and other ZeRO settings."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch
from harness import FORKED, ROOT, TRAIN, WORKERS, as_arguments, launch, start, steps, tiny
from plan import checkpoints
from test_distributed import ranks_of, wait_for_step
from workers.elastic import CASES, KINDS, STARTS

from ibdistill.planning import footprint
from ibdistill.planning.footprint import Zero


def curve(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").open())
    return {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}


def test_the_curve_goes_on_from_2_ranks_to_1_to_3_and_from_zero2_to_zero3_to_zero1(tmp_path):
    """First through the launcher, as that is what users do, then on forked ranks. The 8 questions of a step
    do not divide by 3 ranks.

    The losses are those of an uninterrupted run up to rounding, 20 and more steps after the changes. At the
    usual learning rate of 2e-3 rounding grows a thousandfold in these steps on some processors.
    """
    settings = {
        "optim.lr": 1e-4,
        "optim.max_steps": 40,
        "student.dropout": 0.0,
        "student.precision": "fp32",
        "run.save_every": 50,
        "run.report_to": '["jsonl"]',
        "run.export": False,
        "run.test_limit": 2,
    }
    log = tmp_path / "whole.log"
    code = launch([FORKED, "1", *as_arguments(tiny(tmp_path / "whole", **settings))], log=log)
    assert code == 0, log.read_text()[-4000:]
    stops = []
    for ranks, zero, until in ((2, "zero2", 4), (1, "zero3", 10), (3, "zero1", 0)):
        log = tmp_path / f"{ranks}.log"
        more = settings | {"deepspeed.config": zero}
        arguments = as_arguments(tiny(tmp_path / "moved", **more))
        if not stops:
            process = start([TRAIN, *arguments], ranks=ranks, log=log)
        else:
            process = start([FORKED, str(ranks), *arguments], log=log)
        if until:
            wait_for_step(process, log, until)
            last = psutil.Process(process.pid).children()[-1] if stops else ranks_of(process)[-1]
            last.send_signal(signal.SIGTERM)
        code = process.wait(300)
        if until and stops:  # what the process says that forked the ranks
            assert code == 1 and "terminated with exit code 143" in log.read_text(), log.read_text()[-4000:]
        else:
            assert code == (143 if until else 0), log.read_text()[-4000:]
        stops += map(int, re.findall(r"stopped by a signal after step (\d+)", log.read_text()))
    said = log.read_text()
    assert stops[-1] <= 20
    assert "the run continues though deepspeed.config was 'zero3' and is 'zero1'" in said
    assert re.search(r'was written by 1 ranks with zero_optimization {"stage": 3, .* anew among 3 with', said)
    whole, moved = curve(tmp_path / "whole"), curve(tmp_path / "moved")
    assert list(whole) == list(moved) == list(range(1, 41))
    for step, loss in whole.items():
        assert moved[step] == pytest.approx(loss, rel=1e-6), step


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """What tests/workers/elastic.py left."""
    folder = tmp_path_factory.mktemp("elastic")
    log = folder / "log"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    assert launch([str(WORKERS / "elastic.py"), str(folder)], log=log, env=env) == 0, log.read_text()[-4000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_masters_and_moments_move_between_stages_bit_for_bit(moved, case):
    for number in range(len(STARTS) - 1):
        saved, found = (torch.load(moved / f"{case}-{number}-{kind}.pt") for kind in ("saved", "found"))
        assert saved.keys() == found.keys() and len(saved) > 20
        for name, values in saved.items():
            for kind in KINDS:
                assert torch.equal(values[kind].cpu(), found[name][kind].cpu()), (number, name, kind)
    assert any(name.startswith("vid.") for name in saved) == ("vid" in case)
    assert all("lora_" in name for name in saved) == ("lora" in case)


@pytest.mark.parametrize("case", CASES)
def test_a_start_that_shares_out_anew_holds_and_writes_what_the_planner_says(moved, case):
    """With frozen weights below adapters too."""
    precision = "bf16" if "bf16" in case else "fp32"
    for number, (ranks, file) in enumerate(STARTS):
        facts, zero = torch.load(moved / f"{case}-{number}-bytes.pt"), Zero.read(file)
        parts, host = footprint.student_states(facts["sizes"], precision, zero, ranks)
        predicted = parts["parameters"] + parts["optimizer"] + host
        for held in facts["held"] if not zero.offload_optimizer else ():
            assert held["parameters"] + held["optimizer"] == pytest.approx(predicted, rel=0.05), file
        written = checkpoints.sizes_of(facts["sizes"], precision, zero, ranks)[1]
        assert written < facts["written"] < 1.05 * written + ranks * 130_000, file  # 200 bytes a tensor


def test_a_checkpoint_of_another_model_is_named(make_job):
    job = make_job()
    steps(job, 1)
    assert job.checkpoints.save(job.engine, job.state)
    other = {"run.allow_config_change": True, "student.model": "demo-teacher", "deepspeed.config": "zero1"}
    with pytest.raises(
        ValueError, match=r"it is of another model: \S+ has \d+ elements there and \d+ here"
    ) as e:
        make_job(**other)
    assert "step-00000001" in str(e.value) and "there is no checkpoint before it" in str(e.value)


def test_ranks_that_did_not_write_a_checkpoint_draw_dropout_from_seed_and_step(make_job):
    """A checkpoint of one rank whose marker says that there were three."""
    job = make_job()
    steps(job, 1)
    assert job.checkpoints.save(job.engine, job.state)
    expected = torch.get_rng_state()
    assert make_job().state.step == 1 and torch.equal(torch.get_rng_state(), expected)
    marker = job.checkpoints.folder / "step-00000001" / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"world_size": 3}))
    drawn = []
    for seed in (0, 0, 1):
        assert make_job(**{"run.seed": seed, "run.allow_config_change": True}).state.step == 1
        drawn.append(torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], expected)
