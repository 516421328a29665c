"""Four trainers on the same real model and the same records: python tools/bench/real_model.py MODEL SVAMP OUT

`ours` is `ibdistill.train.train_step` in method cot on packed rows, `plain` a loop over padded rows with
transformers' logits for all positions, `trl` and `trl-packed` TRL's SFTTrainer in the environment of another
interpreter (`--trl`, see `trl_sft.py`). All begin with the same pretrained weights in fp32, learn from the
same questions of SVAMP in the same order, with rationales derived from its equations, and minimise the cross
entropy per target token: ours weighs answer and rationale by their shares of all target tokens, which is the
same but for a step's own shares. `trl-packed` fills rows of its own, so its steps have other questions.

Each trainer runs in a process of its own, one after the other in each round. Seconds are those of CPU time,
memory is what the resident set grows to above the model states (16 bytes per parameter), both as in
`packed.py`. OUT gets `speed.json` with every step's seconds and losses, and `losses.png`.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import against_trl
import devices
import torch
from packed import TINY, PackedCase, build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ibdistill.config.sections import DataConfig, StudentConfig
from ibdistill.data import loading, tokenizers
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizing import tokenize
from ibdistill.models.student import load_student
from ibdistill.runtime import distributed


@dataclass
class RealCase(PackedCase):
    """What the trainers share."""

    folder: str = ""
    """Of the model that they begin with."""

    @property
    def tokenizer(self):
        return tokenizers.load_tokenizer(self.folder, "MODEL")

    def settings(self, packing: str):
        settings = super().settings(packing)
        targets = {name: self.features.targets[name].lengths.sum() for name in ("rationale", "answer")}
        settings.objective.alpha = float(targets["answer"] / sum(targets.values()))
        settings.optim.lr, settings.optim.schedule = 2e-4, "constant"
        return settings

    def model(self):
        if self.tiny:
            config = AutoConfig.for_model(self.family, **tiny_shape(self))
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).train().to(self.device)
        loaded = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, trust_remote_code=False
        )
        return loaded.train().to(self.device)


def tiny_shape(case: RealCase) -> dict:
    """Of a model of the same vocabulary, with which libraries are warmed."""
    return {"vocab_size": len(case.tokenizer)} | TINY


def prepare(model: str, data: str, layers: int, folder: Path) -> RealCase:
    """The case, once the model's cut to so many layers (0: all) and its tokenizer are in a folder."""
    tokenizer = tokenizers.load_tokenizer(model, "MODEL")
    student = load_student(StudentConfig(model=model, layers=layers), tokenizer, seed=0)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = DataConfig(task="svamp", path=data, derive_rationales=True)
    records = loading.load(config, needs_rationale=True).train
    features = tokenize(records, {"svamp": TASKS["svamp"].prefixes}, tokenizer, config, streams=("reason",))
    kind = student.config.model_type
    return RealCase(features, kind, 8, 1, devices.choose(), cpu_time=True, folder=str(folder))


def plain(case: RealCase, world):
    """The step of the plain loop, which gives the loss, and the number of parameters."""
    model, optim = case.model(), case.settings("off").optim
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=0.0, fused=True)

    def step(index: int) -> float:
        batch = case.batch(model, index, packed=False)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        labels = torch.full_like(batch.input_ids.flatten(), -100)
        for name, places in batch.positions.items():
            labels[places] = batch.labels[name]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(parameter.numel() for parameter in model.parameters())


def ours(case: RealCase, world):
    """The step of our run, which gives the loss per target token, and the number of parameters."""
    take, size = build(case, "packed", world)

    def step(index: int) -> float:
        interval = take(index).close_interval()
        sums = [value for name, value in interval.terms.items() if name.startswith("ce_")]
        return sum(sums) / interval.targets

    return step, size


MADE = {"ours": ours, "plain": plain}


def run(case: RealCase, name: str) -> dict:
    """What one of our own trainers did, in a new process: as `trl_sft.py` says it."""
    world = distributed.init()
    small = replace(case, tiny=True)
    MADE[name](small, world)[0](0)  # libraries are warm
    model = small.model()
    made = [case.batch(model, index, packed=name == "ours") for index in range(case.steps)]
    found = {"real": [b.num_tokens for b in made], "positions": [b.num_positions for b in made]}
    del model, made
    gc.collect()
    before = devices.held_bytes(case.device)
    (step, size), losses = MADE[name](case, world), []
    devices.restart_peak(case.device)
    found["seconds"] = [
        devices.timed(lambda i=index: losses.append(step(i)), case.device, time.process_time)
        for index in range(case.steps)
    ]
    peak = devices.peak_bytes(case.device) - before - 16 * size
    return found | {"losses": losses, "peak": peak}


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """The loss of each step of the first round."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    for name, rounds in found.items():
        axes.plot(range(1, 1 + len(rounds[0]["losses"])), rounds[0]["losses"], label=name, alpha=0.8)
    axes.set(xlabel="step", ylabel="cross entropy per target token, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def report(found: dict[str, list[dict]]) -> None:
    """Print one line per trainer."""
    print(f"{'':11}tokens/s  of plain  padding  peak_MiB  loss of the last quarter")
    speeds = {n: [sum(r["real"]) / sum(r["seconds"]) for r in rounds] for n, rounds in found.items()}
    for name, rounds in found.items():
        ratio = max(speeds[name]) / max(speeds["plain"])
        padding = 1 - sum(rounds[0]["real"]) / sum(rounds[0]["positions"])
        last = rounds[0]["losses"][-max(1, len(rounds[0]["losses"]) // 4) :]
        print(
            f"{name:11}{max(speeds[name]):8.0f}{ratio:10.2f}{padding:9.1%}"
            f"{min(r['peak'] for r in rounds) / 2**20:10.0f}{sum(last) / len(last):10.3f}"
        )


def main(
    model: str,
    data: str,
    out: str,
    layers: int = 10,
    batch_size: int = 8,
    steps: int = 20,
    rounds: int = 1,
    trl: str | None = None,
) -> None:
    """Measure, print, and write to the folder `out`.

    `layers`: the model is cut to so many, 0: none is cut. `trl`: an interpreter that has TRL.
    """
    with tempfile.TemporaryDirectory() as folder:
        case = prepare(model, data, layers, Path(folder) / "model")
        case.batch_size, case.steps = batch_size, steps
        found: dict[str, list[dict]] = {name: [] for name in MADE}
        if trl:
            against_trl.check_trl(trl, case.family)
            file = against_trl.trl_file(case, {}, tiny_shape(case), folder, case.folder)
            found |= {"trl": [], "trl-packed": []}
        for _, name in ((r, n) for r in range(rounds) for n in found):
            if name in MADE:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    took = process.submit(partial(run, case, name)).result()
            else:
                took = against_trl.run_trl(trl, file, name)
            found[name].append(took)
            print(f"{name}: {sum(took['seconds']):.0f} s of CPU time", file=sys.stderr, flush=True)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    (target / "speed.json").write_text(json.dumps(found))
    draw(found, target / "losses.png")
    report(found)


if __name__ == "__main__":
    import fire

    fire.Fire(main)
