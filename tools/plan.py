"""Will it fit, and how fast? `python tools/plan.py --help`; the work is done in tools/plan/."""

import os
import sys

os.environ.setdefault(
    "DS_ACCELERATOR", "cpu"
)  # planning touches no device, and DeepSpeed says which it found

import fire
from plan.command import main

if __name__ == "__main__":
    try:
        fire.Fire(main)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
