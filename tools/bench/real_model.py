"""Trainers on the same real model and the same records: python tools/bench/real_model.py MODEL SVAMP OUT

`ours` is `ibdistill.train.train_step` in method cot on packed rows, `plain` a loop over padded rows with
transformers' logits for all positions, `trl` and `trl-packed` TRL's SFTTrainer in the environment of another
interpreter (`--trl`, see `trl_trainers.py`). All begin with the same pretrained weights in fp32, learn from
the same questions of SVAMP in the same order, with rationales derived from its equations, and minimise the
cross entropy per target token: ours weighs answer and rationale by their shares of all target tokens, which
is the same but for a step's own shares. `trl-packed` fills rows of its own, so its steps have other
questions.

With `--teacher FOLDER` all distil that model, in fp32, on the same records: method cot+kd, and TRL's
GKDTrainer with `lmbda=0`. They minimise the Jensen-Shannon divergence per target token, without clipping.

Each trainer runs in a process of its own, one after the other in each round. Seconds are those of CPU time,
memory is what the resident set grows to above the model states (16 bytes per parameter, and 4 per
parameter of the teacher), both as in `packed.py`. OUT gets `speed.json` with every step's seconds and
losses, and `losses.png`.
"""

from __future__ import annotations

import gc
import json
import math
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

from ibdistill.config.sections import DataConfig, StudentConfig, TeacherConfig
from ibdistill.data import loading, tokenizers
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizing import tokenize
from ibdistill.models.student import load_student
from ibdistill.models.whole_model import WholeModel
from ibdistill.runtime import distributed
from ibdistill.training.prepare import build_teacher


@dataclass
class RealCase(PackedCase):
    """What the trainers share."""

    folder: str = ""
    """Of the model that they begin with."""
    teacher: str = ""
    """The folder of a model that they distil; empty: they learn the records' tokens."""

    @property
    def tokenizer(self):
        return tokenizers.load_tokenizer(self.folder, "MODEL")

    @property
    def tiny_teacher(self) -> str:
        """Its folder."""
        return f"{self.folder}-teacher"

    def settings(self, packing: str):
        settings = super().settings(packing)
        targets = {name: self.features.targets[name].lengths.sum() for name in ("rationale", "answer")}
        settings.objective.alpha = float(targets["answer"] / sum(targets.values()))
        settings.optim.lr, settings.optim.schedule = 2e-4, "constant"
        if self.teacher:
            objective = settings.objective
            objective.method, objective.divergence = "cot+kd", "jsd"
            # AdamW does not feel the scale of a loss that is not clipped: the cross entropy all but vanishes
            objective.gamma, settings.optim.clip_norm = 1e4, 0.0
            settings.teacher = TeacherConfig(placement="replica", model=self.teacher, precision="fp32")
        return settings

    def teacher_answers(self, settings, student, world):
        if not self.teacher:
            return None
        given = settings.teacher, settings.objective, self.tokenizer, self.features, student, world, None
        stop, whole = distributed.StopRequest(), WholeModel(student, sharded=False)
        return build_teacher(*given, stop, whole, expects_more=False, seed=0)

    def model(self):
        if self.tiny:
            config = AutoConfig.for_model(self.family, **tiny_shape(self))
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).train().to(self.device)
        return _load(self.folder).train().to(self.device)


