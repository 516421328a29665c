"""Checkpoints that either count or do not exist, and how a run finds its way back.

    RUN/checkpoints/step-00000500/                  DeepSpeed's files; ours is in its client state
    RUN/checkpoints/step-00000500/complete.json     written last: step, ranks, every file's size and CRC-32

DeepSpeed's own marker `latest` is written before all ranks are done, so it is not used. Ours is
`complete.json`: rank 0 writes it once every rank has written and has reported no error to the
others, and it lists what must be there. A folder without it, or with a file that is missing or
has another size or checksum, is refused with a message, and the checkpoint before it is used.
The ranks share the files among them to compute checksums, which takes about 0.2 s for 500 MB.
So is one whose files are as they were written and still cannot be loaded. If none can be loaded, the
run ends, because by then the weights may be partly those of a file.
Which checkpoint was the best on the validation split stands in the state of each (`TrainState`).

A save copies the states and lets the step go on while a thread writes them (`checkpoint_write`). There is
at most one such checkpoint. The ranks look at each step whether all have written, and then rank 0 writes the
marker; a run that is killed before that resumes from the checkpoint before.

A failed write (full disk, lost permission) must not lose the training state. So each rank keeps the errors
of its files, and the ranks exchange them at the step after the last file; if there is one, rank 0 removes
the half-written folder, and the run goes on with the previous checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed

from ibdistill.runtime import distributed, random_state
from ibdistill.runtime.distributed import World
from ibdistill.runtime.files import checksum, write_json
from ibdistill.training import checkpoint_load
from ibdistill.training.checkpoint_load import zero_settings
from ibdistill.training.checkpoint_marker import MARKER, problem_with, read_marker
from ibdistill.training.checkpoint_write import Writing
from ibdistill.training.train_state import TrainState

logger = logging.getLogger("ibdistill")


class _Unfinished(NamedTuple):
    """A checkpoint whose files are being written."""

    folder: Path
    state: TrainState
    zero: dict[str, Any]
    writing: Writing


class Checkpoints:
    """The checkpoints of a run folder."""

    def __init__(
        self,
        run: Path,
        world: World,
        *,
        keep_last: int,
        keep_every: int,
        seed: int,
        local: Path | None = None,
    ) -> None:
        """`seed`: the run's, for the random states of ranks that did not write a checkpoint. `local`: a
        folder on this node's own disk, through which those go that are written beside the steps."""
        self.folder, self._local = run / "checkpoints", local
        self._world = world
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._seed = seed
        self._begun: _Unfinished | None = None

    def save(self, engine: deepspeed.DeepSpeedEngine, state: TrainState) -> bool:
        """Save; False (after a message) if the checkpoint could not be written. Collective."""
        self.begin(engine, state, beside=False)
        return self.wait()

    def begin(self, engine: deepspeed.DeepSpeedEngine, state: TrainState, *, beside: bool = True) -> None:
        """Begin to save, once the checkpoint before is there. Collective.

        `beside`: the files are written while the run goes on, which has to `poll`.
        """
        self.wait()
        folder = self.folder / f"step-{state.step:08d}"
        # all ranks' random states, because only rank 0 writes the client state
        rng = distributed.gather_objects(random_state.rng_state(self._world.device))
        writing = Writing(engine.checkpoint_engine.save, beside=beside, local=self._local)
        self._on_rank_0(lambda: folder.mkdir(parents=True, exist_ok=True), writing.errors)
        if not distributed.errors_of_all(writing.errors):
            with _saving_by(engine, writing):
                engine.save_checkpoint(
                    str(self.folder),
                    tag=folder.name,
                    client_state={"ibdistill": asdict(state), "rng": rng},
                    save_latest=False,
                )
        self._begun = _Unfinished(folder, replace(state), zero_settings(engine), writing)

    def poll(self) -> None:
        """Complete the checkpoint that was begun if all ranks have written their files. Collective."""
        if self._begun and not distributed.max_over_ranks(not self._begun.writing.is_done):
            self.wait()

    def wait(self) -> bool:
        """Complete the checkpoint that was begun; False (after a message) if it could not be. Collective."""
        begun, self._begun = self._begun, None
        if begun is None:
            return True
        begun.writing.wait()
        errors, step = begun.writing.errors, begun.state.step
        failed = distributed.errors_of_all(errors)
        if not failed:
            checksums = {
                name: sum_
                for part in distributed.gather_objects(begun.writing.checksums)
                for name, sum_ in part.items()
            }
            self._on_rank_0(lambda: self._complete(begun, checksums), errors)
            failed = distributed.errors_of_all(errors)
        if failed:
            self._on_rank_0(lambda: shutil.rmtree(begun.folder, ignore_errors=True), [])
            logger.error("checkpoint of step %d not saved, training goes on: %s", step, failed)
            return False
        self._on_rank_0(lambda: self._prune(begun.state), errors)
        return True

    def restore(self, engine: deepspeed.DeepSpeedEngine, step: int | None = None) -> TrainState | None:
        """Load the newest valid checkpoint, or that of `step`; None if there is none. Collective.

        Raises ValueError if that of `step`, the best one of the run, cannot be used, or if loading has begun
        and no checkpoint can be loaded.
        """
        problem, unloadable = None, ""
        for folder in self._newest_first() if step is None else [self.folder / f"step-{step:08d}"]:
            problem = self._problem_with(folder)
            if problem is None:
                try:
                    return checkpoint_load.load(engine, folder, self._world, self._seed)
                except checkpoint_load.Unloadable as error:
                    problem = str(error)
                    unloadable = unloadable or f"{folder}: {problem}"
            if step is not None:
                raise ValueError(
                    f"checkpoint {folder}, the best one, cannot be used: {problem}; "
                    "--run.final last does without it"
                )
            if self._world.rank == 0:  # the other ranks know the same
                logger.warning("checkpoint %s is not used: %s", folder, problem)
        if unloadable:
            raise ValueError(
                f"{unloadable}; and there is no checkpoint before it that can be used. Give the run another "
                f"run.dir, or delete {self.folder} to start again from the first step"
            )
        return None

    def _newest_first(self) -> list[Path]:
        """The folders that may be checkpoints, the same ones on every rank. Collective."""
        # rank 0 looks, because another rank might see the folder later
        names = distributed.run_on_rank_0(lambda: sorted(path.name for path in self.folder.glob("step-*")))
        return [self.folder / name for name in reversed(names)]

    def _problem_with(self, folder: Path) -> str | None:
        """`problem_with`, and whether the files have their checksums; the same on every rank. Collective.

        Each rank reads its share of the files.
        """
        problem = distributed.run_on_rank_0(lambda: problem_with(folder))
        if problem is not None:
            return problem
        table = distributed.run_on_rank_0(lambda: read_marker(folder).files)
        problems = []
        for name, file in list(table.items())[self._world.rank :: self._world.size]:
            errors: list[str] = []
            found = _checksums([folder / name], errors).get(name)
            if file.crc32 is not None and found != file.crc32:
                problems.append(
                    errors[0] if errors else f"the content of {name} has changed since it was written"
                )
        return next((text for part in distributed.gather_objects(problems) for text in part), None)

    def _complete(self, begun: _Unfinished, checksums: dict[str, int]) -> None:
        """Write the marker; `checksums` are those of the files that ranks have written, by name."""
        files = {
            path.name: {"bytes": path.stat().st_size, "crc32": checksums.get(path.name)}
            for path in sorted(begun.folder.iterdir())
            if path.name != MARKER
        }
        marker = {
            "step": begun.state.step,
            "world_size": self._world.size,
            "zero_optimization": begun.zero,
            "files": files,
        }
        write_json(begun.folder / MARKER, marker)

    def _prune(self, state: TrainState) -> None:
        """Remove what no setting keeps: all but the best, the newest, and those of every so many steps."""
        complete = [folder for folder in sorted(self.folder.glob("step-*")) if problem_with(folder) is None]
        keep = {folder.name for folder in complete[-self._keep_last :]} | {f"step-{state.best_step:08d}"}
        if self._keep_every:
            keep |= {f.name for f in complete if read_marker(f).step % self._keep_every == 0}
        for folder in self.folder.glob("step-*"):
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _on_rank_0(self, action: Callable[[], Any], errors: list[str]) -> None:
        if self._world.rank == 0:
            try:
                action()
            except OSError as error:
                errors.append(f"{type(error).__name__}: {error}")


def _checksums(paths: list[Path], errors: list[str]) -> dict[str, int]:
    """The checksums of files, by name. A file that cannot be read adds to `errors` instead."""
    found = {}
    for path in paths:
        try:
            found[path.name] = checksum(path)
        except OSError as error:
            errors.append(f"{path} cannot be read: {error}")
    return found


@contextmanager
def _saving_by(engine: deepspeed.DeepSpeedEngine, writing: Writing) -> Iterator[None]:
    """Within this context `writing` takes the files that DeepSpeed saves, and keeps its errors, so that each
    rank reaches DeepSpeed's barriers."""
    storage, write = engine.checkpoint_engine, engine.checkpoint_engine.save
    storage.save = writing.save
    # DeepSpeed would add a script that makes weights of the shards, but `train.close` exports the student
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        storage.save = write
