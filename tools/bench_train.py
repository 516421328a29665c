"""A training step of ours against the loop that a plain transformers script runs, on ragged lengths.

    python tools/bench_train.py --data GSM8K_FOLDER             # real lengths
    python tools/bench_train.py --method dss --steps 40         # lengths drawn like GSM8K's

`plain` is the reference's loop in eager torch: shuffled batches, two forwards padded to the longest
of the batch with transformers' own losses, the mutual-information term from full logits, backward,
clip, AdamW. `ours` is `train.train_step` itself, DeepSpeed engine included. All learn from the same
questions with the same starting weights and take turns in one process, so that what else runs on the
machine hits all of them. Before that the losses of one batch, without dropout, have to agree.

The floor of a variant is the time that the matrix products of its own steps (its padding included) would
take at the rates that products of these shapes reach in the same process, on the same threads.

Memory is measured in a process per variant: the high-water mark of the resident set over the run's three
largest batches, less what was resident before the model was built (libraries loaded and warm) and less
the model states. Model states are 16 bytes a parameter for all: weights, gradients and two moments in
fp32, or 2 (weights) + 2 (gradients) + 4 + 8 bytes (master weights and moments) with bf16.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ibdistill import config, data, distributed, engine, job, objectives, presets, tasks, train, vocabulary
from ibdistill.checkpoint import TrainState
from ibdistill.metrics import Meter

PAD, IGNORED, CLIP_NORM, LR = 0, -100, 1.0, 5e-5
VARIANTS = {"plain": None, "ours": "fp32", "ours-bf16": "bf16"}


def read_features(folder: str, vocab_size: int) -> data.Features:
    """GSM8K's training split, with a tokenizer trained on it."""
    settings = config.load(None, {"data.task": "gsm8k", "data.path": folder}).data
    records = tasks.load(settings, needs_rationale=True).train
    texts = [text for r in records for text in (r.question, r.label, r.rationale)]
    with tempfile.TemporaryDirectory() as target:
        tokenizer = vocabulary.train_tokenizer(texts, vocab_size, Path(target))
    return data.tokenize(records, {"gsm8k": tasks.TASKS["gsm8k"].prefixes}, tokenizer, settings)


def generate_features(vocab_size: int, records: int = 6725, seed: int = 0) -> data.Features:
    """Random ids; lengths log-normal, fitted to GSM8K's training split under a tokenizer of 4000 pieces.

    log(question + prefix): mean 4.12, deviation 0.35; log(rationale): 4.07, 0.50; correlation 0.52. Labels
    are 2 tokens (78 %) or 3 with the end token.
    """
    rng = np.random.default_rng(seed)
    question, other = rng.standard_normal((2, records))
    rationale = 0.52 * question + (1 - 0.52**2) ** 0.5 * other
    lengths = {
        "question": np.exp(4.12 + 0.35 * question).clip(8, 1024),
        "label": 2 + (rng.random(records) > 0.78),
        "rationale": np.exp(4.07 + 0.50 * rationale).clip(4, 256),
    }
    ragged = {
        name: data.Ragged([rng.integers(3, vocab_size, int(n)) for n in part])
        for name, part in lengths.items()
    }
    return data.Features(
        ids=[str(i) for i in range(records)],
        groups=np.zeros(records, dtype=int),
        questions={stream: ragged["question"] for stream in data.STREAMS},
        targets={"predict": ragged["label"], "explain": ragged["rationale"]},
    )


def plain_batch(features: data.Features, rows: np.ndarray) -> dict[str, dict[str, torch.Tensor]]:
    """Stream -> arguments of a transformers forward."""
    batch = {}
    for stream in data.STREAMS:
        ids = [torch.from_numpy(features.questions[stream][row]).long() for row in rows]
        labels = [torch.from_numpy(features.targets[stream][row]).long() for row in rows]
        batch[stream] = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
    return batch


