"""Weak scaling on one machine with 1, 2 and 4 processes of one thread each, beside what the planner predicts.

    python tools/bench/scaling.py [--model t5-mini] [--zero zero2] [--questions 8] [--steps 6] [--rounds 5]

The processes share the machine's cores, memory bandwidth and caches, so the figures say nothing about real
machines. They show whether the planner's model (products, traffic, optimizer, nothing overlapped) explains
what is measured. Each process has the same number of questions, all of one length. Every round measures each
number of processes, with all its processes at once:

- before every step the rate of a matrix product of the model's shapes (as many operations as a step), of
  copying memory, and of an all-reduce of the gradients' size, until the last rank is done, since ranks wait
  for each other in a step too;
- a training step: its seconds, and the part of them within collectives, waiting for other ranks included.

The best of each counts, as in `tools/bench/train.py`. `imbalance` is the slowest rank's time outside
collectives over the ranks' mean. The planner gets one number from the steps themselves: what the step of one
process takes beyond its products and its optimizer is put down to memory (activations that are written and
read), at the rate of a copy. It predicts the ratios: tokens/s of n processes over n times those of one.

The kind of device is chosen once and printed: GPUs, one per process, where there are any, or else the CPU. On
GPUs the rates and the steps are all measured there, the clock is read after `torch.cuda.synchronize`, and
numbers of processes above that of the GPUs are left out. That has never been run: every figure so far is a
CPU's.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import devices
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

DEVICE = torch.device(devices.choose().type)
"""Where everything is measured; without a number, a GPU is the one that `distributed.init` gives a rank."""
SPENT = [0.0]
"""Seconds within collectives."""


def count(name: str) -> None:
    """Let a collective of `torch.distributed` add its seconds to SPENT; it ends before it returns."""
    function = getattr(dist, name)

    def counted(*args, **kwargs):
        devices.wait(DEVICE)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if kwargs.get("async_op"):
            result.wait()
        devices.wait(DEVICE)
        SPENT[0] += time.perf_counter() - start
        return result

    setattr(dist, name, counted)


if __name__ in ("__main__", "__mp_main__"):  # before DeepSpeed takes references to them, in spawned ranks too
    for collective in (
        "all_reduce",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_gather",
        "reduce",
    ):
        count(collective)

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where the planner is
from plan import costs, step_time  # noqa: E402

from ibdistill.config import sections  # noqa: E402
from ibdistill.config.load import load_settings  # noqa: E402
from ibdistill.data import tokenizers  # noqa: E402
from ibdistill.models.student import load_student  # noqa: E402
from ibdistill.objectives import distillation, weights  # noqa: E402
from ibdistill.planning import dryrun, footprint  # noqa: E402
from ibdistill.runtime import distributed  # noqa: E402
from ibdistill.training import engine  # noqa: E402

PROCESSES = (1, 2, 4)
STREAMS = ("predict", "explain")
COPIES, REDUCTIONS = 40, 4
"""How often as many bytes as the gradients have are copied, and reduced, to measure the rates of memory and
of links. This takes long against a slice of the scheduler's time."""


def settings(model: str, zero: str, questions: int) -> sections.Config:
    """The settings of the run that is measured and planned."""
    given = {"student.model": model, "deepspeed.config": zero, "optim.batch_size": questions}
    given |= {"objective.method": "dss", "student.tokenizer": "train", "student.dropout": 0.0}
    given["student.precision"] = "fp32"
    return load_settings(None, given | {"student.vocab_size": len(tokenizers.demo_tokenizer())})


def seconds_of(function, repeats: int) -> float:
    """Seconds until the last rank has called the function so many times, which all ranks begin together."""
    devices.wait(DEVICE)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    devices.wait(DEVICE)
    dist.barrier()
    return time.perf_counter() - start


