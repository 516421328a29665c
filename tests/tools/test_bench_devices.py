"""The device of a benchmark: a faked GPU is chosen, waited for and asked for its memory."""

from __future__ import annotations

import mmap
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from bench import devices
from harness import ROOT

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """A GPU that notes what it is asked, in order; its figures are made up."""
    made: list[str] = []

    def fake(name: str, answer: object = None):
        monkeypatch.setattr(torch.cuda, name, lambda *given: made.append(name) or answer)

    for name in ("synchronize", "reset_peak_memory_stats"):
        fake(name)
    fake("is_available", True)
    fake("get_device_name", "NVIDIA H100")
    fake("memory_allocated", 100)
    fake("max_memory_allocated", 700)
    return made


def test_a_gpu_is_chosen_timed_and_measured_through_torch(calls):
    device = devices.choose()
    assert device == GPU and devices.name(device) == "NVIDIA H100"
    calls.clear()
    assert devices.timed(lambda: calls.append("action"), device) >= 0
    assert calls == ["synchronize", "action", "synchronize"]
    calls.clear()
    before = devices.held_bytes(device)
    devices.restart_peak(device)
    assert devices.peak_bytes(device) - before == 600
    assert calls == ["memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"]


def test_the_benchmarks_of_training_run_on_the_gpu(calls, monkeypatch):
    """Their modules are read anew, since one of them chooses as it is read."""
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    modules = {}
    for name in ("scaling", "train"):
        spec = spec_from_file_location(f"{name}_read_anew", ROOT / f"tools/bench/{name}.py")
        modules[name] = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, modules[name])
        spec.loader.exec_module(modules[name])
    scaling, train = modules.values()
    assert scaling.DEVICE.type == "cuda"
    cases = []
    monkeypatch.setattr(train, "generate_features", lambda: "features")
    monkeypatch.setattr(
        train, "TrainCase", lambda *given: cases.append(given) or sys.exit("one case is enough")
    )
    with pytest.raises(SystemExit, match="one case is enough"):
        train.main()
    assert cases[0][0] == "features" and cases[0][-1] == GPU


def test_without_a_gpu_the_process_is_measured(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = devices.choose()
    assert device == CPU and devices.name(device) == f"CPU, {torch.get_num_threads()} threads"

    size = 2**28

    def above() -> int:
        devices.restart_peak(device)
        before = devices.held_bytes(device)
        # pages of its own, which neither torch's settings nor memory that malloc kept from before can change
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            for start in range(0, size, mmap.PAGESIZE):
                pages[start] = 1
        return devices.peak_bytes(device) - before

    # several times and with room: a machine short of memory may take other pages of the process meanwhile
    seen = [above() for _ in range(3)]
    assert any(0.5 * size < bytes_ < 1.5 * size for bytes_ in seen), seen
    assert devices.timed(lambda: None, device) >= 0 and not calls