def plain_loss(model, batch, objective: config.ObjectiveConfig, pool_padding: bool = True) -> torch.Tensor:
    """As the reference has it: its pool takes the maximum over padded positions too."""
    outputs = {stream: model(**arguments) for stream, arguments in batch.items()}
    loss = objective.alpha * outputs["predict"].loss + (1 - objective.alpha) * outputs["explain"].loss
    if objective.method != "ib":
        return loss
    pooled = {}
    for stream, output in outputs.items():
        p = torch.softmax(output.logits, -1)
        if not pool_padding:
            p = p.masked_fill(batch[stream]["labels"][..., None] == IGNORED, 0)
        pooled[stream] = p.max(1).values
    return loss + objective.beta * cross_entropy(pooled["explain"], pooled["predict"].detach())


class Plain:
    """The reference's loop."""

    def __init__(self, model, features, objective, batches: np.ndarray, fused: bool) -> None:
        self.model, self.features, self.objective, self.batches = model, features, objective, batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=fused)

    def step(self, index: int) -> None:
        loss = plain_loss(self.model, plain_batch(self.features, self.batches[index]), self.objective)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours:
    """The product's step: a `Job` without the parts that work once in a while."""

    def __init__(self, model, features, settings: config.Config, plan: data.Plan, world) -> None:
        student = objectives.Distillation(model, settings.objective)
        parts = dict.fromkeys("folder stop records whole checkpoints board".split())
        self.job = job.Job(
            **parts,
            config=settings,
            world=world,
            streams=objectives.streams_of(settings.objective),
            tokenizer=SimpleNamespace(pad_token_id=PAD),
            features=features,
            plan=plan,
            engine=engine.build_engine(student, settings, world),
            state=TrainState(),
            meter=Meter(),
        )

    def step(self, index: int) -> None:
        self.job.state.step = index
        train.train_step(self.job)


class Case:
    """What all variants share: settings, features, and which records each step takes."""

    def __init__(self, features, preset, vocab_size, method, batch_size, steps, zero, seed, fused) -> None:
        self.features, self.preset, self.vocab_size, self.seed = features, preset, vocab_size, seed
        self.steps, self.fused, self.zero, self.method, self.batch_size = (
            steps,
            fused,
            zero,
            method,
            batch_size,
        )
        self.plan = data.Plan(features, config.DataConfig(), batch_size=batch_size, seed=seed)
        if steps > self.plan.steps_per_epoch:
            sys.exit(f"--steps is {steps}; an epoch has only {self.plan.steps_per_epoch}")
        bucketed = np.stack([self.plan.step(index) for index in range(steps)])
        shuffled = np.random.default_rng(seed).permutation(bucketed.ravel()).reshape(bucketed.shape)
        self.batches = {"plain": shuffled, "ours": bucketed, "ours-bf16": bucketed}

    def settings(self, precision: str) -> config.Config:
        overrides = {"objective.method": self.method, "optim.batch_size": self.batch_size, "optim.lr": LR}
        overrides |= {"student.precision": precision, "deepspeed.config": self.zero}
        return config.load(None, overrides)

    def model(self, **overrides):
        return presets.build(self.preset, self.vocab_size, self.seed, **overrides).train()

    def build(self, name: str, world) -> Plain | Ours:
        model, settings = self.model(), self.settings(VARIANTS[name] or "fp32")
        if name == "plain":
            return Plain(model, self.features, settings.objective, self.batches[name], self.fused)
        return Ours(model, self.features, settings, self.plan, world)

    def shape(self, name: str, index: int) -> dict[str, int]:
        """Padded lengths of a step: questions and targets by stream, rows of the head, real tokens."""
        rows = self.batches[name][index]
        q = {s: self.features.questions[s].lengths[rows] for s in data.STREAMS}
        t = {s: self.features.targets[s].lengths[rows] for s in data.STREAMS}
        shape = {f"q_{s}": int(q[s].max()) for s in q} | {f"t_{s}": int(t[s].max()) for s in t}
        if name != "plain":  # one encoder call for both streams
            shape |= {f"q_{s}": max(int(part.max()) for part in q.values()) for s in q}
        real_targets = int(sum(part.sum() for part in t.values()))
        shape["padded"] = len(rows) * sum(shape.values())
        shape["real"] = int(sum(part.sum() for part in q.values())) + real_targets
        targets = shape["t_predict"] + shape["t_explain"]
        shape["head"] = len(rows) * targets if name == "plain" else real_targets
        return shape


