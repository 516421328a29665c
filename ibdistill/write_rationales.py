"""Let the teacher write rationales for a run's training records, and nothing else:

    deepspeed --num_gpus 2 ibdistill/write_rationales.py RECIPE --teacher.model M --teacher.placement P ...
    python ibdistill/write_rationales.py RECIPE --part 0/8 ...

Settings are those of the run (`train.py --help`); `teacher.rationales` is missing or all. The
texts go to `teacher.rationale_cache`, or else `RUN/rationales`, where the run itself finds
them; with `teacher.placement cache` it then needs no teacher. The same command goes on where
it stopped. `--part i/n` does the i-th (from 0) of n shares, of which n independent processes or
jobs may write to one folder. Exit codes: 0 done, 2 bad input, 6 the teacher's server is down (start
it again), 85 and 143 stopped by SIGUSR1 and SIGTERM.
"""

# ruff: noqa: E402
from __future__ import annotations

from ibdistill.runtime import startup

if __name__ == "__main__":
    startup.answer_help(lambda: __doc__)
startup.hold_requeue_signal()

import re
import sys

import torch.distributed as dist

from ibdistill.config import command_line
from ibdistill.config.load import load_settings
from ibdistill.data import loading
from ibdistill.planning import memory_check
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import StopRequest
from ibdistill.teacher import server_scoring, writing
from ibdistill.training import early_checks, pseudo_labels


def main() -> None:
    """Write what the teacher says to the records of the recipe of the command line."""
    world = distributed.init()
    with distributed.user_errors():
        given = command_line.parse(sys.argv[1:], options=["part"])
        share = part_of(given.options.get("part", "0/1"))
        config = load_settings(given.first, given.settings)
        config.rationale_folder()  # before the data is read
        distributed.run_on_rank_0(lambda: early_checks.check(config))
        distributed.run_on_rank_0(lambda: server_scoring.check(config, scores=False))
        memory_check.check_models(config, world, with_student=False, with_teacher=True)
        records = loading.load(config.data, needs_rationale=False).train
        records += pseudo_labels.questions(config.data, "taught")
        writing.write(config, records, world, StopRequest(), part=share)
    dist.destroy_process_group()


def part_of(part: str) -> tuple[int, int]:
    """`2/8` -> (2, 8). Raises ValueError for what is no part."""
    found = re.fullmatch(r"(\d+)/(\d+)", str(part))
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--part is {part!r}; it must be i/n with 0 <= i < n, such as 0/8")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        distributed.exit_at_once(end.code)
