"""Check what a run would read: python slurm/check_inputs.py RECIPE [--section.field value ...]

Called by the job scripts after slurm/check_settings.py; it needs no torch either. A data path that does not
exist, a DeepSpeed file that cannot be used and a model's folder that is missing end here, not in the queue.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ibdistill.config import command_line, zero_file
from ibdistill.config.load import load_settings
from ibdistill.config.sections import Config


def check(config: Config) -> None:
    """Raise ValueError that names the setting, its value and the way out."""
    path = config.data.path
    if path is not None and not os.access(path, os.R_OK):
        raise ValueError(
            f"data.path is {path!r}, which does not exist or cannot be read; give a folder or file"
        )
    if config.deepspeed.config != "auto":
        zero_file.read_ds_config(config.deepspeed.config)
    models = {"student.model": config.student.model, "student.tokenizer": config.student.tokenizer}
    if config.teacher.placement not in ("none", "cache"):
        models["teacher.model"] = config.teacher.model
    for setting, name in models.items():
        if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
            raise ValueError(
                f"{setting} is {name!r}, a folder that does not exist; save the model there first"
            )


def main() -> None:
    given = command_line.parse(sys.argv[1:])
    check(load_settings(given.first, given.settings))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
