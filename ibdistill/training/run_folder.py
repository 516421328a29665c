"""The run folder: which settings and inputs its run belongs to, and its result.

    RUN/config.yaml     the settings, as a recipe; comments at its top name the code
    RUN/inputs.json     what the settings lead to: digests of records, tokenizer, student and teacher
    RUN/result.json     the scores, once the run is finished

A folder without a checkpoint and without a result holds no run yet, so it takes whatever settings and inputs
come.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.fields import to_flat
from ibdistill.config.load import to_yaml
from ibdistill.config.sections import Config, RunConfig
from ibdistill.data.features import Features
from ibdistill.data.loading import Loaded
from ibdistill.data.records import SEGMENTS, Record
from ibdistill.models import families, presets
from ibdistill.objectives import weights
from ibdistill.runtime import files
from ibdistill.runtime.version import version
from ibdistill.training.checkpoint_marker import MARKER

logger = logging.getLogger("ibdistill")

RESULT = "result.json"
_CONFIG, _INPUTS = "config.yaml", "inputs.json"
_SPLIT = {
    "deepspeed.config",
    *(f"optim.{n}" for n in ("micro_batch_size", "tokens_per_forward", "sequence_parallel")),
}
"""Settings of how a step is shared out, which change no gradient but for its rounding."""
_MAY_CHANGE = {f"run.{f.name}" for f in fields(RunConfig)} - {"run.seed"} | _SPLIT | {"data.cache_dir"}
_MAY_CHANGE |= {f"teacher.server_{name}" for name in ("urls", "requests", "timeout", "wait")}
"""Settings that an interrupted run may change without becoming another run."""
_SHAPES = ("student.layers", "student.lora_rank")
"""Settings that no checkpoint of another value can be continued with."""
_WAY_OUT = "Choose another --run.dir, or continue it all the same with --run.allow_config_change"


def has_begun(folder: Path) -> bool:
    """Whether the folder holds something of a run that other settings would contradict."""
    return (folder / RESULT).exists() or any(folder.glob(f"checkpoints/step-*/{MARKER}"))


def open_folder(folder: Path, config: Config) -> None:
    """Make the run folder with `config.yaml`, or check that it belongs to this configuration.

    Raises ValueError if it cannot be written, or holds a run of another configuration, or a pipe.
    """
    path = folder / _CONFIG
    files.refuse_special(folder)
    if path.is_file():
        _check_settings(path, config)
    else:
        keep(folder, config)


def keep(folder: Path, config: Config, inputs: dict[str, str] | None = None) -> None:
    """Write `config.yaml`, and `inputs.json` if `inputs` is what `check_inputs` gave. Raises ValueError if
    they cannot be written.

    The state of an interrupted run is to be restored before: where that does not fit new settings or another
    model, the run stays one of the old ones.
    """
    path = folder / _CONFIG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, _header(path) + to_yaml(config))
        if inputs is not None:
            files.write_json(folder / _INPUTS, inputs)
    except OSError as error:
        raise ValueError(f"run.dir is {str(folder)!r}, which cannot be written: {error}") from error


def check_inputs(
    folder: Path,
    config: Config,
    records: Loaded,
    unlabelled: Sequence[Record],
    training: str,
    tokenizer: PreTrainedTokenizerBase,
    student: nn.Module,
) -> dict[str, str]:
    """Check that the folder's run learns from the same data and models as it did before; what these are.

    `training`: the training records, as `described` gives them. `student`: the whole model. Raises ValueError
    if something differs and `run.allow_config_change` is off, or if what they were cannot be read.
    """
    path, now = folder / _INPUTS, _data(records, unlabelled, training) | _models(config, tokenizer, student)
    try:
        before = _read_json(path) if has_begun(folder) and path.is_file() else now
        changed = [
            f"{name} was {before.get(name, 'nothing')!r} and is {now.get(name, 'nothing')!r}"
            for name in before | now
            if before.get(name) != now.get(name)
        ]
        if changed and not config.run.allow_config_change:
            raise ValueError(
                f"{folder} holds a run of other data or models: {'; '.join(changed)}. {_WAY_OUT}"
            )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return now


def result(folder: Path) -> dict[str, Any]:
    """What `result.json` says; empty if it is missing or damaged: the end of the run then writes it again."""
    try:
        return _read_json(folder / RESULT)
    except (OSError, ValueError):
        return {}


def _data(records: Loaded, unlabelled: Sequence[Record], training: str) -> dict[str, str]:
    """What a run learns from and is measured on, by name, as texts that change with the content."""
    found = {"training records": training}
    for split in ("valid", "test"):
        found |= {
            f"{split} records of {task}": described(part) for task, part in getattr(records, split).items()
        }
    return found | ({"unlabelled questions": described(unlabelled)} if unlabelled else {})


def _models(config: Config, tokenizer: PreTrainedTokenizerBase, student: nn.Module) -> dict[str, str]:
    """The models of a run, likewise. The teacher is there if the run uses one."""
    shapes = repr([(name, tuple(p.shape)) for name, p in student.named_parameters()])
    special = (
        sorted(tokenizer.special_tokens_map.items()),
        tokenizer("a").input_ids,
    )  # which it adds by itself
    words = repr([sorted(tokenizer.get_vocab().items()), special])
    found = {"tokenizer": _digest(words), "student": _digest(shapes)}
    if config.student.model not in presets.PRESETS and Path(config.student.model).is_dir():
        found["folder of the student"] = families.identity(config.student.model)
    if config.teacher.placement == "server" and not weights.wanted(config.objective):
        found["teacher"] = f"{config.teacher.served_model} on a server"
    elif weights.wanted(config.objective) or config.teacher.rationales != "none":
        if config.teacher.model not in presets.PRESETS:
            families.load_config(config.teacher.model, "teacher.model")  # says it if there is no such model
        found["teacher"] = families.identity(config.teacher.model)
    return found


def described(records: Iterable[Record], features: Features | None = None) -> str:
    """The number of records, and a digest of their names and texts (and of what they were tokenized to)."""
    digest, count = files.Digest(), 0
    for count, r in enumerate(records, start=1):
        row = json.dumps([r.id, r.question, r.label, r.gold, r.rationale, *r.history])
        digest.add((", " if count > 1 else "[").encode() + row.encode())
    digest.add(("" if count else "[").encode() + b"]" + _token_ids(features).encode())
    return f"{count} records, digest {digest.hex()}"


def _token_ids(features: Features | None) -> str:
    """All that the batches are made of, tasks and token ids, as digests."""
    if features is None:
        return ""
    digests = [files.Digest()]
    digests[0].add(features.groups.astype("<i8"))
    tables = [
        ragged
        for stream in features.streams
        for ragged in (features.questions[stream], *(features.targets[s] for s in SEGMENTS[stream]))
    ]
    for ragged in [*tables, *features.teacher_questions.values()]:
        offsets, flat = files.Digest(), files.Digest()
        offsets.add(np.concatenate([[0], ragged.lengths.cumsum()]).astype("<i8"))
        for part, _ in ragged.parts:
            flat.add(np.ascontiguousarray(part, dtype="<i4"))
        digests += [offsets, flat]
    return " ".join(digest.hex() for digest in digests)


def _digest(text: str) -> str:
    return f"digest {files.digest(text.encode(errors='surrogatepass')).hex()}"


def _read_json(path: Path) -> dict[str, Any]:
    """Raises OSError, and ValueError with the path if the file is not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is damaged: {error}; remove it, or choose another --run.dir") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object; remove it, or choose another --run.dir")
    return content


