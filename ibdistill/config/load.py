"""A run's settings: defaults, then a recipe, then the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ibdistill.config import consistency
from ibdistill.config.fields import from_flat, shown
from ibdistill.config.sections import Config

RECIPES = Path(__file__).parents[1] / "recipes"


def load_settings(recipe: str | None, overrides: dict[str, Any]) -> Config:
    """The checked configuration of a run: defaults < recipe < overrides.

    `recipe` is a name in `ibdistill/recipes` or the path of a YAML file. `overrides` maps
    `section.field` to a value as `from_flat` takes it. An empty `run.dir` becomes `runs/RECIPE`.

    Raises ValueError that names the setting, its value and what is allowed.
    """
    values = (_read_recipe(recipe) if recipe is not None else {}) | overrides
    config = from_flat(Config, values)
    consistency.settle(config)
    consistency.check(config)
    if not config.run.dir:
        config.run.dir = str(Path("runs") / (Path(recipe).stem if recipe else "default"))
    return config


def to_yaml(config: Config) -> str:
    """The configuration as a recipe that `load_settings` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


_RESOLVED = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _TextLoader(yaml.SafeLoader):
    """Reads every plain scalar but null as the text that stands there, and refuses keys that come twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [resolver for resolver in resolvers if resolver[0] in _RESOLVED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{shown(key.value)} stands there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


def read_yaml(text: str | bytes) -> Any:
    """The content of YAML text with every number and word as it is written; only null becomes None.

    Raises ValueError if the text is not valid YAML or gives a key of a mapping twice.
    """
    try:
        return yaml.load(text, _TextLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"not valid YAML: {error}") from error


def _read_recipe(recipe: str) -> dict[str, Any]:
    """`section.field` -> value, as `from_flat` takes it."""
    if not isinstance(recipe, str):
        raise ValueError(f"recipe is {shown(recipe)}; it must be the name of a recipe or of a YAML file")
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"no recipe {shown(recipe)}: {shown(str(path))} cannot be read ({why}); "
            f"shipped: {', '.join(recipes())}"
        ) from error
    try:
        content = read_yaml(text) or {}
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map sections to settings; it holds a {type(content).__name__}")
    flat = {}
    for section, fields in content.items():
        if not isinstance(fields, dict):
            raise ValueError(
                f"{path}: {shown(section)} must be a section with settings below it; it is {shown(fields)}"
            )
        flat |= {f"{section}.{key}": value for key, value in fields.items()}
    return flat
