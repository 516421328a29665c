"""Will it fit, and how fast? `python tools/plan.py --help`; the work is done in tools/plan/."""

import os
import sys

# planning touches no device, and DeepSpeed says which one it found
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from plan.command import from_command_line

if __name__ == "__main__":
    try:
        from_command_line(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