def check_losses(case: Case) -> float:
    """Relative difference of the two losses of one ragged batch; padding is kept out of the pool."""
    model, objective = case.model(dropout_rate=0.0), case.settings("fp32").objective
    rows = case.batches["plain"][0]
    batch = data.collate(case.features, rows, data.STREAMS, pad=PAD, start=0)
    counts = {stream: len(labels) for stream, labels in batch.labels.items()} | {"explained": len(rows)}
    with torch.no_grad():
        expected = plain_loss(model, plain_batch(case.features, rows), objective, pool_padding=False)
        weights = objectives.step_weights(objective, counts)
        ours, _ = objectives.Distillation(model, objective)(batch, weights)
    return float((ours - expected).abs() / expected.abs())


def products(case: Case, name: str, index: int, model_config) -> dict[str, float]:
    """Floating point operations of a step's matrix products, forward and backward, by kind."""
    c, shape, rows = model_config, case.shape(name, index), case.batch_size
    inner, feed = c.num_heads * c.d_kv, (3 if c.is_gated_act else 2) * c.d_model * c.d_ff
    flops = dict.fromkeys(("projection", "feed-forward", "head"), 0.0)
    for stream in data.STREAMS:
        q, t = shape[f"q_{stream}"], shape[f"t_{stream}"]
        encoder = c.num_layers * rows * q * (4 * c.d_model * inner + 2 * inner * q)
        decoder = rows * t * (6 * c.d_model * inner + 2 * inner * (t + q)) + rows * q * 2 * c.d_model * inner
        flops["projection"] += 6.0 * (encoder + c.num_decoder_layers * decoder)
        flops["feed-forward"] += 6.0 * feed * rows * (c.num_layers * q + c.num_decoder_layers * t)
    flops["head"] = 6.0 * shape["head"] * c.d_model * c.vocab_size
    return flops


class Rates:
    """The best rate seen for a linear layer, forward and both backward products, of each kind and dtype."""

    def __init__(self, model_config, rows: int, head_rows: int) -> None:
        c = model_config
        self.shapes = {
            "projection": (rows, c.d_model, c.num_heads * c.d_kv),
            "feed-forward": (rows, c.d_model, c.d_ff),
            "head": (head_rows, c.d_model, c.vocab_size),
        }
        self.best: dict[tuple[str, torch.dtype], float] = {}

    def measure(self) -> None:
        for kind, (m, k, n) in self.shapes.items():
            for dtype in (torch.float32, torch.bfloat16):
                x, w, g = (torch.randn(*size).to(dtype) for size in ((m, k), (n, k), (m, n)))
                for _ in range(3):
                    start = time.perf_counter()
                    x @ w.T, g @ w, g.T @ x
                    rate = 6.0 * m * k * n / (time.perf_counter() - start)
                    self.best[kind, dtype] = max(rate, self.best.get((kind, dtype), 0.0))

    def seconds(self, flops: dict[str, float], dtype: torch.dtype) -> float:
        return sum(value / self.best[kind, dtype] for kind, value in flops.items())


def status(key: str) -> int:
    """Bytes of an entry of this process's status: VmRSS, VmHWM (its high-water mark)."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def peak_bytes(case: Case, name: str, threads: int, queue) -> None:
    """In a process of its own: see the module's docstring."""
    torch.set_num_threads(threads)
    world = distributed.init()
    warm = Case(case.features, "demo-student", case.vocab_size, case.method, 2, 1, case.zero, 0, case.fused)
    warm.build(name, world).step(0)
    gc.collect()
    before = status("VmRSS")
    variant = case.build(name, world)
    sizes = [case.shape(name, index)["padded"] for index in range(case.steps)]
    order = np.argsort(sizes)
    variant.step(int(order[0]))
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    for index in order[-3:]:
        variant.step(int(index))
    model = variant.model if name == "plain" else variant.job.engine.module
    queue.put(status("VmHWM") - before - 16 * sum(p.numel() for p in model.parameters()))