class Rank:
    """What one process measures."""

    def __init__(self, model: str, zero: str, lengths: dryrun.Lengths) -> None:
        self.world = distributed.init()
        chosen = settings(model, zero, lengths.questions * self.world.size)
        student = load_student(chosen.student, tokenizers.demo_tokenizer(), 0)
        self.batch = lengths.batch(student, STREAMS).to(DEVICE)
        widest = max((m for m in student.modules() if isinstance(m, torch.nn.Linear)), key=self._width)
        self.x = torch.randn(self.batch.input_ids.numel(), widest.in_features, device=DEVICE)
        self.w = widest.weight.detach().to(DEVICE)
        self.gradients = torch.zeros(sum(p.numel() for p in student.parameters()), device=DEVICE)
        self.other = torch.zeros_like(self.gradients)
        self.operations = costs.operations(
            footprint.student_skeleton(chosen), lengths, chosen.objective
        ).student
        module = distillation.Distillation(student, chosen.objective)
        sections = chosen.student.precision, chosen.optim, chosen.deepspeed
        self.engine = engine.build_engine(module, *sections, self.world)
        questions = self.world.size * lengths.questions
        counts = {"predict": questions * lengths.label, "explain": questions * lengths.rationale}
        self.weights = weights.step_weights(chosen.objective, counts | {"explained": 1})

    @staticmethod
    def _width(layer: torch.nn.Linear) -> int:
        return layer.in_features * layer.out_features if layer.out_features < 1000 else 0

    def step(self) -> None:
        loss, _ = self.engine(self.batch, self.weights, None, 1)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
        self.engine.step()

    def round(self, steps: int) -> list[dict[str, float]]:
        """One entry per step: the rates just before it, its seconds, and those of them within collectives.

        The rates are operations per second for `products` and bytes per second for `memory` and `link`.
        """
        size, once = self.gradients.numel() * 4, 2.0 * self.x.shape[0] * self.w.numel()
        products, sent = (
            max(1, round(self.operations / once)),
            costs.sent({"all_reduce": size}, self.world.size),
        )
        work = {"products": products * once, "memory": COPIES * 2.0 * size, "link": REDUCTIONS * sent or 1.0}
        found: list[dict[str, float]] = []
        for _ in range(steps):
            took = {
                "products": seconds_of(lambda: self.x @ self.w.T, products),
                "memory": seconds_of(lambda: self.other.copy_(self.gradients), COPIES),
                "link": seconds_of(lambda: dist.all_reduce(self.gradients), REDUCTIONS),
            }
            SPENT[0] = 0.0
            rates = {name: amount / took[name] for name, amount in work.items()}
            found.append(rates | {"step": seconds_of(self.step, 1), "collectives": SPENT[0]})
        return found


