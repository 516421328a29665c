"""Check a run's settings and print a folder:

    python slurm/check_settings.py WHAT RECIPE [--section.field value ...]

WHAT is `run` for the run's own folder, or `rationales` for that of its teacher's texts.

This takes a fraction of a second, since it needs no torch: a typing error should cost neither
a wait in the queue nor the start of all ranks.
"""

from __future__ import annotations

import sys

from ibdistill.config import command_line
from ibdistill.config.load import load_settings


def main() -> None:
    what, *rest = sys.argv[1:]
    given = command_line.parse(rest)
    loaded = load_settings(given.first, given.settings)
    print({"run": lambda: loaded.run.dir, "rationales": loaded.rationale_folder}[what]())


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
