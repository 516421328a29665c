"""What an entry point does to its process around the heavy imports, which last seconds.

    from ibdistill.runtime import startup

    startup.hold_requeue_signal()
    startup.pause_garbage_collection()
    import torch
    ...
    startup.resume_garbage_collection()

This module imports nothing heavy itself.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def answer_help(text: Callable[[], str]) -> None:
    """Print `text()` and end if the command line asks for help, which need not wait for the imports.

    Of several ranks the first one prints.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(text())
        sys.exit()


def hold_requeue_signal() -> None:
    """Keep SIGUSR1 pending until `distributed.StopRequest` takes it.

    Until then nothing handles the signal, and its default action is to kill the process. Slurm sends it
    ahead of a time limit, which may well fall into a start.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def pause_garbage_collection() -> None:
    """Collect no garbage during the imports: what they make stays to the end, and the search for garbage
    among it takes an eighth of their time."""
    gc.disable()


def resume_garbage_collection() -> None:
    """Collect garbage again, but never look at what the imports have made."""
    gc.freeze()
    gc.enable()


def for_terminal(text: str) -> str:
    """The text with control characters escaped, but for line breaks and tabs. Texts of data, models and
    libraries stand in messages and answers, and a terminal would obey what they hold."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
