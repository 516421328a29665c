"""Everything that a run needs, made from its configuration in the order that fails cheapest first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import Config
from ibdistill.data import batches as data_batches
from ibdistill.data import loading
from ibdistill.data.features import Features, tokenize
from ibdistill.data.records import Record
from ibdistill.data.sampler import MixedSampler, Sampler
from ibdistill.models import families
from ibdistill.models.whole_model import WholeModel
from ibdistill.monitor.alarms import Alarms
from ibdistill.monitor.board import Board
from ibdistill.monitor.meter import Meter
from ibdistill.runtime.distributed import StopRequest, World
from ibdistill.teacher.answers import TeacherAnswers
from ibdistill.training.checkpoint import Checkpoints, TrainState

logger = logging.getLogger("ibdistill")


@dataclass
class Job:
    """A run under way."""

    config: Config
    world: World
    folder: Path
    stop: StopRequest
    streams: Sequence[str]
    records: loading.Loaded
    tokenizer: PreTrainedTokenizerBase
    gold: Features
    """Of the training records."""
    features: Features
    """Of the training records and then of the pseudo-labelled ones in force (`agreement`)."""
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
    alarms: Alarms = field(default_factory=Alarms)
    unlabelled: Sequence[Record] = ()
    """The questions that `agreement` is about."""

    def measures_gradients(self) -> bool:
        """Whether each term's gradient is measured at the current step."""
        every = self.config.run.term_gradients_every if self.config.run.tensorboard else 0
        return every > 0 and self.state.step % every == 0

    def micro_batches(self) -> list[tuple[np.ndarray, data_batches.Batch]]:
        """This rank's micro-batches of the current step, on the CPU, with their rows of the features."""
        return [(rows, self.collate(rows)) for rows in self._shares(self.state.step)]

    def following(self, index: int) -> tuple[np.ndarray, data_batches.Batch] | None:
        """The micro-batch after number `index` of the current step, on the device; None at the very end."""
        shares = self._shares(self.state.step)[index + 1 :]
        if not shares and self.state.step + 1 < self.config.optim.max_steps:
            shares = self._shares(self.state.step + 1)
        return (shares[0], self.collate(shares[0]).to(self.world.device)) if shares else None

    def _shares(self, step: int) -> list[np.ndarray]:
        return self.sampler.micro_batches(
            step,
            rank=self.world.rank,
            world_size=self.world.size,
            micro_batch_size=self.engine.train_micro_batch_size_per_gpu(),
        )

    def mix(self, pseudo: Sequence[Record]) -> None:
        """Give these records, instead of earlier ones, the pseudo-labelled share of every batch; if there are
        none, all is gold."""
        config = self.config
        prefixes = {name: loading.TASKS[name].prefixes for name in self.records.test}
        added = tokenize(pseudo, prefixes, self.tokenizer, config.data)
        batches = {"batch_size": config.optim.batch_size, "seed": config.run.seed}
        if pseudo:
            self.features = self.gold + added
            self.sampler = MixedSampler(self.gold, added, config.data, **batches)
        else:
            self.features = self.gold
            self.sampler = Sampler(self.gold, config.data, **batches)
        if self.teacher_answers:
            self.teacher_answers.set_features(self.features, unchanged=len(self.gold))

    def collate(self, rows: np.ndarray) -> data_batches.Batch:
        """Some records as the student reads them."""
        layout = families.layout(self.engine.module.model, self.tokenizer)
        return data_batches.collate(self.features, rows, self.streams, **layout)
