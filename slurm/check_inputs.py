"""Check what a run would read: python slurm/check_inputs.py RECIPE [--section.field value ...]

Called by the job scripts after slurm/check_settings.py; it needs no torch either. A data path that does not
exist or is a CSV table, a DeepSpeed file that cannot be used, a model's folder that is missing and a model
that cannot write end here, not in the queue.
"""

from __future__ import annotations

import sys

from ibdistill.config import command_line
from ibdistill.config.load import load_settings
from ibdistill.training import early_checks


def main() -> None:
    given = command_line.parse(sys.argv[1:])
    early_checks.check(load_settings(given.first, given.settings))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
