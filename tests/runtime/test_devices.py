"""Which device a rank takes, and that what ranks agree on does not go over the devices' own group.

No GPU is needed: `torch.cuda` is faked, and the group of the devices is one that does nothing.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, output_of
from workers import device_group

from ibdistill.runtime import distributed, hardware


def seen(monkeypatch, devices: int) -> list[torch.device]:
    """Let this process see so many GPUs; gets those that are made the current one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    return chosen


@pytest.mark.parametrize("devices", [1, 2, 4, 16])
def test_local_rank_becomes_the_index_of_the_device(monkeypatch, devices):
    """As many ranks as devices; and with `--gpus-per-task=1` each of 16 ranks sees device 0 alone."""
    for local_rank in range(16 if devices == 1 else devices):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        chosen = seen(monkeypatch, devices)
        device = distributed._device(local_rank)
        assert device == torch.device("cuda", 0 if devices == 1 else local_rank)
        assert chosen == [device] and os.environ["LOCAL_RANK"] == str(device.index)


def test_without_a_gpu_local_rank_stays(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert seen(monkeypatch, 0) == []
    assert distributed._device(3) == torch.device("cpu") and os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize(("variable", "expected"), [(None, False), ("0", False), ("1", True)])
def test_cudnns_attention_is_off_unless_the_environment_asks_for_it(monkeypatch, variable, expected):
    seen(monkeypatch, 1)
    switched: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("IBDISTILL_CUDNN_ATTENTION", raising=False)
    if variable is not None:
        monkeypatch.setenv("IBDISTILL_CUDNN_ATTENTION", variable)
    distributed._device(0)
    assert switched == [expected]


def test_what_ranks_agree_on_and_barriers_stay_on_gloo_and_rank_0_may_take_its_time(tmp_path):
    """A collective that went to the fake group would leave its result out, or not wait for the other rank."""
    output_of(str(ROOT / "tests/workers/device_group.py"), str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, facts in enumerate(found):
        assert facts["backends"] == ["cpu:gloo,cuda:nccl"] and facts["device"] == f"cuda:{rank}"
        assert facts["objects"] == [{"rank": 0}, {"rank": 1}]
        assert facts["sum"] == [3.0] and facts["max"] == 5 and facts["from rank 0"] == "rank 0"
        assert facts["loaded"] == "a model"
        assert facts["loading"] > device_group.TIMEOUT_S
    (came, left), (came_late, _) = (facts["barrier"] for facts in found)
    assert came < came_late <= left


class OnGpu:
    """What `ToHost` asks of a tensor on a GPU."""

    device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, (3, 2)

    def detach(self):
        return self


def test_copies_to_the_host_go_to_pinned_memory_and_are_waited_for_once_they_are_needed(monkeypatch):
    done = []
    event = SimpleNamespace(record=lambda: done.append("record"), synchronize=lambda: done.append("wait"))
    pinned = SimpleNamespace(copy_=lambda tensor, **given: done.append(given) or pinned)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch, "empty", lambda shape, **given: done.append((shape, given)) or pinned)
    on_host = torch.ones(2)
    copies = hardware.ToHost({"states": OnGpu(), "cu": on_host})
    new = ((3, 2), {"dtype": torch.bfloat16, "pin_memory": True})
    assert done == [new, {"non_blocking": True}, "record"] and not copies.is_there
    found = copies.wait()
    assert done[3:] == ["wait"] and found["states"] is pinned and torch.equal(found["cu"], on_host)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA RTX A6000", 154.8, 38.7),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_the_peak_of_a_known_card_is_its_data_sheets(monkeypatch, name, bf16, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda", 0)
    assert hardware.peak_rate(device, torch.bfloat16) == pytest.approx(1e12 * bf16)
    assert hardware.peak_rate(device, torch.float32) == pytest.approx(1e12 * fp32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA A10G", torch.bfloat16),  # another card than the A10
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),
        ("NVIDIA Graphics Device", torch.float32),
        ("Tesla V100-SXM2-32GB", torch.bfloat16),  # it has no units for bf16
    ],
)
def test_the_peak_of_another_card_is_measured(monkeypatch, name, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 7.0)
    assert hardware.peak_rate(torch.device("cuda", 0), dtype) == 7.0
