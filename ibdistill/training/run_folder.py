"""The run folder: whether it belongs to a configuration, and its `config.yaml`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import yaml

from ibdistill.config.fields import to_flat
from ibdistill.config.load import to_yaml
from ibdistill.config.sections import Config, RunConfig
from ibdistill.runtime import files
from ibdistill.runtime.version import version

_MAY_CHANGE = {f"run.{f.name}" for f in fields(RunConfig)} - {"run.seed"}
"""Settings that an interrupted run may change without becoming another run."""


def open_folder(folder: Path, config: Config) -> None:
    """Make the run folder, or check that it belongs to this configuration; write `config.yaml`.

    Raises ValueError if it cannot be written, or holds a run of another configuration.
    """
    path = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _check_same(path, config)
        files.write_atomically(path, _header(path) + to_yaml(config))
    except OSError as error:
        raise ValueError(f"run.dir is {str(folder)!r}, which cannot be written: {error}") from error


def _header(path: Path) -> str:
    """Comments at the top of `config.yaml` that name the code: a line for each change of it, the newest last.

    As comments they are no settings, so the file is a recipe, and other code may continue the run.
    """
    before = path.read_text().splitlines() if path.is_file() else []
    lines = [line for line in before if line.startswith("# ibdistill ")]
    now = "# ibdistill {version}, commit {commit}".format_map(version())
    return "".join(f"{line}\n" for line in (lines if lines[-1:] == [now] else [*lines, now]))


def _check_same(path: Path, config: Config) -> None:
    """Raise ValueError unless the folder's run has the same settings."""
    try:
        old = yaml.safe_load(path.read_text())
        old = {f"{section}.{key}": value for section, values in old.items() for key, value in values.items()}
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; choose another --run.dir") from error
    new = to_flat(config)
    changed = [
        f"{name} was {old[name]!r} and is {new[name]!r}"
        for name in new
        if name in old and old[name] != new[name] and name not in _MAY_CHANGE
    ]
    if changed and not config.run.allow_config_change:
        raise ValueError(
            f"{path.parent} holds a run of another configuration: {'; '.join(changed)}. "
            "Choose another --run.dir, or continue it all the same with --run.allow_config_change"
        )
