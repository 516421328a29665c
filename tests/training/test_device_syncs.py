"""How often DeepSpeed makes the host wait for the whole device, and so for the teacher's stream too.

No GPU is needed: DeepSpeed's accelerator is made to look like one whose streams are not in step with the
host, and its waits are counted.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from harness import steps

from ibdistill.runtime import deepspeed_fixes


@pytest.fixture
def waits(monkeypatch) -> list[int]:
    """Gets one entry for each time that the host waits for the device."""
    counted: list[int] = []
    device = type(get_accelerator())
    stream = mock.MagicMock()
    monkeypatch.setattr(device, "resolves_data_dependency", lambda self: False)
    monkeypatch.setattr(device, "synchronize", lambda self, device_index=None: counted.append(1))
    monkeypatch.setattr(device, "current_stream", lambda self, device_index=None: stream)
    monkeypatch.setattr(device, "Stream", lambda self: stream)
    monkeypatch.setattr(device, "is_synchronized_device", lambda self: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return counted


STEPS, MICRO_BATCHES = 4, 2


@pytest.mark.parametrize(("file", "per_micro_batch"), [("zero0", 0), ("zero1", 0), ("zero2", 1)])
def test_device_wide_waits_of_a_step(make_job, waits, file, per_micro_batch):
    """ZeRO-2 overlaps reductions with the backward pass and waits for them at its end; see ds_configs."""
    job = make_job(**{"deepspeed.config": file, "optim.micro_batch_size": 4})
    assert not job.engine.tput_timer.config.enabled
    steps(job, 1)
    waits.clear()
    steps(job, STEPS)
    assert len(waits) == per_micro_batch * STEPS * MICRO_BATCHES


def test_with_deepspeeds_default_the_timer_waits_for_the_device(make_job, waits, monkeypatch):
    """What the test above would find if the timer were left on."""
    monkeypatch.setattr(deepspeed_fixes, "NO_THROUGHPUT_TIMER", {})
    job = make_job(**{"deepspeed.config": "zero0", "optim.micro_batch_size": 4})
    steps(job, 3)  # DeepSpeed measures from the third step on
    waits.clear()
    steps(job, STEPS)
    assert len(waits) >= STEPS * MICRO_BATCHES
