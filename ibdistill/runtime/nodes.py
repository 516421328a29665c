"""What one rank of each node does for the others."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from typing import TypeVar

from torch.distributed import distributed_c10d

from ibdistill.runtime.distributed import PATIENCE, World, gather_objects

T = TypeVar("T")

_calls = itertools.count()


def run_on_each(world: World, action: Callable[[], T]) -> T:
    """What `action` gave on the first rank of this rank's node; what it raised on one is raised on all.

    The action may take longer than the timeout of collectives: until it is done on all nodes the ranks wait
    outside of any collective. Collective.
    """
    outcome = error = None
    if world.local_rank == 0:
        try:
            outcome = action()
        except (ValueError, OSError) as caught:
            error = caught
    store, call = distributed_c10d._get_default_store(), next(_calls)
    store.set(f"nodes/{call}/{world.rank}", "")
    store.wait([f"nodes/{call}/{rank}" for rank in range(world.size)], PATIENCE)
    host = socket.gethostname()
    found = gather_objects((host, world.local_rank, outcome, error))
    for *_, raised in found:
        if raised is not None:
            raise raised
    if world.local_rank == 0:
        return outcome
    # a container may give each rank a host name of its own
    of_firsts = [own[:3] for own in found if own[1] == 0]
    return next((given for name, _, given in of_firsts if name == host), of_firsts[0][2])


def check_alike(value: str, what: str) -> None:
    """Raise ValueError on every rank unless `value` is the same on all. Collective."""
    found = gather_objects((value, socket.gethostname()))
    for rank, (own, host) in enumerate(found):
        if own != found[0][0]:
            raise ValueError(
                f"{what} differ between rank 0 on {found[0][1]} and rank {rank} on {host}: {found[0][0]!r} "
                f"and {own!r}. All nodes need the same files, the same code and the same libraries"
            )
