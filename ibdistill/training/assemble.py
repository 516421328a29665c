"""The job: the engine around the student, and what a run keeps beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.load import to_yaml
from ibdistill.config.sections import Config
from ibdistill.data import loading
from ibdistill.data.features import Features
from ibdistill.data.records import Record
from ibdistill.data.sampler import Sampler
from ibdistill.data.text_checks import truncated_shares
from ibdistill.models.whole_model import WholeModel
from ibdistill.monitor.alarms import Alarms
from ibdistill.monitor.board import Board
from ibdistill.monitor.meter import Meter
from ibdistill.objectives import distillation, weights
from ibdistill.runtime import random_state
from ibdistill.runtime.distributed import StopRequest, World
from ibdistill.teacher.answers import TeacherAnswers
from ibdistill.training import on_policy, pseudo_labels
from ibdistill.training.checkpoint import Checkpoints
from ibdistill.training.checkpoint_write import local_folder
from ibdistill.training.engine import build_engine
from ibdistill.training.job import Job
from ibdistill.training.prefetch import Prefetch
from ibdistill.training.train_state import TrainState

_LOOKED_AT = 20_000
"""How many training records the alarms look at, from the first to the last, since each is read from disk."""


def assemble(
    config: Config,
    world: World,
    stop: StopRequest,
    *,
    folder: Path,
    records: loading.Loaded,
    unlabelled: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    student: nn.Module,
    whole: WholeModel,
    features: Features,
    sampler: Sampler,
    teacher_answers: TeacherAnswers | None,
) -> Job:
    """The job: the engine around the student, the state of an interrupted run, and what shows the run.

    It takes the whole configuration because the job keeps it. Collective.
    """
    # dropout differs between ranks; a checkpoint replaces this state
    random_state.seed_everything(config.run.seed + world.rank)
    module = distillation.Distillation(
        student,
        config.objective,
        teacher_width=teacher_answers.width if teacher_answers else 0,
        seed=config.run.seed,
    )
    engine = build_engine(module, config.student.precision, config.optim, config.deepspeed, world)
    kept = {"keep_last": config.run.keep_last, "keep_every": config.run.keep_every}
    local = local_folder(config.run)
    checkpoints = Checkpoints(folder, world, **kept, seed=config.run.seed, local=local)
    state = checkpoints.restore(engine) or TrainState()
    board = Board(folder, world, state.step, config.optim.max_steps, report_to=config.run.report_to)
    board.text("config", to_yaml(config), state.step)
    board.scalars(truncated_shares(records, features, config.data), state.step)
    some = records.train[:: -(-len(records.train) // _LOOKED_AT)] if world.rank == 0 else ()
    alarms = Alarms(some)
    alarms.check_labels(some)
    alarms.check_written(records.report, some)
    job = Job(
        config=config,
        world=world,
        folder=folder,
        stop=stop,
        streams=weights.streams_of(config.objective),
        records=records,
        tokenizer=tokenizer,
        gold=features,
        features=features,
        sampler=sampler,
        teacher_answers=teacher_answers,
        engine=engine,
        whole=whole,
        checkpoints=checkpoints,
        state=state,
        board=board,
        meter=Meter(),
        alarms=alarms,
        prefetch=Prefetch(pins=True) if world.device.type == "cuda" else None,
        unlabelled=unlabelled,
    )
    state.pseudo = state.pseudo if unlabelled else ""
    if state.pseudo:
        job.mix(pseudo_labels.read(folder, state.pseudo))
    if config.on_policy.share:
        on_policy.restore(job)
    return job
