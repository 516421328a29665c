"""How the ranks of a worker start: by DeepSpeed's launcher, or forked after the imports, which cost more than
what most workers do."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch.multiprocessing import start_processes

from ibdistill.runtime import distributed


def run(main: Callable[..., None], *arguments: Any, ranks: Sequence[int]) -> None:
    """Call `main(*arguments)`: once if this process is a rank of the launcher's, and else on as many forked
    ranks as each entry of `ranks` says, one entry after the other."""
    if "RANK" in os.environ:
        main(*arguments)
        return
    gc.freeze()  # no collection of a rank looks at the imports again
    for number in ranks:
        start_processes(
            _rank, (main, arguments, number, distributed.free_port()), number, start_method="fork"
        )


def _rank(rank: int, main: Callable[..., None], arguments: tuple, ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(*arguments)
