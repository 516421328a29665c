"""Plans whether a run fits and how fast it is: `python tools/plan.py --help`; the code is in tools/plan/."""

import os
import sys

# planning touches no device, and DeepSpeed would print which one it found
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from plan.command import from_command_line

if __name__ == "__main__":
    try:
        from_command_line(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
