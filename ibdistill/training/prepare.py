"""A run, built from its configuration."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from ibdistill.config.fields import to_flat
from ibdistill.config.load import to_yaml
from ibdistill.config.sections import Config, DataConfig, RunConfig
from ibdistill.config.zero_file import settle_ds_config, split_batch, zero_stage
from ibdistill.data import loading, tokenizers
from ibdistill.data.features import Features, tokenize
from ibdistill.data.sampler import Sampler
from ibdistill.data.tokenizers import load_tokenizer
from ibdistill.models import presets
from ibdistill.models.student import check_context, load_student
from ibdistill.models.whole_model import WholeModel
from ibdistill.monitor.alarms import Alarms
from ibdistill.monitor.board import Board
from ibdistill.monitor.meter import Meter
from ibdistill.objectives import distillation, weights
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.planning import memory_check
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import StopRequest, World
from ibdistill.teacher import writing
from ibdistill.teacher.answers import TeacherAnswers
from ibdistill.teacher.teacher import Teacher
from ibdistill.training import pseudo_labels
from ibdistill.training.checkpoint import Checkpoints, TrainState
from ibdistill.training.engine import build_engine
from ibdistill.training.job import Job

logger = logging.getLogger("ibdistill")

_MAY_CHANGE = {f"run.{f.name}" for f in fields(RunConfig)} - {"run.seed"}
"""Settings that an interrupted run may change without becoming another run."""


def prepare(config: Config, world: World) -> Job:
    """Build a run, or find its way back into an interrupted one. Collective.

    Raises ValueError for what the user can mend.
    """
    stop = StopRequest()
    folder = Path(config.run.dir)
    micro_batch_size, _ = split_batch(config.optim, world.size)
    pseudo_labels.check_share(config.data, micro_batch_size)
    settle_ds_config(config, world.size)
    distributed.run_on_rank_0(lambda: _open_folder(folder, config))
    memory_check.check(config, world)
    streams, wanted = weights.streams_of(config.objective), weights.wanted(config.objective)
    unlabelled = pseudo_labels.questions(config.data)
    writes = config.teacher.rationales != "none"
    taught = pseudo_labels.questions(config.data, "taught")
    records = loading.load(config.data, needs_rationale="explain" in streams and not writes)
    records = dataclasses.replace(records, train=records.train + taught)
    teacher = None
    if config.student.tokenizer == "train" and writes:  # on the teacher's words too
        records, teacher = _written(config, records, world, stop, wanted)
    tokenizer = _tokenizer(config, records, folder)
    student = load_student(config.student, tokenizer, config.run.seed)
    check_context(student, config.data)
    distillation.check_family(config.objective, student)
    if config.student.tokenizer != "train" and writes:
        pair = tokenizer, student.get_output_embeddings().weight.shape[0]
        records, teacher = _written(config, records, world, stop, wanted, pair)
    prefixes = {name: loading.TASKS[name].prefixes for name in records.test}
    features = tokenize(records.train, prefixes, tokenizer, config.data)
    sampler = Sampler(features, config.data, batch_size=config.optim.batch_size, seed=config.run.seed)
    teacher_answers = None
    if wanted:
        teacher_answers = TeacherAnswers(
            config.teacher,
            wanted,
            tokenizer,
            features,
            student,
            world,
            teacher,
            expects_more=bool(unlabelled),
        )

    distributed.seed_everything(config.run.seed + world.rank)
    whole = WholeModel(student, sharded=zero_stage(config) == 3)
    module = distillation.Distillation(
        student,
        config.objective,
        teacher_width=teacher_answers.width if teacher_answers else 0,
        seed=config.run.seed,
    )
    student_engine = build_engine(module, config, world)
    checkpoints = Checkpoints(folder, world, keep_last=config.run.keep_last)
    state = checkpoints.restore(student_engine) or TrainState()
    board = Board(
        folder / "tensorboard", world, state.step, config.optim.max_steps, off=not config.run.tensorboard
    )
    board.text("config", to_yaml(config), state.step)
    board.scalars(data_scalars(features, config.data), state.step)
    alarms = Alarms(records.train)
    if world.rank == 0:
        alarms.check_labels(records.train)
        alarms.check_written(records.report, records.train)
    job = Job(
        config=config,
        world=world,
        folder=folder,
        stop=stop,
        streams=streams,
        records=records,
        tokenizer=tokenizer,
        gold=features,
        features=features,
        sampler=sampler,
        teacher_answers=teacher_answers,
        engine=student_engine,
        whole=whole,
        checkpoints=checkpoints,
        state=state,
        board=board,
        meter=Meter(),
        alarms=alarms,
        unlabelled=unlabelled,
    )
    state.pseudo = state.pseudo if unlabelled else ""
    if state.pseudo:
        job.mix(pseudo_labels.read(folder, state.pseudo))
    return job


def _written(
    config: Config,
    records: loading.Loaded,
    world: World,
    stop: StopRequest,
    wanted: Wanted | None,
    student: tuple[PreTrainedTokenizerBase, int] | None = None,
) -> tuple[loading.Loaded, Teacher | None]:
    """The records with what the teacher wrote, and the teacher if it is loaded and still needed."""
    written = writing.write(config, records.train, world, stop, wanted=wanted, student=student)
    report = records.report | written.counts
    return dataclasses.replace(records, train=written.records, report=report), written.teacher


def data_scalars(features: Features, config: DataConfig) -> dict[str, float]:
    """`data/truncated_share_WHAT`: share of the training texts that fill their limit, so that they were cut
    (or, rarely, just fit)."""
    limits = {
        "questions": (features.questions["predict"], config.max_question_tokens),
        "labels": (features.targets["predict"], config.max_label_tokens),
        "rationales": (features.targets["explain"], config.max_rationale_tokens),
    }
    return {
        f"data/truncated_share_{name}": float((texts.lengths >= limit).mean())
        for name, (texts, limit) in limits.items()
    }


def _open_folder(folder: Path, config: Config) -> None:
    """Make the run folder, or check that it belongs to this configuration."""
    path = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _check_same(path, config)
        path.write_text(to_yaml(config))
    except OSError as error:
        raise ValueError(f"run.dir is {str(folder)!r}, which cannot be written: {error}") from error


def _check_same(path: Path, config: Config) -> None:
    """Raise ValueError unless the folder's run has the same settings."""
    try:
        old = yaml.safe_load(path.read_text())
        old = {f"{section}.{key}": value for section, values in old.items() for key, value in values.items()}
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; choose another --run.dir") from error
    new = to_flat(config)
    changed = [
        f"{name} was {old[name]!r} and is {new[name]!r}"
        for name in new
        if name in old and old[name] != new[name] and name not in _MAY_CHANGE
    ]
    if changed and not config.run.allow_config_change:
        raise ValueError(
            f"{path.parent} holds a run of another configuration: {'; '.join(changed)}. "
            "Choose another --run.dir, or continue it all the same with --run.allow_config_change"
        )


def _tokenizer(config: Config, records: loading.Loaded, folder: Path) -> PreTrainedTokenizerBase:
    """The student's tokenizer; one that is trained here is trained once, by rank 0."""
    name = config.student.tokenizer
    if name == "train":
        target = folder / "tokenizer"

        def make() -> None:  # only rank 0 looks whether it is there: a late rank would see it come to be
            if target.is_dir():
                return
            texts = [text for r in records.train for text in (r.question, r.label, r.rationale) if text]
            prefixes = [prefix for task in records.test for prefix in loading.TASKS[task].prefixes.values()]
            tokenizers.train_tokenizer(texts + prefixes, config.student.vocab_size, target)

        distributed.run_on_rank_0(make)
        return load_tokenizer(str(target), "student.tokenizer")
    if name:
        return load_tokenizer(name, "student.tokenizer")
    if config.student.model in presets.PRESETS:
        if not config.student.model.startswith("demo-"):
            raise ValueError(
                f"student.model is the preset {config.student.model!r}, which has no tokenizer of its own; "
                "set student.tokenizer to train, a hub name or a folder"
            )
        return tokenizers.demo_tokenizer()
    return load_tokenizer(config.student.model, "student.model")
