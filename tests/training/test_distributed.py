"""Claims about several ranks; they are forked (workers/ranks.py) unless a claim is about the launcher."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from experts import one_layer
from harness import (
    FORKED,
    IN_FULL,
    ROOT,
    TRAIN,
    WORKERS,
    Forked,
    alone,
    as_arguments,
    kill_session,
    launch,
    start,
    tiny,
)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """`MODEL_zeroS_Rranks` -> parameter -> gradient of one global batch of 8, in micro-batches of 2."""
    folder = tmp_path_factory.mktemp("gradients")
    log = folder / "log"
    assert launch([str(WORKERS / "gradients.py"), str(folder)], log=log) == 0, log.read_text()[-4000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(
    ("model", "parameters", "ranks"),
    [("demo-student", 40, ranks) for ranks in (1, 2, 4)]
    + [("demo-student-decoder", 25, ranks) for ranks in (1, 2)],
)
def test_the_gradient_does_not_depend_on_ranks_micro_batches_and_stage(
    gradients, model, parameters, ranks, stage
):
    reference, ours = gradients[f"{model}_zero0_1ranks"], gradients[f"{model}_zero{stage}_{ranks}ranks"]
    assert reference.keys() == ours.keys() and len(reference) > parameters
    for name, gradient in reference.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < 1e-5, f"{name}: {error}"


def ranks_of(launcher: subprocess.Popen | Forked) -> list[psutil.Process]:
    """The running ranks of a launcher, whose second process starts them, in their order."""
    return psutil.Process(launcher.pid).children()[0].children()


def wait_for_step(process: subprocess.Popen | Forked, log: Path, step: int, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        steps = re.findall(r"step (\d+)/", log.read_text())
        if steps and int(steps[-1]) >= step:
            return
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached:\n{log.read_text()[-4000:]}")


def scalar_steps(folder: Path, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


@pytest.mark.parametrize(
    ("stage", "signal_number", "exit_code"), [(3, signal.SIGTERM, 143), (2, signal.SIGUSR1, 85)]
)
def test_killed_signalled_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path, stage, signal_number, exit_code
):
    """kill -9 at a random step, resume, a signal to one rank only, resume: the same weights and curve.

    The start that gets the signal is the launcher's, which must pass the exit code on: a cold one in ZeRO-2.

    Accumulation is on (2 ranks x 2 micro-batches of 2), and no checkpoint falls on an epoch's
    end (44 records, 5 steps per epoch). The ZeRO-3 run has all else that there is: a teacher in ZeRO-3, its
    cache, and agreement on unlabelled questions after steps 10 and 15. It is killed within the first of these
    refreshes too: the cache then holds all of the epoch that has just ended, and the last checkpoint is
    older. The other two interruptions are between the refreshes. Its models have one layer.
    """
    settings = {
        "data.subsample": 44,
        "objective.method": "ib",
        "optim.max_steps": 20,
        "optim.micro_batch_size": 2,
        "optim.warmup_steps": 5,
        "run.save_every": 4,
        "run.test_limit": 11,
        "deepspeed.config": f"zero{stage}",
    }
    teacher = {
        "teacher.placement": "zero3",
        "teacher.model": one_layer(tmp_path / "teacher", "demo-teacher"),
        "student.model": one_layer(tmp_path / "student"),
        "objective.method": "ib+kd",
        "data.unlabelled": 64,
        "data.agree_at": "[0.5,0.75]",
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launched, forked, kill_at = [TRAIN], [FORKED, "2"], random.randrange(5, 10)
    is_cold, env = stage == 2, IN_FULL if stage == 2 else {}
    if stage == 3:
        settings |= teacher
        launched = forked = [str(WORKERS / "agreeing.py")]
        kill_at = random.randrange(11, 13)
    caches = {run: {"teacher.cache": f"{run}_cache"} if stage == 3 else {} for run in (whole, broken)}
    log = tmp_path / "whole.log"
    code = launch([*forked, *as_arguments(tiny(whole, **settings, **caches[whole]))], log=log, env=env)
    assert code == 0, log.read_text()[-4000:]

    arguments = as_arguments(tiny(broken, **settings, **caches[broken]))
    if stage == 3:
        kill_within_the_first_refresh([*forked, *arguments], tmp_path)
        assert not (broken / "agree").exists() and max(scalar_steps(broken, "loss/total")) == 10
    print(f"kill -9 after step {kill_at}")
    log = tmp_path / "killed.log"
    process = start([*forked, *arguments], log=log, env=env)
    wait_for_step(process, log, kill_at)
    kill_session(process)
    assert not (broken / "result.json").exists()

    log = tmp_path / "signalled.log"
    process = start([*launched, *arguments], ranks=2, cold=is_cold, log=log)
    wait_for_step(process, log, 13)
    ranks_of(process)[1].send_signal(signal_number)
    assert process.wait(300) == exit_code, log.read_text()[-4000:]
    assert "resumed from" in log.read_text()

    log = tmp_path / "resumed.log"
    assert launch([*forked, *arguments], log=log, env=env) == 0, log.read_text()[-4000:]
    assert "resumed from" in log.read_text()

    name = "student/model.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, broken)]
    for result in results:
        assert result.pop("seconds") > 0 and result.pop("test_seconds") > 0
        assert result.pop("commit")  # somebody may work on the code meanwhile
    assert results[0] == results[1]
    assert results[0]["steps"] == 20 and results[0]["ranks"] == 2
    assert scalar_steps(whole, "loss/total") == scalar_steps(broken, "loss/total") == list(range(1, 21))
    if stage == 3:
        answers = [sorted(path.name for path in (run / "agree").iterdir()) for run in (whole, broken)]
        assert answers[0] == answers[1] and len(answers[0]) == 2  # a name holds its content's digest
        assert scalar_steps(whole, "agree/agreed") == scalar_steps(broken, "agree/agreed") == [11, 16]
    check_export_decodes_the_same(broken)


def test_one_ranks_full_disk_loses_neither_the_run_nor_the_checkpoint_before(tmp_path):
    """Rank 1 of 2 cannot write its shard: both ranks say so, go on, and save again later."""
    log = tmp_path / "log"
    worker = [str(WORKERS / "full_disk.py"), str(tmp_path)]
    code = launch(worker, log=log, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert code == 0, log.read_text()[-4000:]
    assert log.read_text().count("checkpoint of step 3 not saved, training goes on: rank 1: ") >= 2
    expected = {
        "saved": [True, False, True],
        "left": ["step-00000002"],
        "problem": None,
        "lost": False,
        "resumed_at": 4,
        "resumed_same": True,
    }
    assert json.loads((tmp_path / "facts.json").read_text()) == [[expected] * 2] * 2


def test_all_ranks_fall_back_from_one_ranks_damaged_shard(tmp_path):
    """To the checkpoint before, to the one before that, to none; and from what only rank 1 cannot load."""
    log = tmp_path / "log"
    worker = [str(WORKERS / "damaged.py"), str(tmp_path)]
    code = launch(worker, log=log, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert code == 0, log.read_text()[-4000:]
    assert json.loads((tmp_path / "facts.json").read_text()) == [[[3, True, 2, 1, 0]] * 2] * 2
    said = log.read_text()
    counts = [said.count(f"step-0000000{step} is not used: the content of") for step in (1, 2, 3)]
    not_loaded = (
        r"step-00000004 is not used: rank 1: \S*zero_pp_rank_1_\S*optim_states.pt cannot be loaded: \w"
    )
    assert len(re.findall(not_loaded, said)) == 2
    assert counts == [2 * 1, 2 * 2, 2 * 3]  # once at each look, by rank 0 alone


def test_killed_while_a_checkpoint_is_being_written_resumes_from_the_one_before_bit_for_bit(tmp_path):
    """Rank 1 of 2 is still writing step 10 when all are killed, some steps later; or still copying it from a
    folder of its node, where nothing is left."""
    settings = {"optim.max_steps": 18, "run.save_every": 5, "deepspeed.config": "zero2", "run.test_limit": 2}
    settings |= {"run.report_to": []}
    log = tmp_path / "log"
    whole = as_arguments(tiny(tmp_path / "whole", **settings))
    assert launch([FORKED, "2", *whole], log=log) == 0, log.read_text()[-4000:]
    kill_in_writing(tmp_path / "written", tmp_path / "whole", settings)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as local:
        kill_in_writing(tmp_path / "copied", tmp_path / "whole", settings | {"run.local_dir": local})
        assert not list(Path(local).iterdir())


def kill_in_writing(folder: Path, whole: Path, settings: dict[str, object]) -> None:
    """Kill a run on 2 ranks while rank 1 writes the checkpoint of step 10, and compare its end."""
    folder.mkdir()
    log, reached = folder / "log", folder / "reached"
    broken = as_arguments(tiny(folder / "run", **settings))
    slow = [str(WORKERS / "slow_disk.py"), "2", *broken]
    process = start(slow, log=log, env={"SLOW_DISK_REACHED": str(reached)})
    wait_for_step(process, log, 13)
    deadline = time.monotonic() + 60
    while not reached.exists():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)
    kill_session(process)
    checkpoints = folder / "run/checkpoints"
    assert {path.parent.name for path in checkpoints.glob("*/complete.json")} == {"step-00000005"}
    assert list((checkpoints / "step-00000010").iterdir())  # rank 0 has written its files

    assert launch([FORKED, "2", *broken], log=log) == 0, log.read_text()[-4000:]
    said = log.read_text()
    assert "step-00000010 is not used: it has no complete.json" in said
    assert re.search("resumed from .*/step-00000005$", said, re.MULTILINE)
    files = [run / "student/model.safetensors" for run in (whole, folder / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def kill_within_the_first_refresh(command: list[str], folder: Path) -> None:
    """kill -9 of all where rank 1 is between its two answers and rank 0 may be waiting for it."""
    reached, log = folder / "reached", folder / "within.log"
    process = start(command, log=log, env={"AGREEING_STOPS_AT": str(reached)})
    deadline = time.monotonic() + 300
    while not reached.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)
    kill_session(process)


def check_export_decodes_the_same(folder: Path) -> None:
    """The exported student, loaded by transformers alone, says what the run's predictions say.

    11 records over 2 ranks: uneven shares, each record once and in order.
    """
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from ibdistill.data.loading import load

    rows = [json.loads(line) for line in (folder / "predictions/step-00000020/test_demo.jsonl").open()]
    from ibdistill.config.sections import DataConfig

    records = load(DataConfig(), needs_rationale=True).test["demo"][:11]
    assert [row["id"] for row in rows] == [record.id for record in records]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    for row in rows:
        for prefix, said, limit in (("predict: ", row["label"], 16), ("explain: ", row["rationale"], 32)):
            ids = tokenizer(prefix + row["question"], return_tensors="pt").input_ids
            output = model.generate(input_ids=ids, max_new_tokens=limit, do_sample=False)
            assert tokenizer.decode(output[0], skip_special_tokens=True) == said
    assert "arXiv 2305.02301" in (folder / "student/README.md").read_text()


@pytest.mark.parametrize("said", [None, "2"])
def test_ranks_share_the_cores_unless_the_user_says_how(tmp_path, monkeypatch, said):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script, log = tmp_path / "threads.py", tmp_path / "log"
    count = r"sys.stdout.write(f'{torch.get_num_threads()} threads\n')"
    script.write_text(
        "import sys, torch\nfrom ibdistill.runtime import distributed\n"
        f"{count}\ndistributed.init()\n{count}\ndistributed.exit_at_once(0)\n"
    )
    if said:  # one process, to which the launcher's variable says that there are two
        env = alone() | {"OMP_NUM_THREADS": said, "LOCAL_SIZE": "2"}
        run = subprocess.run([sys.executable, script], env=env, cwd=ROOT, capture_output=True, text=True)
        assert re.findall(r"^(\d+) threads$", run.stdout, re.MULTILINE) == [said, said], run.stderr
        return
    assert launch([str(script)], ranks=2, cold=True, log=log) == 0, log.read_text()[-4000:]
    found = sorted(map(int, re.findall(r"^(\d+) threads$", log.read_text(), re.MULTILINE)))
    cores = max(found)  # before `init`
    assert found == sorted(2 * [cores] + 2 * [max(1, cores // 2)])
