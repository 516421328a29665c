"""TRL as a variant of `packed.py`, in the environment of another interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
"""What this process's environment says about its process group, and where it finds its modules."""


def trl_file(case, shape: dict, tiny: dict, folder: str, pretrained: str = "", teacher: str = "") -> str:
    """The file that `trl_trainers.py` reads: all steps' rows of a `PackedCase`, each with its prompt's
    length.

    `shape`: what makes the model's configuration, and `tiny` that of one with which libraries are warmed;
    `pretrained`: the folder of a model that is taken instead of `shape`; `teacher`: that of a model whose
    distributions are learnt instead of the rows' tokens.
    """
    features, model, optim = case.features, case.model(), case.settings("off").optim
    rows = []
    for step in range(case.steps):
        batch = case.batch(model, step, packed=True)
        for ids, record in zip(
            batch.input_ids[0].split(batch.row_lengths.tolist()), case.sampler().step(step), strict=True
        ):
            target = len(features.targets["rationale"][record]) + len(features.targets["answer"][record])
            # its last token is predicted and not read
            last = int(features.targets["answer"][record][-1])
            rows.append(([*ids.tolist(), last], len(ids) + 1 - target))
    tokens = sum(len(row) for row, _ in rows) // case.steps
    found = {
        "family": case.family,
        "shape": shape,
        "cpu_time": case.cpu_time,
        "pretrained": pretrained,
        "distils": bool(teacher),
        "teacher": teacher,
        "tiny": tiny,
        "rows": rows,
        "tokens": tokens,
        "steps": case.steps,
    }
    found |= {"batch_size": case.batch_size, "lr": optim.lr, "clip_norm": optim.clip_norm}
    path = Path(folder) / "case.json"
    path.write_text(json.dumps(found | {"threads": torch.get_num_threads()}))
    return str(path)


def run_trl(python: str, file: str, variant: str) -> dict:
    """What `trl_trainers.py` measured in the environment of the interpreter `python`."""
    script = str(Path(__file__).with_name("trl_trainers.py"))
    alone = {key: value for key, value in os.environ.items() if key not in GROUP}
    run = subprocess.run([python, script, file, variant], capture_output=True, text=True, env=alone)
    if run.returncode:
        sys.exit(f"--trl {python}: {variant} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def check_trl(python: str, family: str) -> None:
    """End the program unless the interpreter has TRL and the family is one that TRL is compared for."""
    if family == "t5":
        sys.exit("--trl compares decoder-only families: TRL's SFTTrainer takes no encoder-decoder model")
    try:
        found = subprocess.run([python, "-c", "import trl"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"--trl {python}: it is no interpreter ({error.strerror})")
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(
            f"--trl {python}: it cannot import trl ({last}); make an environment of its own: "
            "python -m venv FOLDER && FOLDER/bin/pip install torch trl, and give FOLDER/bin/python"
        )
