"""What all tests share: the environment, the order of the files, a one-rank process group and jobs on it."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if "HF_HOME" not in os.environ:  # where tables of data go; workers of pytest-xdist share it
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ibdistill-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest
from harness import ROOT, short_code, short_demo, tiny

sys.path.append(str(ROOT / "tools"))  # the planner's modules, and the scripts beside them

LONGEST = (
    "slurm test_distributed test_kernel_report test_interpreted test_study test_footprint "
    "test_rationale_writing test_train test_teacher test_teacher_families test_launcher test_elastic "
    "test_evaluate_student test_bench_teacher test_on_policy test_teacher_alignment test_lora_runs test_plan "
    "test_reasoning_runs test_teacher_server test_teacher_answers test_decoder_only_runs test_chat_runs "
    "test_packed_runs test_sampled_form test_families test_depth test_pseudo_labels test_checkpoint "
    "test_zero test_accept test_browser test_new_family_runs test_meter test_references test_kills "
    "test_sequence_parallel test_tables"
).split()
"""Folders and files that take longest. Where several workers share the tests these come first, so that no
worker is left alone with one at the end. `pytest_configure` checks that each of them exists."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from this process and its children, unless `-m gpu` chooses the tests that need one.

    The other tests compare values bit for bit, or with bounds that hold for a CPU's arithmetic. CUDA reads
    the variable once in a process, so tests with a GPU and tests without one cannot share a process.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    tests = Path(__file__).parent
    there = {path.stem for path in tests.rglob("test_*.py")} | {path.name for path in tests.iterdir()}
    assert there >= set(LONGEST), f"LONGEST names what is not in tests/: {sorted(set(LONGEST) - there)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; tests marked `gpu` are skipped where no GPU can be seen."""

    def place(item: pytest.Item) -> int:
        name = next((name for name in (item.path.parent.name, item.path.stem) if name in LONGEST), None)
        return LONGEST.index(name) if name else len(LONGEST)

    items.sort(key=place)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        for item in on_gpu if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and is run by `pytest -m gpu`"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file's tests go to one worker, because they share what is made once for it, and so do those of the
    one Slurm cluster."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "slurm" if "/slurm/" in file else file

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def world() -> Iterator:
    """A process group of one rank, for code that talks to its peers."""
    import torch.distributed as dist

    from ibdistill.runtime import distributed

    yield distributed.init()
    dist.destroy_process_group()


@pytest.fixture(autouse=True, scope="module")
def demo_in_short(request) -> Iterator[None]:
    """`harness.short_demo` for every test but those of the corpus itself."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "data":
            from ibdistill.data import stored_records
            from ibdistill.data.tasks import demo

            patch.setattr(demo, "load_demo", short_demo(demo.load_demo))
            patch.setattr(stored_records, "code", short_code)  # its tables are not those of the whole demo
        yield


@pytest.fixture
def make_job(world, tmp_path, monkeypatch, request):
    """A function that makes a one-rank job in a folder; called again for the same folder, it resumes.

    Figures, which take most of an evaluation's time, are drawn in tests/monitor alone.
    """
    import torch

    from ibdistill.config.load import load_settings
    from ibdistill.evaluation import report
    from ibdistill.training.prepare import prepare

    if request.path.parent.name != "monitor":
        monkeypatch.setattr(report, "figures", lambda *_: {})
    jobs, linear = [], torch.nn.functional.linear

    def make(folder=tmp_path / "run", **overrides):
        jobs.append(prepare(load_settings(None, tiny(folder, **overrides)), world))
        return jobs[-1]

    yield make
    for job in jobs:
        job.board.close()
        job.engine.destroy()
    torch.nn.functional.linear = (
        linear  # ZeRO-3 replaces it for the whole process, by a function that costs other operations
    )
