"""A run under way: everything that its steps need. `prepare` makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
from transformers import PreTrainedTokenizerBase

from ibdistill.config import zero_file
from ibdistill.config.sections import Config
from ibdistill.data import batches as data_batches
from ibdistill.data import loading
from ibdistill.data.features import Features
from ibdistill.data.records import Record
from ibdistill.data.sampler import MixedSampler, Sampler
from ibdistill.data.tokenizing import tokenize
from ibdistill.models import families
from ibdistill.models.sequence_parallel import part_of
from ibdistill.models.whole_model import WholeModel
from ibdistill.monitor.alarms import Alarms
from ibdistill.monitor.board import Board
from ibdistill.monitor.meter import Meter
from ibdistill.runtime import hardware
from ibdistill.runtime.distributed import StopRequest, World
from ibdistill.teacher import references
from ibdistill.teacher.answers import TeacherAnswers
from ibdistill.training.checkpoint import Checkpoints
from ibdistill.training.prefetch import Prefetch
from ibdistill.training.train_state import TrainState


@dataclass
class Job:
    """A run under way, on this rank."""

    config: Config
    world: World
    folder: Path
    stop: StopRequest
    streams: Sequence[str]
    records: loading.Loaded
    tokenizer: PreTrainedTokenizerBase
    gold: Features
    """The training records, tokenized."""
    features: Features
    """The same, and behind them the pseudo-labelled records in force (`pseudo_labels`), or those with text of
    the student's own (`on_policy`)."""
    sampler: Sampler
    teacher_answers: TeacherAnswers | None
    engine: deepspeed.DeepSpeedEngine
    whole: WholeModel
    checkpoints: Checkpoints
    state: TrainState
    board: Board
    meter: Meter
    results: dict[str, Any] = field(default_factory=dict)
    """`SPLIT`: the latest scores by task; `SPLIT_seconds`: how long that took."""
    unwritten: list[str] = field(default_factory=list)
    """On rank 0: what of the end of the run could not be written, with the reason. The same command writes
    it."""
    alarms: Alarms = field(default_factory=Alarms)
    prefetch: Prefetch | None = None
    """Makes the micro-batches of coming steps beside the current one; None: they are made when they are
    needed."""
    unlabelled: Sequence[Record] = ()
    """The questions that the student gives labels to itself (`pseudo_labels`)."""

    def measures_gradients(self) -> bool:
        """Whether each term's gradient is measured at the current step."""
        every = self.config.run.term_gradients_every if self.config.run.report_to else 0
        return every > 0 and self.state.step % every == 0

    def micro_batches(self) -> list[tuple[np.ndarray, data_batches.Batch]]:
        """This rank's micro-batches of the current step: their indices into `features`, and the batch, on the
        CPU."""
        step = self.state.step
        made = [(indices, self._batch(indices)) for indices in self._shares(step)]
        if self.prefetch is not None:
            # a teacher that works ahead asks for the next step's first micro-batch within this step
            ahead = 2 if self.teacher_answers and self.teacher_answers.overlaps else 1
            following = range(step + 1, min(step + 1 + ahead, self.config.optim.max_steps))
            coming = [indices for later in following for indices in self._shares(later)]
            self.prefetch.begin(coming, self._collation(self.features))
        return made

    def following(self, index: int) -> tuple[np.ndarray, data_batches.Batch] | None:
        """The micro-batch after number `index` of the current step, as `micro_batches` gives it but on the
        device; None after the run's last one."""
        shares = self._shares(self.state.step)[index + 1 :]
        if not shares and self.state.step + 1 < self.config.optim.max_steps:
            shares = self._shares(self.state.step + 1)
        return (shares[0], self._batch(shares[0]).to(self.world.device)) if shares else None

    def _shares(self, step: int) -> list[np.ndarray]:
        return self.sampler.micro_batches(
            step,
            rank=self.world.rank // self.config.optim.sequence_parallel,
            world_size=zero_file.readers(self.config.optim, self.world.size),
            micro_batch_size=self.engine.train_micro_batch_size_per_gpu(),
        )

    def _batch(self, indices: np.ndarray) -> data_batches.Batch:
        """The micro-batch of these records, made ahead or now."""
        found = None if self.prefetch is None else self.prefetch.get(indices)
        return self.collate(indices) if found is None else found

    def mix(self, pseudo: Sequence[Record]) -> None:
        """Let the following batches hold these pseudo-labelled records instead of earlier ones.

        They take a share of each batch. Without any, batches hold training records alone.
        """
        config = self.config
        prefixes = {name: loading.TASKS[name].prefixes for name in self.records.test}
        added = tokenize(pseudo, prefixes, self.tokenizer, config.data, streams=self.gold.streams)
        alignment = self.teacher_answers and self.teacher_answers.alignment
        if alignment:
            added = alignment.with_questions(added, pseudo, prefixes)
        if self.gold.with_reference:
            reader = alignment.tokenizer if alignment else self.tokenizer
            added = references.with_references(added, pseudo, prefixes, reader, config.data)
        batches = {"batch_size": config.optim.batch_size, "seed": config.run.seed}
        if pseudo:
            self.sampler = MixedSampler(self.gold, added, config.data, **batches)
        else:
            self.sampler = Sampler(self.gold, config.data, **batches)
        self.learn_from(self.gold + added if pseudo else self.gold)

    def learn_from(self, features: Features, *, keeps: bool = False) -> None:
        """Take these features, which begin with `gold`, from now on; `keeps`: the teacher's cache is to hold
        the answers about the others too."""
        if self.prefetch is not None:
            self.prefetch.forget()  # their indices are those of the old features
        self.features = features
        if self.teacher_answers:
            self.teacher_answers.set_features(features, unchanged=len(self.gold), keeps=keeps)

    def collate(self, indices: np.ndarray) -> data_batches.Batch:
        """The records of these indices into `features`, as the student reads them."""
        return self._collation(self.features)(indices)

    def _collation(self, features: Features) -> Callable[[np.ndarray], data_batches.Batch]:
        """What makes a micro-batch of `features` for the student, in any thread."""
        model = self.engine.module.model
        layout = families.layout(model, self.tokenizer)
        positions = getattr(model.config, "max_position_embeddings", None)
        layout["multiple"] = hardware.width_multiple(self.world.device, positions)
        layout["packed"] = self.config.data.packing == "on"
        return lambda indices: part_of(data_batches.collate(features, indices, self.streams, **layout))
