"""What can be told about a run's inputs without torch, in a fraction of a second.

The job scripts ask before a job waits in a queue, and `train.py` before it opens the run's folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

from ibdistill.config import zero_file
from ibdistill.config.sections import Config, DataConfig
from ibdistill.config.teacher_consistency import needs_answers
from ibdistill.data.json_rows import check_form
from ibdistill.data.tasks import jsonl
from ibdistill.data.tasks.registry import TASKS
from ibdistill.models import hub
from ibdistill.runtime import files

_ENCODERS = re.compile(r"(albert|bert|camembert|deberta|distilbert|electra|modernbert|roberta|xlm-roberta)\b")
"""Types of models that have no decoder, as they stand in config.json."""
_NO_DECODER = re.compile(r"(EncoderModel|ForMaskedLM)$")
"""How the class of such a model ends, whatever its type (a T5 without its decoder is of type t5)."""


def check(config: Config) -> None:
    """Raise ValueError that names the setting, its value and the way out."""
    _check_data(config.data)
    if "wandb" in config.run.report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "run.report_to names wandb, whose library is not installed: pip install 'ibdistill[wandb]', or "
            "leave it out"
        )
    if config.run.push_to_hub:
        hub.check(config.run.push_to_hub)
    if config.deepspeed.config != "auto":
        zero_file.read_ds_config(config.deepspeed.config)
    models = {"student.model": config.student.model, "student.tokenizer": config.student.tokenizer}
    if needs_teacher_files(config):
        models["teacher.model"] = config.teacher.model
    for setting, name in models.items():
        if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
            raise ValueError(
                f"{setting} is {name!r}, a folder that does not exist; save the model there first"
            )
        if Path(name).is_dir():
            files.refuse_special(Path(name))
        if setting != "student.tokenizer":
            _check_decoder(setting, name)


def needs_teacher_files(config: Config) -> bool:
    """Whether `teacher.model` is loaded, or its tokenizer is; one on a server that only writes has a name."""
    if config.teacher.placement == "server":
        return bool(needs_answers(config.objective))
    return config.teacher.placement not in ("none", "cache")


def _check_data(data: DataConfig) -> None:
    """Raise ValueError unless the files exist, can be read, and begin as a file of a supported form does."""
    files = [Path(given) for given in (data.unlabelled, data.taught) if isinstance(given, str)]
    if data.path is not None:
        if not os.access(data.path, os.R_OK):
            raise ValueError(
                f"data.path is {data.path!r}, which does not exist or cannot be read; give a folder or file"
            )
        files.append(Path(data.path))
    for file in files:
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ValueError(
                f"{file} is neither a file nor a folder; data is read more than once, so a pipe cannot hold "
                "it. Write it to a file first"
            )
    for name in [data.task] if isinstance(data.task, str) else data.task:
        if name in TASKS and TASKS[name].read is jsonl.read_jsonl:
            files += jsonl.split_files(name, data).values()
    for file in files:
        if file.is_file():  # else the reader says what is missing
            check_form(file)


def _check_decoder(setting: str, name: str) -> None:
    """Raise ValueError if a model's folder holds an encoder without a decoder. Loading finds other faults."""
    try:
        model = json.loads((Path(name) / "config.json").read_bytes())
        kind, classes = str(model["model_type"]), [str(part) for part in model.get("architectures") or ()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    headless = [part for part in classes if _NO_DECODER.search(part)]
    if headless or _ENCODERS.match(kind):
        raise ValueError(
            f"{setting} is {name!r}, by its config.json a {(headless or classes or [kind])[0]}: an encoder, "
            "which writes no text. Take a model with a decoder, such as t5, gpt2, llama or qwen2"
        )
