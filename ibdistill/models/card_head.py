"""The head of a model card, which the hub reads: library, tags, and the origin of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ibdistill.config.sections import Config
from ibdistill.models import presets


def front_matter(config: Config) -> dict[str, Any]:
    """What the hub reads of a card. Base model and license stand there as far as they are known."""
    found: dict[str, Any] = {"library_name": "transformers"}
    name = config.student.model
    if name not in presets.PRESETS and config.student.init == "pretrained":
        is_folder = Path(name).is_dir()
        theirs = _card_of(name)
        base = _hub_names(theirs.get("base_model")) if is_folder else name
        found |= {"base_model": base} if base else {}
        found |= {key: theirs[key] for key in ("license", "license_name", "license_link") if key in theirs}
    return found | {"tags": ["ibdistill", "chain-of-thought", "distillation"]}


def _card_of(name: str) -> dict[str, Any]:
    """The front matter of a model's own card, from its folder or the local cache of the hub; else empty."""
    path = Path(name) / "README.md" if Path(name).is_dir() else try_to_load_from_cache(name, "README.md")
    try:
        _, head, _ = Path(path).read_text(encoding="utf-8").split("---", 2)
        content = yaml.safe_load(head)
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _hub_names(names: Any) -> Any:
    """A card's base models as far as they can be names on the hub; a trainer may have put a path there."""
    if isinstance(names, list):
        return list(filter(None, map(_hub_names, names)))
    try:
        validate_repo_id(names)
    except HFValidationError:
        return None
    return names if isinstance(names, str) and not Path(names).exists() else None
