"""Accepts this product on real GPUs, or says what fails on them: one command, one report to send.

    python tools/accept.py OUT [--minutes 10]              # all GPUs that are visible
    deepspeed --num_gpus 8 tools/accept.py OUT             # the same, limited to eight

No network, random weights, generated records. OUT/accept.jsonl gets a line as soon as something is known, so
that a crash leaves evidence; OUT/report.md is a table to read and to send; OUT/logs/ has the output of each
check. The checks are in the order of their worth, and what does not fit the minutes is "not run".

Exit codes: 0 accepted, 1 something failed (named on the last lines), 2 bad arguments or no GPU, 4 nothing
failed but not all was run.

    python tools/accept.py OUT --dry-run-on-cpu            # small forms of the checks; never "accepted"
"""

import os
import sys

if __name__ == "__main__":
    if int(os.environ.get("RANK", "0")) > 0:
        sys.exit(
            0
        )  # under the launcher rank 0 alone conducts; it starts ranks of its own where they are needed
    from accept.conductor import from_command_line

    try:
        sys.exit(from_command_line(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
