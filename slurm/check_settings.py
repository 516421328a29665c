"""Check a run's settings and print a folder:

    python slurm/check_settings.py WHAT RECIPE [--section.field value ...]

WHAT is `run` for its own, or `rationales` for that of its teacher's text.

Takes a fraction of a second, since it needs no torch: a typing error should cost neither a
wait in the queue nor the start of all ranks.
"""

from __future__ import annotations

import sys
from typing import Any

import fire

from ibdistill.config.load import load_settings


def main(what: str, recipe: str | None = None, *extra: Any, **overrides: Any) -> None:
    if extra:
        raise ValueError(f"unexpected arguments {extra}; settings are given as --section.field value")
    loaded = load_settings(recipe, overrides)
    print({"run": lambda: loaded.run.dir, "rationales": loaded.rationale_folder}[what]())


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
