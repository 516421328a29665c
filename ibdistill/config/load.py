"""A run's settings: defaults, then a recipe, then the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ibdistill.config import consistency
from ibdistill.config.fields import from_flat
from ibdistill.config.sections import Config

RECIPES = Path(__file__).parents[1] / "recipes"


def load_settings(recipe: str | None, overrides: dict[str, Any]) -> Config:
    """The checked configuration of a run: defaults < recipe < overrides.

    `recipe` is a name in `ibdistill/recipes` or the path of a YAML file. `overrides` maps
    `section.field` to a value. An empty `run.dir` becomes `runs/RECIPE`.

    Raises ValueError that names the setting, its value and what is allowed.
    """
    values = (_read_recipe(recipe) if recipe is not None else {}) | overrides
    config = from_flat(Config, values)
    consistency.settle(config)
    consistency.check(config)
    if not config.run.dir:
        config.run.dir = str(Path("runs") / (Path(str(recipe)).stem if recipe else "default"))
    return config


def to_yaml(config: Config) -> str:
    """The configuration as a recipe that `load` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise ValueError(f"no recipe {recipe!r}: {path} does not exist; shipped: {', '.join(recipes())}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map sections to settings; it holds a {type(content).__name__}")
    flat = {}
    for section, fields in content.items():
        if not isinstance(fields, dict):
            raise ValueError(
                f"{path}: {section!r} must be a section with settings below it; it is {fields!r}"
            )
        flat |= {f"{section}.{key}": value for key, value in fields.items()}
    return flat
