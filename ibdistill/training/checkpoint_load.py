"""From the files of a checkpoint into the engine: as they were written, or shared out anew.

DeepSpeed loads a checkpoint of as many ranks with the same ZeRO settings, and the run goes on bit for bit;
`reshard` loads any other. An error may show on one rank alone, so the ranks exchange their errors before the
collectives of the loading, and give up a checkpoint together.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ibdistill.runtime import distributed, random_state
from ibdistill.runtime.distributed import World
from ibdistill.training import reshard
from ibdistill.training.checkpoint_marker import read_marker
from ibdistill.training.train_state import TrainState

logger = logging.getLogger("ibdistill")


class Unloadable(Exception):
    """A checkpoint cannot be loaded; the same on every rank."""


def zero_settings(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """What the DeepSpeed file says about ZeRO, on which the content of a rank's files depends."""
    return engine.config["zero_optimization"]


def load(engine: deepspeed.DeepSpeedEngine, folder: Path, world: World, seed: int) -> TrainState:
    """Load a checkpoint. Collective. Raises Unloadable, on all ranks, for what lies in its files.

    Files are read in functions that communicate with no other rank: ours, or DeepSpeed's
    `_load_checkpoint` and `_load_zero_checkpoint`. Each is followed by an exchange of errors: a rank that
    ends alone leaves the others waiting.
    """
    marker = distributed.run_on_rank_0(lambda: read_marker(folder))
    same_ranks, zero = marker.world_size == world.size, zero_settings(engine)
    if same_ranks and marker.zero in (zero, None):  # None: markers once lacked it
        client_state = _load_as_written(engine, folder)
    else:
        dropout = "" if same_ranks else "; dropout is drawn anew, from run.seed, the step and the rank"
        written = f"written by {marker.world_size} ranks with zero_optimization {json.dumps(marker.zero)}"
        now, start = f"{world.size} with {json.dumps(zero)}", time.perf_counter()
        logger.info("%s was %s, and is shared out anew among %s%s", folder, written, now, dropout)
        client_state = _together(reshard.read, lambda: "its files")(engine, folder)
        reshard.refresh(engine)
        logger.info("shared out in %.1f s", time.perf_counter() - start)

    def ours() -> TrainState:
        state = TrainState(**client_state["ibdistill"])
        if same_ranks:
            random_state.set_rng_state(client_state["rng"][world.rank], world.device)
        else:
            random_state.seed_everything(random_state.derived(seed, state.step, world.rank))
        return state

    state = _together(ours, lambda: "the state of the run")()
    logger.info("resumed from %s", folder)
    return state


def _load_as_written(engine: deepspeed.DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Let DeepSpeed load a checkpoint of as many ranks with the same ZeRO settings; the client state."""
    storage, read = engine.checkpoint_engine, [folder.name]
    storage_load = storage.load

    def load_file(path: str, *args: Any, **kwargs: Any) -> Any:
        read.append(Path(path).name)
        return storage_load(path, *args, **kwargs)

    storage.load = load_file
    engine._load_checkpoint = _together(engine._load_checkpoint, lambda: read[-1])
    engine._load_zero_checkpoint = _together(engine._load_zero_checkpoint, lambda: read[-1])
    try:
        return engine.load_checkpoint(str(folder.parent), tag=folder.name)[1]
    finally:
        storage.load = storage_load
        del engine._load_checkpoint, engine._load_zero_checkpoint  # the class's own again


def _together(load: Callable[..., Any], source: Callable[[], str]) -> Callable[..., Any]:
    """`load`, followed by an exchange of errors, which name `source`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result, errors = None, []
        try:
            result = load(*args, **kwargs)
        except torch.OutOfMemoryError:  # the fault is not the file's
            raise
        except Exception as error:  # pickle, zip files, DeepSpeed and torch each have their own
            text = " ".join(str(error).split())
            errors.append(f"{source()} cannot be loaded: {type(error).__name__}: {text:.200}")
        if failed := distributed.errors_of_all(errors):
            raise Unloadable(failed)
        return result

    return run
