"""Kills runs, continues them, compares them, and counts."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ibdistill.data.tasks import demo_problems, demo_words
from kills.phases import PHASES, SETTINGS, Phase, Start
from kills.starts import Processes

TRAIN = Path(__file__).parents[2] / "ibdistill" / "train.py"
LIMIT = 300
"""Seconds within which a start reaches its phase, and ends."""
RELATIVE = 1e-6
"""How far losses may be off by rounding. Weights, to which AdamW hands the sign of the smallest gradients,
are compared as one vector: the norm of the difference over the norm, at most 10 times as much."""


class Killer:
    """Kills runs, and counts."""

    def __init__(self, out: Path, seed: int, launcher: bool) -> None:
        self._out, self._random, self._launcher = out, random.Random(seed), launcher
        self.counts: dict[str, Counter[str]] = {}

    def aim(self, name: str, kills: int) -> None:
        """Kill runs in a phase until there were so many kills."""
        phase, count = PHASES[name], self.counts.setdefault(name, Counter())
        whole = self._out / f"{name}-whole"
        if problem := self._ends(self._start(whole, phase, 0)[1]):
            raise RuntimeError(f"the run that nobody kills {problem}; its folder is {whole}")
        tries = 0
        while count["kills"] < kills and tries < 2 * kills:
            folder = self._out / f"{name}-{count['runs']:03d}"
            before, number = count["kills"], self._random.randint(2, 5)
            problem, start = "", 0
            while not problem and count["kills"] < min(kills, before + number):
                tries += 1
                problem, killed = self._kill(folder, phase, start, count)
                start += 1
                if not killed:
                    break
            problem = problem or self._ends(self._start(folder, phase, start)[1])
            count["runs"] += 1
            if problem:
                count["lost"] += 1
            elif problem := difference(whole, folder, RELATIVE if len(phase.starts) > 1 else 0.0):
                count["unequal"] += 1
            if problem:
                print(f"{folder} {problem}", flush=True)
            else:
                shutil.rmtree(folder)
            print(f"{name}: {dict(count)}", flush=True)

    def _start(self, folder: Path, phase: Phase, number: int) -> tuple[Start, Processes]:
        ranks, zero = phase.starts[number % len(phase.starts)]
        words = [str(TRAIN), *words_of(phase, folder, zero)]
        start = Start(folder / "run", folder / f"start-{number}.log", time.time())
        return start, Processes(words, ranks, start.log, self._launcher)

    def _kill(self, folder: Path, phase: Phase, number: int, count: Counter[str]) -> tuple[str, bool]:
        """Start the run and kill it; what is wrong with it, and whether the kill came before the end."""
        ranks = phase.starts[number % len(phase.starts)][0]
        victim = self._random.choice([None, self._random.randrange(ranks)])
        later = self._random.uniform(0, phase.seconds)
        start, processes = self._start(folder, phase, number)
        deadline = time.monotonic() + LIMIT
        while not phase.begun(start):
            if (code := processes.code(0.002)) is not None:
                return (f"ended with exit code {code} before it was killed" if code else ""), False
            if time.monotonic() > deadline:
                processes.kill(None)
                return f"had not reached the phase after {LIMIT} s", False
        time.sleep(later)
        if not processes.kill(victim):
            return self._ends(processes), False
        if (code := processes.code(LIMIT)) is None:
            processes.kill(None)
            return f"went on for {LIMIT} s without a rank that was killed", True
        if code == 0:  # it had just ended
            return "", False
        with suppress(ProcessLookupError):  # ranks may outlive the launcher by a moment
            os.killpg(processes.pid, signal.SIGKILL)
        count["kills"] += 1
        count["within"] += bool(phase.caught(start))
        count["one rank"] += victim is not None
        return "", True

    def _ends(self, processes: Processes) -> str:
        """What is wrong with the end of a start that nobody kills."""
        code = processes.code(LIMIT)
        if code is None:
            processes.kill(None)
            return f"had not ended after {LIMIT} s"
        return f"ended with exit code {code}" if code else ""


def words_of(phase: Phase, folder: Path, zero: str) -> list[str]:
    """The settings of a run in a folder, which is made, as words of a command line."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: str(value).format(folder=folder) for name, value in phase.settings.items()}
    data = _written(folder.parent / f"data-{phase.records}", phase.records)
    given |= {"deepspeed.config": zero, "run.dir": folder / "run", "data.path": data}
    return [word for setting, value in (SETTINGS | given).items() for word in (f"--{setting}", str(value))]