def child(rank: int, ranks: int, port: int, path: Path, arguments: tuple, steps: int) -> None:
    """One rank of one round, in a process of its own; rank 0 writes what all ranks measured to `path`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    worker = Rank(*arguments)
    for _ in range(2):
        worker.step()
    facts = list(zip(*distributed.gather_objects(worker.round(steps)), strict=True))
    if rank == 0:
        torch.save(facts, path)
    dist.barrier()


def run(ranks: int, arguments: tuple, steps: int) -> list[tuple[dict[str, float], ...]]:
    """One round of so many processes: what each rank measured, one tuple per step.

    On a CPU the processes are forked, after the imports; CUDA does not survive a fork.
    """
    method = "fork" if DEVICE.type == "cpu" else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.pt"
        given = ranks, distributed.free_port(), path, arguments, steps
        start_processes(child, given, ranks, start_method=method)
        return torch.load(path)


def load_of(model: str, zero: str, lengths: dryrun.Lengths, ranks: int) -> step_time.Load:
    """What the planner takes a step for, on one of so many ranks."""
    chosen = settings(model, zero, lengths.questions * ranks)
    student, sharding = footprint.student_skeleton(chosen), footprint.Zero.read(zero)
    sizes = student.sizes()
    gathered = footprint.student_gathers(sharding, student, lengths, STREAMS, sizes)
    traffic = costs.student_traffic(sizes, "fp32", sharding, 1, gathered) if ranks > 1 else {}
    total = sum(n for n, _ in sizes)
    return step_time.Load(
        operations=costs.operations(student, lengths, chosen.objective),
        micro_batches=1,
        student_bytes=0,  # a CPU's products hide the reading of weights
        teacher_bytes=0,
        reduced=costs.sent({k: v for k, v in traffic.items() if k != "all_gather"}, ranks),
        gathered=costs.sent({k: v for k, v in traffic.items() if k == "all_gather"}, ranks),
        teacher_gathered=0.0,
        updated=total // ranks if sharding.stage else total,
        overlaps_reduction=False,
        overlaps_gathers=False,
    )


def predict(load: step_time.Load, measured: dict[str, float]) -> float:
    """Predicted seconds per step, at the rates that were measured."""
    products, link = measured["products"], measured["link"]
    rates = step_time.Rates(products, products, measured["memory"], link, link, overlap=False)
    return sum(step_time.step_seconds(load, rates).values())


def possible(device: torch.device) -> tuple[int, ...]:
    """The numbers of processes that can be measured: a GPU takes one process."""
    return tuple(n for n in PROCESSES if device.type == "cpu" or n <= torch.cuda.device_count())


def where(device: torch.device) -> str:
    """What a process runs on, in words."""
    if device.type == "cuda":
        return f"one {devices.name(device)} for each"
    return f"{os.cpu_count()} cores shared by all"


def main(
    model: str = "t5-mini",
    zero: str = "zero2",
    questions: int = 8,
    question: int = 96,
    steps: int = 6,
    rounds: int = 5,
) -> None:
    """Measure, predict and print both. `questions` are per process, `question` is the tokens of each."""
    lengths = dryrun.Lengths(questions, question, 4, 40)
    arguments = (model, zero, lengths)
    processes = possible(DEVICE)
    found: dict[int, list[tuple[dict[str, float], ...]]] = {n: [] for n in processes}
    for _ in range(rounds):  # in turns: whoever shares the machine disturbs all alike
        for n in processes:
            found[n] += run(n, arguments, steps)
    facts = {n: best(steps_) for n, steps_ in found.items()}
    loads = {n: load_of(*arguments, n) for n in processes}
    rest = facts[1]["step"] - predict(loads[1], facts[1])
    moved = max(0.0, rest) * facts[1]["memory"]
    loads = {n: replace(load, moved=moved) for n, load in loads.items()}
    predicted = {n: predict(loads[n], facts[n]) for n in processes}
    print(
        f"{model}, {zero}, {questions} questions per process, {where(DEVICE)}, load "
        f"{os.getloadavg()[0]:.1f}; {rest / facts[1]['step']:.0%} of one's step beside products and optimizer"
    )
    heads = "processes|tokens/s|s/step|collectives|imbalance|GFLOP/s|copy GB/s|ring GB/s|ratio|predicted"
    print("".join(f"{head:>12}" for head in heads.split("|")))
    tokens = lengths.questions * (2 * question + lengths.label + lengths.rationale)
    for n in processes:
        f = facts[n]
        ratio, expected = facts[1]["step"] / f["step"], predicted[1] / predicted[n]
        values = [
            *(
                f"{n}",
                f"{n * tokens / f['step']:.0f}",
                f"{f['step']:.3f}",
                f"{f['collectives'] / f['step']:.0%}",
            ),
            *(f"{imbalance(found[n]):.2f}", f"{f['products'] / 1e9:.1f}", f"{f['memory'] / 1e9:.1f}"),
            *(f"{f['link'] / 1e9:.2f}" if n > 1 else "-", f"{ratio:.2f}", f"{expected:.2f}"),
        ]
        print("".join(f"{value:>12}" for value in values), f" {expected / ratio - 1:+.0%}")


def best(steps: list[tuple[dict[str, float], ...]]) -> dict[str, float]:
    """The highest of each rate and the shortest step, since others on the machine only slow things down."""
    fastest = min(steps, key=lambda ranks: ranks[0]["step"])
    rates = {name: max(ranks[0][name] for ranks in steps) for name in ("products", "memory", "link")}
    return rates | {key: mean(rank[key] for rank in fastest) for key in ("step", "collectives")}


def imbalance(steps: list[tuple[dict[str, float], ...]]) -> float:
    """The slowest rank's seconds outside collectives over the ranks' mean, as the median of the steps."""
    outside = [[rank["step"] - rank["collectives"] for rank in ranks] for ranks in steps]
    return median(max(seconds) / mean(seconds) for seconds in outside)


if __name__ == "__main__":
    import fire

    fire.Fire(main)
