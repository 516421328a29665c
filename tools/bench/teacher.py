"""What an online teacher costs per step, by placement:

    deepspeed --num_gpus 2 tools/bench/teacher.py [--student t5-mini] [--teacher t5-v1_1-small] [--method ib]

Each variant is a run by `training.prepare.prepare` and `ibdistill.train.train_step` on the same questions of
the demo corpus: `none` (method dss), `replica`, `zero3`, and `cache`, which is the second and later epochs of
a run with a zero3 teacher, whose answers all come from files. The variants take turns at every step, and all
steps are repeated in rounds; the least time of a step on the slowest rank counts (on a shared machine the
mean measures the neighbours). A round before them warms up, fills the cache and completes the prefetch
traces.

The floor is `none`'s step plus one bare forward pass of the whole teacher, which takes turns with the others:
transformers' own modules on the micro-batch, without the cache, the packing or the terms that use it. It is
the encoder on the predict stream alone if the objective reads nothing but question states.

Memory is measured in new processes, forked after the imports, with a set of ranks for each variant: a rank's
high-water mark over three steps (that of the allocator on a GPU, else that of the resident set).

`fidelity` says instead what the forms of the cache keep: bytes per target token, and how far the distillation
loss and the student's gradient move when a form takes the place of the teacher's own states. It needs a
trained teacher and student, as `tools/demo.sh` leaves them:

    python tools/bench/teacher.py fidelity --student FOLDER --teacher FOLDER
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import devices
import fire
import numpy as np
import torch

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.config.sections import TeacherConfig
from ibdistill.models import presets
from ibdistill.models.forward import states
from ibdistill.objectives import weights as objectives_weights
from ibdistill.objectives.teacher_answers import TeacherAnswer
from ibdistill.ops.head_loss.arguments import TeacherStream
from ibdistill.runtime import distributed, hardware
from ibdistill.runtime.distributed import World
from ibdistill.teacher.answer_tensors import NO_HEAD, pack, top_k, unpack
from ibdistill.teacher.sampled_form import uniforms_of
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare

SEEDS = 16
"""Sets of draws of the cache's form sampled."""

VARIANTS = ("none", "replica", "zero3", "cache")


@dataclass(frozen=True)
class TeacherCase:
    """What all variants share."""

    root: str
    student: str
    teacher: str
    method: str
    batch_size: int
    precision: str
    zero: str
    form: str = "topk"

    def job(self, variant: str, world: World) -> Job:
        """A variant's run, ready to step. Collective."""
        values = {
            "run.dir": f"{self.root}/{variant}",
            "run.report_to": [],
            "student.model": self.student,
            "student.precision": self.precision,
            "optim.batch_size": self.batch_size,
            "deepspeed.config": self.zero,
        }
        if self.student in presets.PRESETS and not self.student.startswith("demo-"):
            values["student.tokenizer"] = "train"
        if variant != "none":
            values |= {"objective.method": self.method, "teacher.model": self.teacher}
            values |= {"teacher.precision": self.precision}
            values["teacher.placement"] = "zero3" if variant == "cache" else variant
        if variant == "cache":
            values |= {"teacher.cache": f"{self.root}/answers", "teacher.cache_form": self.form}
        return prepare(load_settings("demo", values), world)


def bare_forward(job: Job) -> Callable[[], None]:
    """An action: one forward pass of `job`'s teacher, a replica, on the micro-batch of the job's step."""
    wanted = objectives_weights.wanted(job.config.objective)

    @torch.no_grad()
    def forward() -> None:
        batch = job.micro_batches()[0][1].to(job.world.device)
        with job.teacher_answers.teacher.text_model(job.tokenizer) as model:
            states(model, batch, targets=wanted.targets)

    return forward


def measure_times(case: TeacherCase, steps: int, rounds: int, world: World) -> tuple[dict[str, float], dict]:
    """(seconds per step by variant and of `forward` alone, the teacher's bytes on this rank by variant).

    Collective.
    """
    jobs = {variant: case.job(variant, world) for variant in VARIANTS}
    actions = {variant: partial(train.train_step, job) for variant, job in jobs.items()}
    actions["forward"] = bare_forward(jobs["replica"])
    best = {name: np.full(steps, np.inf) for name in actions}
    for turn in range(-1, rounds):
        for index in range(steps):
            names = list(actions) if (turn + index) % 2 else list(actions)[::-1]  # none always goes first
            for name in names:
                jobs.get(name, jobs["replica"]).state.step = index
                seconds = devices.timed(actions[name], world.device)
                slowest = max(distributed.gather_objects(seconds))
                if turn >= 0:
                    best[name][index] = min(best[name][index], slowest)
        if turn < 0:
            jobs["cache"].teacher_answers.end_epoch()
    held = {name: job.teacher_answers.teacher.bytes() for name, job in jobs.items() if job.teacher_answers}
    return {name: float(seconds.mean()) for name, seconds in best.items()}, held


def peak_bytes(case: TeacherCase, variant: str, port: int) -> int:
    """This rank's high-water mark over three steps. It is called in a new process."""
    os.environ["MASTER_PORT"] = str(port)
    world = distributed.init()
    logging.getLogger("ibdistill").setLevel(logging.ERROR)
    job = case.job(variant, world)
    for _ in range(3):
        train.train_step(job)
    return hardware.peak_memory(world.device)


