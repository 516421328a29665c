"""Kill runs with SIGKILL at random moments, continue them, and compare them with runs that nobody killed.

    python tools/kills.py [--kills 100] [--phases writing,sharing,sampling] [--seed 0] [--launcher]

`tools/kills/phases.py` says where the kills are aimed. A run is started, and once its phase has begun, and a
random time after that, one random rank is killed, or all ranks with what started them. The same command
starts again, and is killed up to 5 times, and then left alone to its end. Its losses and weights must then be
those of a run with the same settings that nobody killed: to the last bit, or, in a phase that changes the
number of ranks, up to rounding. A kill does not count where the process had ended before it came.

The table has for each phase: kills; how many fell into it, by what they left behind; how many hit one rank
alone; the runs that were killed; those that were lost, which means that a start ended by itself with another
exit code than 0, or did not end at all; and those that ended with other losses or weights. The folders of
both stay in `--out`, and the exit code is 1 if there are any; it is 2 for bad arguments.

The ranks are forked from a process that has imported what they need. With `--launcher` each start goes
through `deepspeed`, as a user's does, and takes some 14 s of CPU time.
"""

import sys

if __name__ == "__main__":
    from kills.killing import from_command_line

    try:
        sys.exit(from_command_line(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
