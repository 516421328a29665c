"""Our training step against the loop that a plain transformers script runs, on ragged lengths.

    python tools/bench/train.py --data GSM8K_FOLDER             # real lengths
    python tools/bench/train.py --zero zero2 --method dss       # lengths drawn like GSM8K's

`plain` is the reference's loop in eager torch: shuffled batches, two forward passes that are padded to the
longest sequence of the batch, with transformers' losses, the mutual-information term from full logits, the
backward pass, clipping and fused AdamW. `ours` is `ibdistill.train.train_step` with its DeepSpeed engine, on
batches of similar lengths (`data.bucket_batches` 64). Both learn from the same questions and start from the
same weights. Nothing is measured unless their losses of one ragged batch agree.

All variants run on one device, which is chosen once and printed: the first GPU, or else the CPU. On a GPU
the clock is read after `torch.cuda.synchronize`. That has never been run: every figure so far is a CPU's.

Variants take turns at every step, and all steps are repeated in rounds; the least time of a step counts
(on a shared machine the mean measures the neighbours). The floor is what the matrix products of a variant's
own steps, padding included, would take at the best rates of linear layers of these shapes, measured
between the steps; attention's products count at the projections' rate.

Memory is measured in one process per variant: the most that is in use during the run's three largest batches,
less what was in use before the model was built (libraries warm), less the model states. In use are the
resident set on a CPU, and torch's tensors on a GPU (`torch.cuda.max_memory_allocated`). The model states are
16 bytes per parameter in fp32 (weight, gradient, two moments) and in bf16 (2 + 2 for the weight and the
gradient, 12 for the fp32 master weight and the moments).
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial

import devices
import numpy as np
import packed
import torch
from gsm8k_features import PIECES, generate_features, read_features
from plain_loop import PAD, plain_batch, plain_loss
from torch import nn

from ibdistill import train
from ibdistill.config import sections, zero_file
from ibdistill.config.load import load_settings
from ibdistill.data import batches, tokenizers
from ibdistill.data.features import Features
from ibdistill.data.records import STREAMS
from ibdistill.data.sampler import Sampler
from ibdistill.models import fused, presets
from ibdistill.monitor.meter import Meter
from ibdistill.objectives import distillation, weights
from ibdistill.runtime import distributed
from ibdistill.training import engine, job
from ibdistill.training.train_state import TrainState

CLIP_NORM, LR = 1.0, 5e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("projection", "feed-forward", "head")
VARIANTS = {"plain": "fp32", "ours": "fp32", "ours-bf16": "bf16"}


def build(case: TrainCase, name: str, world) -> tuple[nn.Module, Callable[[int], None]]:
    """A variant's model and its step, which takes a step's number.

    Our job lacks the parts that work once in a while, such as the board and the checkpoints.
    """
    model, settings = case.model(), case.settings(VARIANTS[name])
    if name == "plain":
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    else:
        module = distillation.Distillation(fused.fused(model), settings.objective)
        parts = dict.fromkeys(field.name for field in fields(job.Job) if field.init)
        parts |= {"config": settings, "world": world, "streams": STREAMS, "features": case.features}
        # the features are ids already: of its tokenizer the job only asks for special tokens, such as PAD
        parts |= {"tokenizer": tokenizers.demo_tokenizer(), "sampler": case.sampler, "meter": Meter()}
        sections = settings.student.precision, settings.optim, settings.deepspeed
        parts |= {"engine": engine.build_engine(module, *sections, world), "state": TrainState()}
        work = job.Job(**parts)

    def plain_step(index: int) -> None:
        batch = plain_batch(case.features, case.batches[name][index])
        plain_loss(model, batch, settings.objective).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()

    def our_step(index: int) -> None:
        work.state.step = index
        train.train_step(work)

    return model, plain_step if name == "plain" else our_step


@dataclass
class TrainCase:
    """What all variants share, and which records each step takes."""

    features: Features
    preset: str
    method: str
    batch_size: int
    steps: int
    zero: str
    device: torch.device

    def __post_init__(self) -> None:
        self.sampler = Sampler(
            self.features, sections.DataConfig(bucket_batches=64), batch_size=self.batch_size, seed=0
        )
        self.steps = min(self.steps, self.sampler.steps_per_epoch)
        bucketed = np.stack([self.sampler.step(index) for index in range(self.steps)])
        shuffled = np.random.default_rng(0).permutation(bucketed.ravel()).reshape(bucketed.shape)
        self.batches = {"plain": shuffled, "ours": bucketed, "ours-bf16": bucketed}

    def settings(self, precision: str = "fp32") -> sections.Config:
        """The settings of our run in a precision."""
        overrides = {"objective.method": self.method, "optim.batch_size": self.batch_size, "optim.lr": LR}
        overrides |= {"student.precision": precision, "deepspeed.config": self.zero}
        overrides["run.term_gradients_every"] = 0
        settings = load_settings(None, overrides)
        zero_file.settle_ds_config(settings, 1)
        return settings

    def model(self, **overrides):
        """A new student on the device, with the same weights at every call."""
        return presets.build(self.preset, PIECES + 100, seed=0, **overrides).train().to(self.device)

    def sizes(self, name: str) -> dict[str, np.ndarray]:
        """One number per step: padded lengths of questions and targets, rows of the head, tokens.

        The keys are ("q" or "t", stream), "head", "real" and "padded", which counts padding as well.
        """
        kinds = {"q": self.features.questions, "t": self.features.targets}
        parts = {(k, s): kinds[k][s].lengths[self.batches[name]] for k in kinds for s in STREAMS}
        sizes = {key: part.max(1) for key, part in parts.items()}
        if name != "plain":  # one encoder call for both streams
            longest = np.maximum(sizes["q", "predict"], sizes["q", "explain"])
            sizes |= {("q", s): longest for s in STREAMS}
        padded_head = self.batch_size * (sizes["t", "predict"] + sizes["t", "explain"])
        packed_head = parts["t", "predict"].sum(1) + parts["t", "explain"].sum(1)
        real, padded = sum(p.sum(1) for p in parts.values()), self.batch_size * sum(sizes.values())
        return sizes | {
            **{"real": real, "padded": padded},
            "head": padded_head if name == "plain" else packed_head,
        }


def check_losses(case: TrainCase) -> float:
    """The relative difference of the two losses of one ragged batch; padding is kept out of the pool."""
    model, objective, rows = case.model(dropout_rate=0.0), case.settings().objective, case.batches["plain"][0]
    batch = batches.collate(case.features, rows, STREAMS, pad=PAD, start=0).to(case.device)
    counts = {stream: len(labels) for stream, labels in batch.labels.items()} | {"explained": len(rows)}
    with torch.no_grad():
        expected = plain_loss(model, plain_batch(case.features, rows), objective, pool_padding=False)
        module = distillation.Distillation(fused.fused(model), objective)
        ours, _ = module(batch, weights.step_weights(objective, counts))
    return float((ours - expected).abs() / expected.abs())


def products(case: TrainCase, name: str, c) -> dict[str, float]:
    """Floating point operations of all steps' matrix products, by kind; `c` is the model's configuration."""
    inner, feed, sizes = c.num_heads * c.d_kv, (3 if c.is_gated_act else 2) * c.d_ff, case.sizes(name)
    projection, rows = 0, 0
    for stream in STREAMS:
        q, t = sizes["q", stream], sizes["t", stream]
        encoder = q * (4 * c.d_model + 2 * q)
        decoder = t * (6 * c.d_model + 2 * (t + q)) + q * 2 * c.d_model
        projection += case.batch_size * inner * (c.num_layers * encoder + c.num_decoder_layers * decoder)
        rows += case.batch_size * (c.num_layers * q + c.num_decoder_layers * t)
    multiplies = [projection, rows * feed * c.d_model, sizes["head"] * c.d_model * c.vocab_size]
    # 2 operations per multiplication and addition, once forward and twice backward
    return dict(zip(KINDS, (6.0 * count.sum() for count in multiplies), strict=True))


def measure_rates(shapes: dict[str, tuple[int, int, int]], best: dict, device: torch.device) -> None:
    """Raise the best rates, in operations per second, of a linear layer's forward and backward products.

    `shapes`: the layer's rows, inputs and outputs by kind. `best`: the rates so far, by kind and dtype.
    """
    for kind, dtype in itertools.product(KINDS, DTYPES.values()):
        m, k, n = shapes[kind]
        x, w, g = (torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (m, n)))
        seconds = devices.timed(lambda x=x, w=w, g=g: (x @ w.T, g @ w, g.T @ x), device)
        rate = 6.0 * m * k * n / seconds
        best[kind, dtype] = max(rate, best.get((kind, dtype), 0.0))


def peak_bytes(case: TrainCase, name: str) -> int:
    """The most bytes above the model states. It is called in a new process: see the module's docstring."""
    world = distributed.init()
    build(replace(case, preset="demo-student", batch_size=2, steps=1), name, world)[1](0)
    before = devices.held_bytes(case.device)
    module, step = build(case, name, world)
    order = np.argsort(case.sizes(name)["padded"])
    step(int(order[0]))
    devices.restart_peak(case.device)
    for index in order[-3:]:
        step(int(index))
    above = devices.peak_bytes(case.device) - before
    return above - 16 * sum(p.numel() for p in module.parameters())


