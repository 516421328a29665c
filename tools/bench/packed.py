"""Packed against padded rows against a plain loop and against TRL: what `train.py --family` runs.

`sft` is the loop that a supervised fine-tuning script runs: shuffled batches padded to their longest row,
transformers' model with logits for all positions, cross entropy, clipping and fused AdamW. `padded` and
`packed` are `ibdistill.train.train_step` with `data.packing` off and on. All three learn from the same
questions in each step, in method cot: question, rationale and answer in one row. For t5 the method is dss,
two streams, and there is no `sft`. Nothing is measured unless the losses of a ragged batch agree.

Variants take turns at every step, and the least time of a step over the rounds counts; the ratios of each
round by itself are printed too. Memory is the most that the resident set (or torch's tensors on a GPU) grows
to during the three largest steps, in a process of its own, less what was in use before and less 16 bytes per
parameter of model states. TRL runs in the environment of an interpreter that is given, in a process of its
own in each round: see `trl_trainers.py`. With `cpu_time` seconds are those of CPU time, of all threads of a
process, which other programs on the machine hardly change.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial

import against_trl
import devices
import numpy as np
import torch
from gsm8k_features import LENGTHS, PIECES, draw
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ibdistill import train
from ibdistill.config import zero_file
from ibdistill.config.load import load_settings
from ibdistill.data import batches, tokenizers
from ibdistill.data.features import Features
from ibdistill.data.sampler import Sampler
from ibdistill.models import families, fused
from ibdistill.monitor.meter import Meter
from ibdistill.objectives import distillation, weights
from ibdistill.runtime import distributed
from ibdistill.training import engine, job
from ibdistill.training.train_state import TrainState

IGNORED = -100
SHAPE = {"vocab_size": PIECES + 100, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 8192}
T5 = {"vocab_size": PIECES + 100, "d_model": 384, "d_kv": 64, "d_ff": 1024, "num_layers": 6, "num_heads": 6}
T5 |= {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "decoder_start_token_id": 0}
TIED = {"tie_word_embeddings": True}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "d_model": 32, "d_ff": 64, "num_layers": 1}
"""Of a model with which libraries are warmed where memory is measured: what it leaves behind is little."""


@dataclass
class PackedCase:
    """What the variants share."""

    features: Features
    family: str
    batch_size: int
    steps: int
    device: torch.device
    cpu_time: bool = False
    tiny: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        """What is compared."""
        return ("padded", "packed") if self.family == "t5" else ("sft", "padded", "packed")

    @property
    def tokenizer(self):
        """Only for its special tokens."""
        return tokenizers.demo_tokenizer()

    def settings(self, packing: str):
        """The settings of our run."""
        method = "dss" if self.family == "t5" else "cot"
        overrides = {"objective.method": method, "optim.batch_size": self.batch_size, "data.packing": packing}
        overrides |= {"run.term_gradients_every": 0, "student.precision": "fp32"}
        settings = load_settings(None, overrides)
        zero_file.settle_ds_config(settings, 1)
        return settings

    def sampler(self) -> Sampler:
        """Shuffled batches."""
        return Sampler(self.features, self.settings("off").data, batch_size=self.batch_size, seed=0)

    def model(self):
        """A new model on the device, with the same weights at every call."""
        torch.manual_seed(0)
        is_t5 = self.family == "t5"
        shape = (T5 if is_t5 else SHAPE) | TIED | (TINY if self.tiny else {})
        config = AutoConfig.for_model(self.family, **shape)
        auto = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
        return auto.from_config(config, trust_remote_code=False).train().to(self.device)

    def teacher_answers(self, settings, student, world):
        """What answers for a teacher: there is none."""
        return None

    def batch(self, model, step: int, packed: bool) -> batches.Batch:
        """A step's questions."""
        layout = families.layout(model, self.tokenizer)
        rows = self.sampler().step(step)
        return batches.collate(self.features, rows, self.features.streams, packed=packed, **layout)


def sft_loss(model, batch: batches.Batch, alpha: float = 0.5) -> torch.Tensor:
    """The objective from a transformers model's logits of all positions, and no other loss of it."""
    batch = batch.to(model.device)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.flatten(0, 1)
    labels = {name: torch.full_like(batch.input_ids.flatten(), IGNORED) for name in batch.positions}
    for name, places in batch.positions.items():
        labels[name][places] = batch.labels[name]
    losses = {name: nn.functional.cross_entropy(logits, ids) for name, ids in labels.items()}
    return alpha * losses["answer"] + (1 - alpha) * losses["rationale"]