def measure_memory(case: TeacherCase, variant: str) -> int:
    """The largest high-water mark of the ranks, each of which starts a process for it."""
    port = distributed.run_on_rank_0(distributed.free_port)
    context = multiprocessing.get_context("forkserver")  # which has no device, no threads and no tensors
    context.set_forkserver_preload(["ibdistill.train"])
    with ProcessPoolExecutor(1, context) as process:
        return distributed.max_over_ranks(process.submit(peak_bytes, case, variant, port).result())


def main(
    student: str = "t5-mini",
    teacher: str = "t5-v1_1-small",
    method: str = "ib",
    batch_size: int = 16,
    precision: str = "fp32",
    zero: str = "auto",
    cache_form: str = "topk",
    steps: int = 8,
    rounds: int = 5,
    memory: bool = True,
    local_rank: int = -1,
) -> None:
    """Measure and print.

    `student`, `teacher`: presets or folders. `method`: ib (vid), kd or ib+kd. `precision`: that of both
    models. `cache_form`: topk or states, for kd.
    """
    world = distributed.init()
    logging.getLogger("ibdistill").setLevel(logging.ERROR)
    root = distributed.run_on_rank_0(tempfile.mkdtemp)
    case = TeacherCase(root, student, teacher, method, batch_size, precision, zero, cache_form)
    peaks = {name: measure_memory(case, name) for name in VARIANTS} if memory else {}
    seconds, held = measure_times(case, steps, rounds, world)
    if world.rank:
        return
    floor = seconds["none"] + seconds["forward"]
    print(f"{student} from {teacher}, {method}, {precision}, {zero}, batch {batch_size}, {world.size} ranks")
    print(f"floor {1000 * floor:.1f} ms: a step without a teacher, and one bare forward pass of the teacher")
    print("variant    ms/step  of none  of floor  teacher_MiB  peak_MiB")
    for name in VARIANTS:
        time_, mib = seconds[name], f"{held[name] / 2**20:.1f}" if name in held else "-"
        peak = f"{peaks[name] / 2**20:.0f}" if peaks else "-"
        ratios = f"{time_ / seconds['none']:9.2f}{time_ / floor:10.2f}"
        print(f"{name:10}{1000 * time_:8.1f}{ratios}{mib:>13}{peak:>10}")


def fidelity(student: str, teacher: str, batch_size: int = 64) -> None:
    """Print bytes per token, loss and gradient of each form of the cache, on one batch of the demo corpus."""
    world = distributed.init()
    logging.getLogger("ibdistill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as root:
        job = TeacherCase(root, student, teacher, "kd", batch_size, "fp32", "zero0").job("replica", world)
        rows, batch = job.micro_batches()[0]
        answer, module = job.teacher_answers.of(rows, batch), job.engine.module.eval()
        weights = objectives_weights.step_weights(job.config.objective, job.sampler.counts(0))
        weights = {name: factor if name.startswith("kd_") else 0.0 for name, factor in weights.items()}

        def kd(answer: TeacherAnswer) -> tuple[float, torch.Tensor]:
            """The distillation term and its gradient, in one vector."""
            total, _ = module(batch, weights, answer)
            parameters = [p for p in module.parameters() if p.requires_grad]
            gradient = torch.autograd.grad(total, parameters)
            return float(total.detach()), torch.cat([g.flatten() for g in gradient])

        loss, gradient = kd(answer)
        width = answer.targets["predict"].hidden.shape[1]
        print(f"{len(rows)} questions; distillation loss {loss:.4f} nats per token")
        print("form          bytes/token  loss moved  gradient moved")
        half = {s: TeacherStream(hidden=t.hidden.bfloat16().float()) for s, t in answer.targets.items()}
        forms = {"states bf16": (2 * width, TeacherAnswer(None, half, answer.weight, answer.bias))}
        for k in (8, 16, 32, 64, 128):
            kept = {}
            for stream, target in answer.targets.items():
                ids, p = top_k(target.hidden, (answer.weight, answer.bias, answer.softcap), k, 1.0)
                kept[stream] = TeacherStream(ids=ids, probabilities=p.half().float())
            forms[f"top {k}"] = (k * (4 + 2), TeacherAnswer(None, kept))
        for name, (size, form) in forms.items():
            moved_loss, moved = kd(form)
            relative = float((moved - gradient).norm() / gradient.norm())
            print(f"{name:14}{size:11}{abs(moved_loss - loss) / loss:12.1e}{relative:16.1e}")
        print(f"\nmean of {SEEDS} sets of draws; the error of their mean gradient")
        for n in (12, 50):
            moves, mean, kept_tokens = [], 0.0, 0.0
            for seed in range(SEEDS):
                answers = TeacherConfig(cache_form="sampled", cache_samples=n)
                packed = pack(answer, answers, 1.0, partial(uniforms_of, job.features, rows, n, seed))
                positions = sum(len(packed[f"{s}.distinct"]) for s in answer.targets)
                kept_tokens += sum(len(packed[f"{s}.ids"]) for s in answer.targets) / positions / SEEDS
                moved = kd(unpack(packed, NO_HEAD, len(answer.weight)))[1]
                moves.append(float((moved - gradient).norm() / gradient.norm()))
                mean = mean + moved / SEEDS
            relative = float((mean - gradient).norm() / gradient.norm())
            print(
                f"sampled {n:<6}{1 + 5 * kept_tokens:11.0f}{'-':>12}{np.mean(moves):16.1e}"
                f"  (the mean's: {relative:.1e})"
            )


if __name__ == "__main__":
    fire.Fire({"fidelity": fidelity} if "fidelity" in sys.argv[1:2] else main)