def _load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def state_bytes(case: RealCase, size: int) -> int:
    """What the states of a student of so many parameters take, and the teacher's weights."""
    if not case.teacher:
        return 16 * size
    config = AutoConfig.from_pretrained(case.teacher, trust_remote_code=False)
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return 16 * size + 4 * teacher.num_parameters()


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean Jensen-Shannon divergence of the rows of two tensors of logits, in nats."""
    logs = torch.stack([student, teacher]).log_softmax(-1)
    mixture = logs.logsumexp(0) - math.log(2)
    return (logs.exp() * (logs - mixture)).sum(-1).mean()


def tiny_shape(case: RealCase) -> dict:
    """Of a model of the same vocabulary, with which libraries are warmed."""
    return {"vocab_size": len(case.tokenizer)} | TINY


def prepare(model: str, data: str, layers: int, folder: Path, teacher: str = "") -> RealCase:
    """The case, once the model's cut to so many layers (0: all) and its tokenizer are in a folder.

    Beside it is a folder with a small teacher to warm libraries with, if there is a teacher.
    """
    tokenizer = tokenizers.load_tokenizer(model, "MODEL")
    student = load_student(StudentConfig(model=model, layers=layers), tokenizer, seed=0)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = DataConfig(task="svamp", path=data, derive_rationales=True)
    records = loading.load(config, needs_rationale=True).train
    features = tokenize(records, {"svamp": TASKS["svamp"].prefixes}, tokenizer, config, streams=("reason",))
    kind = student.config.model_type
    case = RealCase(
        features, kind, 8, 1, devices.choose(), cpu_time=True, folder=str(folder), teacher=teacher
    )
    if teacher:
        replace(case, tiny=True).model().save_pretrained(case.tiny_teacher)
        tokenizer.save_pretrained(case.tiny_teacher)
    return case


def plain(case: RealCase, world):
    """The step of the plain loop, which gives the loss, and the bytes of model states."""
    model, optim = case.model(), case.settings("off").optim
    teacher = _load(case.teacher).to(case.device).eval() if case.teacher else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=0.0, fused=True)

    def step(index: int) -> float:
        batch = case.batch(model, index, packed=False)
        read = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        logits = model(**read).logits.flatten(0, 1)
        labels = torch.full_like(batch.input_ids.flatten(), -100)
        for name, places in batch.positions.items():
            labels[places] = batch.labels[name]
        if teacher is None:
            loss = nn.functional.cross_entropy(logits, labels)
        else:
            with torch.no_grad():
                targets = teacher(**read).logits.flatten(0, 1)
            loss = divergence(logits[labels != -100], targets[labels != -100])
        loss.backward()
        if optim.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, state_bytes(case, model.num_parameters())


def ours(case: RealCase, world):
    """The step of our run, which gives the loss per target token, and the bytes of model states."""
    take, size = build(case, "packed", world)
    term = "kd_" if case.teacher else "ce_"

    def step(index: int) -> float:
        interval = take(index).close_interval()
        sums = [value for name, value in interval.terms.items() if name.startswith(term)]
        return sum(sums) / interval.targets

    return step, state_bytes(case, size)


MADE = {"ours": ours, "plain": plain}


def run(case: RealCase, name: str) -> dict:
    """What one of our own trainers did, in a new process: as `trl_trainers.py` says it."""
    world = distributed.init()
    small = replace(case, tiny=True, teacher=case.teacher and case.tiny_teacher)
    MADE[name](small, world)[0](0)  # libraries are warm
    model = small.model()
    made = [case.batch(model, index, packed=name == "ours") for index in range(case.steps)]
    found = {"real": [b.num_tokens for b in made], "positions": [b.num_positions for b in made]}
    del model, made
    gc.collect()
    before = devices.held_bytes(case.device)
    (step, states), losses = MADE[name](case, world), []
    devices.restart_peak(case.device)
    found["seconds"] = [
        devices.timed(lambda i=index: losses.append(step(i)), case.device, time.process_time)
        for index in range(case.steps)
    ]
    peak = devices.peak_bytes(case.device) - before - states
    return found | {"losses": losses, "peak": peak}


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """The loss of each step of the first round."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    for name, rounds in found.items():
        axes.plot(range(1, 1 + len(rounds[0]["losses"])), rounds[0]["losses"], label=name, alpha=0.8)
    axes.set(xlabel="step", ylabel="loss per target token, nats")
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
    teacher: str = "",
) -> None:
    """Measure, print, and write to the folder `out`.

    `layers`: the model is cut to so many, 0: none is cut. `trl`: an interpreter that has TRL. `teacher`: the
    folder of a model of the same vocabulary, which all distil.
    """
    with tempfile.TemporaryDirectory() as folder:
        case = prepare(model, data, layers, Path(folder) / "model", teacher)
        case.batch_size, case.steps = batch_size, steps
        found: dict[str, list[dict]] = {name: [] for name in MADE}
        if trl:
            against_trl.check_trl(trl, case.family)
            file = against_trl.trl_file(case, {}, tiny_shape(case), folder, case.folder, teacher)
            found |= {"trl": []} if teacher else {"trl": [], "trl-packed": []}
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