def build(case: PackedCase, name: str, world):
    """A variant's step, which takes a step's number (ours gives the meter), and its parameters' number."""
    model = case.model()
    size = sum(parameter.numel() for parameter in model.parameters())
    settings, sampler = case.settings("on" if name == "packed" else "off"), case.sampler()
    if name == "sft":
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.optim.lr, weight_decay=0.0, fused=True)

        def sft_step(index: int) -> None:
            sft_loss(model, case.batch(model, index, packed=False)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

        return sft_step, size
    answers = case.teacher_answers(settings, model, world)
    module = distillation.Distillation(fused.fused(model), settings.objective)
    parts = dict.fromkeys(field.name for field in fields(job.Job) if field.init)
    parts |= {"config": settings, "world": world, "streams": case.features.streams, "features": case.features}
    parts |= {"tokenizer": case.tokenizer, "sampler": sampler, "meter": Meter(), "teacher_answers": answers}
    sections = settings.student.precision, settings.optim, settings.deepspeed
    parts |= {"engine": engine.build_engine(module, *sections, world), "state": TrainState()}
    work = job.Job(**parts)

    def step(index: int) -> Meter:
        work.state.step = index
        train.train_step(work)
        return work.meter

    return step, size


def check_losses(case: PackedCase) -> float:
    """The largest relative difference between the losses of one ragged batch."""
    model = case.model().eval()
    with torch.no_grad():
        expected = None if case.family == "t5" else sft_loss(model, case.batch(model, 0, packed=False))
        counts, found, model = case.sampler().counts(0), [], fused.fused(model)
        for packing in ("off", "on"):
            settings = case.settings(packing)
            module = distillation.Distillation(model, settings.objective)
            batch = case.batch(model, 0, packed=packing == "on").to(case.device)
            found.append(module(batch, weights.step_weights(settings.objective, counts))[0])
    expected = found[0] if expected is None else expected
    return max(float((loss - expected).abs() / expected.abs()) for loss in found)


def peak_bytes(case: PackedCase, name: str) -> int:
    """The most bytes above the model states, in a new process."""
    world = distributed.init()
    small = replace(case, tiny=True)
    build(small, name, world)[0](0)  # libraries are warm
    model = small.model()
    order = np.argsort([case.batch(model, index, packed=True).num_tokens for index in range(case.steps)])
    gc.collect()
    before = devices.held_bytes(case.device)
    step, size = build(case, name, world)
    step(int(order[0]))
    devices.restart_peak(case.device)
    for index in order[-3:]:
        step(int(index))
    return devices.peak_bytes(case.device) - before - 16 * size


@dataclass
class RowFigures:
    """A variant's figures."""

    seconds: np.ndarray
    """[rounds, steps]."""
    real: int
    """Tokens of all steps without padding."""
    positions: int
    peak: float = float("nan")

    @property
    def speeds(self) -> np.ndarray:
        """Tokens/s of each round."""
        return self.real / self.seconds.sum(1)

    @property
    def best(self) -> float:
        """Tokens/s from the least time of each step."""
        return self.real / self.seconds.min(0).sum()


def measure(case: PackedCase, rounds: int, memory: bool, trl: str | None) -> dict[str, RowFigures]:
    """All variants, which take turns."""
    model, found = case.model(), {}
    clock = time.process_time if case.cpu_time else time.perf_counter
    for name in case.variants:
        made = [case.batch(model, index, packed=name == "packed") for index in range(case.steps)]
        real, positions = (sum(getattr(b, n) for b in made) for n in ("num_tokens", "num_positions"))
        found[name] = RowFigures(np.zeros((rounds, case.steps)), real, positions)
        if memory and rounds:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found[name].peak = process.submit(peak_bytes, case, name).result()
    if not rounds:
        return found
    world = distributed.init()
    takes = {name: build(case, name, world)[0] for name in case.variants}
    for take in takes.values():
        take(0)  # libraries are warm
    with tempfile.TemporaryDirectory() as folder:
        file = against_trl.trl_file(case, SHAPE | TIED, SHAPE | TIED | TINY, folder) if trl else ""
        told = {"trl": [], "trl-packed": []}
        for round_ in range(rounds):
            for index, name in itertools.product(range(case.steps), case.variants):
                take = partial(takes[name], index)
                found[name].seconds[round_, index] = devices.timed(take, case.device, clock)
            for name in told if trl else ():
                told[name].append(against_trl.run_trl(trl, file, name))
    for name in told if trl else ():
        seconds = np.array([each["seconds"] for each in told[name]])
        sums = sum(told[name][0]["real"]), sum(told[name][0]["positions"])
        found[name] = RowFigures(seconds, *sums, min(each["peak"] for each in told[name]))
    return found


def main(
    family: str,
    lengths: str,
    batch_size: int,
    steps: int,
    rounds: int,
    memory: bool,
    trl: str | None,
    cpu_time: bool,
) -> None:
    """Measure and print. `lengths`: gsm8k or long. `rounds`: 0 for the padding alone. `trl`: an interpreter
    that has TRL."""
    if lengths not in LENGTHS:
        sys.exit(f"--lengths is {lengths!r}; choose {' or '.join(LENGTHS)}")
    if trl:
        against_trl.check_trl(trl, family)
    case = PackedCase(draw(lengths, family), family, batch_size, steps, devices.choose(), cpu_time)
    if cpu_time and case.device.type != "cpu":
        sys.exit("--cpu_time measures the CPU, and the variants run on a GPU: leave it out")
    method = case.settings("off").objective.method
    shape = T5 if family == "t5" else SHAPE
    print(f"{family} of {shape}, {method}, {steps} x {batch_size} of {lengths} lengths, shuffled")
    print(f"every variant runs on {devices.name(case.device)}")
    print(f"loss of one batch: relative difference {(difference := check_losses(case)):.1e}")
    if not difference < 1e-4:
        sys.exit("the losses disagree: nothing is measured")
    found = measure(case, rounds, memory, trl)
    if not rounds:
        for name, of in found.items():
            print(f"{name:10}{1 - of.real / of.positions:6.1%} padding")
        return
    print(" " * 11 + "s/step tokens/s  padding  peak_MiB")
    for name, of in found.items():
        peak = f"{of.peak / 2**20:10.0f}" if of.peak == of.peak else ""
        step = of.real / of.best / of.seconds.shape[1]
        print(f"{name:10}{step:7.3f}{of.best:9.0f}{1 - of.real / of.positions:9.1%}{peak}")
    for name, other in itertools.combinations(reversed(found), 2):
        low, middle, high = np.quantile(found[name].speeds / found[other].speeds, (0, 0.5, 1))
        print(
            f"{name} / {other}: {found[name].best / found[other].best:.2f} times the tokens/s "
            f"(rounds {low:.2f}, {middle:.2f}, {high:.2f})"
        )