def _header(path: Path) -> str:
    """Comments at the top of `config.yaml` that name the code: a line for each change of it, the newest last.

    As comments they are no settings, so the file is a recipe, and other code may continue the run.
    """
    before = path.read_text().splitlines() if path.is_file() else []
    lines = [line for line in before if line.startswith("# ibdistill ")]
    now = "# ibdistill {version}, commit {commit}".format_map(version())
    return "".join(f"{line}\n" for line in (lines if lines[-1:] == [now] else [*lines, now]))


def _check_settings(path: Path, config: Config) -> None:
    """Raise ValueError unless the folder's run, if there is one, has the same settings."""
    try:
        old = yaml.safe_load(path.read_text())
        old = {f"{section}.{key}": value for section, values in old.items() for key, value in values.items()}
    except (yaml.YAMLError, AttributeError, ValueError) as error:  # ValueError: it is not UTF-8
        raise ValueError(f"{path} is damaged: {error}; choose another --run.dir") from error
    new = to_flat(config)
    differing = {
        name: f"{name} was {old[name]!r} and is {new[name]!r}"
        for name in new
        if name in old and old[name] != new[name] and has_begun(path.parent)
    }
    if split := [text for name, text in differing.items() if name in _SPLIT]:
        logger.info("the run continues though %s", "; ".join(split))
    if shapes := [text for name, text in differing.items() if name in _SHAPES]:
        raise ValueError(
            f"{path.parent} holds a run whose weights have other shapes: {'; '.join(shapes)}. Choose another "
            "--run.dir"
        )
    changed = [text for name, text in differing.items() if name not in _MAY_CHANGE]
    if changed and not config.run.allow_config_change:
        raise ValueError(
            f"{path.parent} holds a run of another configuration: {'; '.join(changed)}. {_WAY_OUT}"
        )


def student_folder(student: str) -> str:
    """The folder of the student that is meant by a run folder; the name itself of any other folder or model.

    Raises ValueError for a preset, a checkpoint, and a run without a student.
    """
    if student in presets.PRESETS:
        raise ValueError(f"{student!r} is a preset, whose weights are random; give a trained student")
    path = Path(student)
    if (path / MARKER).is_file():
        raise ValueError(
            f"{student!r} is a checkpoint for resuming a run; give RUN/student, which a finished run exports"
        )
    if (path / "config.yaml").is_file():
        path = path / "student"
        if not path.is_dir():
            raise ValueError(
                f"{student!r} is a run without a student: it is not finished, or run.export is off"
            )
    return str(path) if path.is_dir() else student