def measure_time(case: TrainCase, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of all steps by variant, and those that their matrix products alone would take."""
    world = distributed.init()
    steps = {name: build(case, name, world)[1] for name in VARIANTS}
    c, sizes = case.model().config, case.sizes("ours")
    rows, head = int(sizes["padded"].mean()) // 2, int(sizes["head"].mean())
    widths = [(rows, c.num_heads * c.d_kv), (rows, c.d_ff), (head, c.vocab_size)]
    shapes = {kind: (m, c.d_model, n) for kind, (m, n) in zip(KINDS, widths, strict=True)}
    rates: dict[tuple[str, torch.dtype], float] = {}
    seconds = {name: np.full(case.steps, np.inf) for name in VARIANTS}
    for _, index in itertools.product(range(rounds), range(case.steps)):
        measure_rates(shapes, rates, case.device)
        for name, step in steps.items():
            took = devices.timed(partial(step, index), case.device)
            seconds[name][index] = min(seconds[name][index], took)
    for (kind, dtype), rate in rates.items():
        print(f"products, {kind:12} {str(dtype)[6:]:8} {rate / 1e9:6.0f} GFLOP/s at {shapes[kind]}")
    floors = {}
    for name, precision in VARIANTS.items():
        floors[name] = sum(n / rates[kind, DTYPES[precision]] for kind, n in products(case, name, c).items())
    return {name: float(part.sum()) for name, part in seconds.items()}, floors


def report(case: TrainCase, seconds: dict, floors: dict, peaks: dict) -> None:
    """Print one line per variant, then the ratios to the plain loop."""
    print(" " * 13 + "s/step tokens/s  padding  floor_s  of_time peak_MiB")
    for name, time_ in seconds.items():
        sizes = case.sizes(name)
        real, padded = (int(sizes[key].sum()) for key in ("real", "padded"))
        peak = f"{peaks[name] / 2**20:9.0f}" if name in peaks else ""
        print(
            f"{name:10}{time_ / case.steps:9.3f}{real / time_:9.0f}{1 - real / padded:9.1%}"
            f"{floors[name] / case.steps:9.3f}{floors[name] / time_:9.0%}{peak}"
        )
    for name in list(seconds)[1:]:
        print(f"{name} / plain: {seconds['plain'] / seconds[name]:.2f} times the tokens/s")
        if peaks:
            print(f"{name} / plain: {peaks[name] / peaks['plain']:.2f} of the memory above the model states")


def main(
    data: str | None = None,
    preset: str = "t5-v1_1-small",
    method: str = "ib",
    batch_size: int = 8,
    steps: int = 12,
    rounds: int = 2,
    zero: str = "auto",
    memory: bool = True,
    family: str | None = None,
    lengths: str = "gsm8k",
    trl: str | None = None,
    cpu_time: bool = False,
) -> None:
    """Measure and print.

    `data`: a folder with GSM8K's files, without which lengths are drawn. `method`: ib or dss. `zero`: a file
    of ds_configs. `family`: t5 or a decoder-only model type, for which packed and padded rows of `lengths`
    (gsm8k or long) are compared instead, and TRL where `trl` is an interpreter that has it, by the clock or
    by `cpu_time`: see `packed.py`.
    """
    if family:
        return packed.main(family, lengths, batch_size, steps, rounds, memory, trl, cpu_time)
    features = read_features(data) if data else generate_features()
    case = TrainCase(features, preset, method, batch_size, steps, zero, devices.choose())
    used = case.settings().deepspeed.config
    print(f"{preset}, {method}, {used}, {case.steps} x {batch_size} of {data or 'generated lengths'}")
    print(f"every variant runs on {devices.name(case.device)}")
    print(f"loss of one batch: relative difference {(difference := check_losses(case)):.1e}")
    if not difference < 1e-4:
        sys.exit("the two losses disagree: nothing is measured")
    peaks = {}
    for name in VARIANTS if memory else ():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peaks[name] = process.submit(peak_bytes, case, name).result()
    report(case, *measure_time(case, rounds), peaks)


if __name__ == "__main__":
    import fire

    fire.Fire(main)