def measure_memory(case: Case, names: list[str], threads: int) -> dict[str, int]:
    context, peaks = multiprocessing.get_context("spawn"), {}
    for name in names:
        queue = context.SimpleQueue()
        process = context.Process(target=peak_bytes, args=(case, name, threads, queue))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"the memory process of {name} ended with exit code {process.exitcode}")
        peaks[name] = queue.get()
    return peaks


def measure_time(case: Case, names: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of all steps, and of their matrix products alone, by variant."""
    world = distributed.init()
    variants = {name: case.build(name, world) for name in names}
    model_config = case.model().config
    shapes = [case.shape("ours", index) for index in range(case.steps)]
    rows = case.batch_size * int(np.mean([s["q_predict"] + s["q_explain"] for s in shapes]))
    rates = Rates(model_config, rows, int(np.mean([s["head"] for s in shapes])))
    seconds = dict.fromkeys(names, 0.0)
    for variant in variants.values():
        variant.step(0)
    for index in range(case.steps):
        rates.measure()
        for name, variant in variants.items():
            start = time.perf_counter()
            variant.step(index)
            seconds[name] += time.perf_counter() - start
    floors = {}
    for name in names:
        dtype = torch.bfloat16 if VARIANTS[name] == "bf16" else torch.float32
        steps = [products(case, name, index, model_config) for index in range(case.steps)]
        floors[name] = sum(rates.seconds(flops, dtype) for flops in steps)
    for (kind, dtype), rate in rates.best.items():
        print(f"products, {kind:12} {str(dtype)[6:]:8} {rate / 1e9:6.0f} GFLOP/s at {rates.shapes[kind]}")
    return seconds, floors


def report(case: Case, seconds: dict, floors: dict, peaks: dict) -> None:
    """One line a variant, then the ratios to the plain loop."""
    print(
        f"{'':10} {'s/step':>8} {'tokens/s':>9} {'padding':>8} {'floor s':>8} {'of time':>8} {'peak MiB':>9}"
    )
    for name, time_ in seconds.items():
        shapes = [case.shape(name, index) for index in range(case.steps)]
        real, padded = (sum(s[key] for s in shapes) for key in ("real", "padded"))
        print(
            f"{name:10} {time_ / case.steps:8.3f} {real / time_:9.0f} {1 - real / padded:8.1%}"
            f" {floors[name] / case.steps:8.3f} {floors[name] / time_:8.0%}"
            + (f" {peaks[name] / 2**20:9.0f}" if name in peaks else "")
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
    steps: int = 24,
    threads: int = 2,
    zero: str = "zero2",
    vocab_size: int = 4000,
    bf16: bool = True,
    memory: bool = True,
    fused: bool = True,
    seed: int = 0,
) -> None:
    """Measure and print.

    Args:
        data: folder with GSM8K's train.jsonl and test.jsonl; none: lengths drawn like its own.
        method: ib (estimator paper) or dss.
        zero: a file of ds_configs, for ours.
        vocab_size: pieces of the tokenizer that is trained on the data.
        fused: let the plain loop have torch's fused AdamW, as ours does; transformers' Trainer does too.
    """
    torch.set_num_threads(threads)
    features = read_features(data, vocab_size) if data else generate_features(vocab_size)
    case = Case(features, preset, vocab_size + 100, method, batch_size, steps, zero, seed, fused)
    source = data or "generated lengths"
    print(f"{preset}, {method}, batches of {batch_size}, {steps} steps, {zero}, {threads} threads, {source}")
    difference = check_losses(case)
    print(f"loss of one batch: relative difference {difference:.1e}")
    if not difference < 1e-4:
        sys.exit("the two losses disagree: nothing is measured")
    names = [name for name in VARIANTS if bf16 or name != "ours-bf16"]
    peaks = measure_memory(case, names, threads) if memory else {}
    report(case, *measure_time(case, names), peaks)


if __name__ == "__main__":
    import fire

    fire.Fire(main)