def _written(folder: Path, records: int) -> Path:
    """Write so many records to learn from and 4 to test with, unless they are there; the folder."""
    if not folder.exists():
        folder.mkdir(parents=True)
        made = demo_problems.generate(records + 4, 0, demo_words.TARGET, "kills")
        for split, part in (("train", made[4:]), ("test", made[:4])):
            rows = [{"question": r.question, "label": r.label, "rationale": r.rationale} for r in part]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def difference(whole: Path, other: Path, relative: float) -> str:
    """In what the second of two finished runs differs from the first by more than rounding; '' if nothing."""
    import torch
    from safetensors.torch import load_file

    curves = []
    for folder in (whole, other):
        rows = map(json.loads, (folder / "run" / "metrics.jsonl").open())
        curves.append([(row["step"], row["loss/total"]) for row in rows if "loss/total" in row])
    if [step for step, _ in curves[0]] != [step for step, _ in curves[1]]:
        return f"has losses of the steps {[step for step, _ in curves[1]]}"
    for (step, a), (_, b) in zip(*curves, strict=True):
        if abs(a - b) > relative * abs(a):
            return f"has a loss of {b!r} instead of {a!r} at step {step}"
    ours, theirs = (load_file(f / "run" / "student" / "model.safetensors") for f in (whole, other))
    if ours.keys() != theirs.keys():
        return "has other weights"
    a, b = (torch.cat([w[name].double().flatten() for name in sorted(w)]) for w in (ours, theirs))
    apart = float((a - b).norm() / a.norm())
    return f"has weights that are off by {apart:.1e}" if apart > 10 * relative else ""


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The counts as Markdown."""
    columns = ("kills", "within", "one rank", "runs", "lost", "unequal")
    heads = ("phase", "kills", "within the phase", "of one rank", "runs", "lost", "unequal")
    total = {name: sum(count.get(name, 0) for count in counts.values()) for name in columns}
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for phase, count in {**counts, "all": total}.items():
        lines.append(f"| {' | '.join([phase, *(str(count.get(name, 0)) for name in columns)])} |")
    return "\n".join(lines)


def from_command_line(arguments: Sequence[str]) -> int:
    """Kill as the command line says; the exit code. Raises ValueError for what the user can mend."""
    parser = argparse.ArgumentParser(description="Kill runs at random and continue them.")
    parser.add_argument("--kills", type=int, default=100, help="in all phases together")
    parser.add_argument("--phases", default=",".join(PHASES), help="names with commas between them")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--launcher", action="store_true", help="start through `deepspeed`")
    parser.add_argument("--out", type=Path, help="a new folder; one in the system's for temporary files")
    given = parser.parse_args(arguments)
    phases = given.phases.split(",")
    if unknown := [name for name in phases if name not in PHASES]:
        raise ValueError(f"--phases names {unknown[0][:40]!r}; there are {', '.join(PHASES)}")
    if given.kills < len(phases):
        raise ValueError(f"--kills is {given.kills}; it must be at least the number of phases, {len(phases)}")
    out = given.out.resolve() if given.out else Path(tempfile.mkdtemp(prefix="kills-"))
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {str(out)!r} is not empty; name another folder")
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(variable, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"--seed {given.seed}, folders in {out}", flush=True)
    killer = Killer(out, given.seed, given.launcher)
    for i, name in enumerate(phases):
        killer.aim(name, given.kills // len(phases) + (i < given.kills % len(phases)))
    print(f"\n{table(killer.counts)}")
    bad = any(count["lost"] or count["unequal"] for count in killer.counts.values())
    if not bad:
        shutil.rmtree(out)
    return int(bad)
