"""The scaling benchmark prints what it promises."""

from __future__ import annotations

import re

import pytest
import torch
from harness import ROOT, output_of


def test_ratios_are_measured_and_predicted():
    options = "--model demo-student --questions 2 --question 16 --steps 2 --rounds 1".split()
    printed = output_of(str(ROOT / "tools/bench/scaling.py"), *options, cold=True)
    lines = [line.split() for line in printed.splitlines() if re.match(r" +[124] ", line)]
    assert [line[0] for line in lines] == ["1", "2", "4"]
    one, *several = lines
    assert one[7:] == ["-", "1.00", "1.00", "+0%"]
    for line in several:
        collectives, imbalance, ratio, predicted = float(line[3][:-1]), *(float(line[i]) for i in (4, 8, 9))
        assert 0 < collectives < 100 and imbalance >= 1 and predicted > 0
        assert float(line[1]) / float(one[1]) / int(line[0]) == pytest.approx(ratio, abs=0.02)


def test_at_the_same_rates_more_processes_take_the_time_of_what_they_send(monkeypatch):
    """Over a ring n processes send 2 (n - 1) / n times the gradients, 4 bytes per parameter."""
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    import scaling

    lengths = scaling.dryrun.Lengths(2, 16, 4, 40)
    rates = {"products": 1e9, "memory": 1e30, "link": 1e6}
    one, two, four = (
        scaling.predict(scaling.load_of("demo-student", "zero0", lengths, n), rates) for n in (1, 2, 4)
    )
    gradients = 4 * 181_696 / 1e6  # the parameters of demo-student
    assert two - one == pytest.approx(gradients, rel=1e-6)
    assert four - one == pytest.approx(1.5 * gradients, rel=1e-6)


def test_a_gpu_takes_one_process(monkeypatch):
    """On a faked pair of GPUs four processes are not measured, and the output says where the others were."""
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    import scaling

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (scaling.possible(gpu), scaling.possible(cpu)) == ((1, 2), (1, 2, 4))
    assert scaling.where(gpu) == "one NVIDIA H100 for each" and "cores shared" in scaling.where(cpu)
