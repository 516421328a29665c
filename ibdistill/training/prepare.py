"""A run, built from its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.methods import METHODS
from ibdistill.config.sections import (
    Config,
    DataConfig,
    ObjectiveConfig,
    TeacherConfig,
)
from ibdistill.config.zero_file import readers, settle_ds_config, split_batch, zero_stage
from ibdistill.data import loading
from ibdistill.data.features import Features
from ibdistill.data.records import Record
from ibdistill.data.sampler import OnPolicySampler, Sampler
from ibdistill.data.token_sampler import TokenSampler
from ibdistill.models.whole_model import WholeModel
from ibdistill.objectives import weights
from ibdistill.planning import memory_check
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import StopRequest, World
from ibdistill.teacher import server_scoring, writing
from ibdistill.teacher.alignment import TextAlignment
from ibdistill.teacher.answers import TeacherAnswers
from ibdistill.teacher.teacher import Teacher
from ibdistill.training import device, early_checks, pseudo_labels, run_folder, tables
from ibdistill.training.assemble import assemble
from ibdistill.training.build_student import build_student
from ibdistill.training.job import Job


def prepare(config: Config, world: World) -> Job:
    """Build a run, or find its way back into an interrupted one. Collective.

    The order is the one that fails cheapest first, as far as each part needs those before it:

    1. Open the run. This takes the settings alone, and refuses what is wrong with them, a folder of another
       run, and models that cannot fit into memory.
    2. Load the records: text, no weights.
    3. Build the student, which is the tokenizer and then the model.
    4. Refuse to go on with other data or models than the folder's run had.
    5. Build the teacher. Its answers belong to the student's token ids, so they need the tokenized records.
    6. Assemble the job. The engine comes last because it needs the most memory, and because the weights of
       an interrupted run are restored into it.

    A teacher that writes text does so after the student is there: it may write for hours, so it is checked
    before against the student's tokenizer and head, which it is to score later. Only where a tokenizer is
    trained here does the teacher's text come first, because the tokenizer learns from its words too.

    Raises ValueError for what the user can mend.
    """
    stop = StopRequest()
    folder = open_run(config, world)
    records, unlabelled = load_records(config.data, config.teacher, config.objective, world)
    writes, trains_tokenizer = config.teacher.rationales != "none", config.student.tokenizer == "train"
    teacher = None
    if writes and trains_tokenizer:
        records, teacher = add_teacher_text(config, records, world, stop)
    aligned = config.objective.alignment == "text"
    tokenizer, student = build_student(
        config.student,
        config.data,
        config.objective,
        records,
        folder,
        config.run.seed,
        teacher=config.teacher.model if early_checks.needs_teacher_files(config) and not aligned else "",
    )
    if writes and not trains_tokenizer:
        vocabulary = student.get_output_embeddings().weight.shape[0]
        pair = None if aligned else (tokenizer, vocabulary)
        records, teacher = add_teacher_text(config, records, world, stop, pair)
    records, features, alignment, described = tables.tokenize(config, records, tokenizer, world)
    sampler = build_sampler(config, features, readers(config.optim, world.size))
    made = (records, unlabelled, described, tokenizer, student)
    inputs = distributed.run_on_rank_0(lambda: run_folder.check_inputs(folder, config, *made))
    whole = WholeModel(student, sharded=zero_stage(config) == 3)  # before the engine partitions the student
    teacher_answers = build_teacher(
        config.teacher,
        config.objective,
        tokenizer,
        features,
        student,
        world,
        teacher,
        stop,
        whole,
        expects_more=bool(unlabelled) or config.on_policy.share > 0,
        alignment=alignment,
        seed=config.run.seed,
    )
    job = assemble(
        config,
        world,
        stop,
        folder=folder,
        records=records,
        unlabelled=unlabelled,
        tokenizer=tokenizer,
        student=student,
        whole=whole,
        features=features,
        sampler=sampler,
        teacher_answers=teacher_answers,
    )
    distributed.run_on_rank_0(lambda: run_folder.keep(folder, config, inputs))
    return job


def open_run(config: Config, world: World) -> Path:
    """Check the settings against the number of ranks and the memory; the run's folder. Collective.

    It takes the whole configuration because `config.yaml` in the folder holds it all. It settles
    `deepspeed.config` auto and `student.precision` auto there.
    """
    _, micro_batches = split_batch(
        config.optim, readers(config.optim, world.size)
    )  # raises before anything is read
    weights.check_split(config.objective, config.optim, micro_batches)
    settle_ds_config(config, world.size)
    device.settle_precision(config, world)
    folder = Path(config.run.dir)
    device.check_node(config, world)
    distributed.run_on_rank_0(lambda: server_scoring.check(config))
    distributed.run_on_rank_0(lambda: run_folder.open_folder(folder, config))
    device.start_sequence_parallel(config)
    memory_check.check(config, world)
    if world.device.type == "cuda":
        device.warn_of_slow_losses()
    return folder


def load_records(
    data: DataConfig, teacher: TeacherConfig, objective: ObjectiveConfig, world: World
) -> tuple[loading.Loaded, list[Record]]:
    """The records of all splits, and the questions of `data.unlabelled`. Collective.

    The questions of `data.taught` are among the training records; the teacher is still to answer them.
    """
    unlabelled = pseudo_labels.questions(data)
    taught = pseudo_labels.questions(data, "taught")
    explains, writes = METHODS[objective.method].explains, teacher.rationales != "none"
    records = tables.load(data, world, needs_rationale=explains and not writes)
    return replace(records, train=[*records.train, *taught]) if taught else records, unlabelled


def add_teacher_text(
    config: Config,
    records: loading.Loaded,
    world: World,
    stop: StopRequest,
    student: tuple[PreTrainedTokenizerBase, int] | None = None,
) -> tuple[loading.Loaded, Teacher | None]:
    """The records with what the teacher wrote, and the teacher if it is loaded and still needed. Collective.

    `student`: its tokenizer and the size of its head's vocabulary, if a loaded teacher has to match them.

    Raises ValueError for conversations of several turns, of which the teacher would see the last question.
    """
    if several := next((record.id for record in records.train if record.history), None):
        raise ValueError(
            f"teacher.rationales is {config.teacher.rationales!r}, and {several} has earlier turns, which "
            "teacher.template does not show; leave such records out, or set teacher.rationales none"
        )
    wanted = weights.wanted(config.objective)
    written = writing.write(config, records.train, world, stop, wanted=wanted, student=student)
    report = records.report | written.counts
    records = replace(records, train=written.records, report=report)
    return tables.keep(records, config.data, world), written.teacher


def build_sampler(config: Config, features: Features, world_size: int) -> Sampler:
    """The sampler by questions, or by tokens with `optim.tokens_per_batch`; raises ValueError as these do."""
    if not config.optim.tokens_per_batch:
        batches = {"batch_size": config.optim.batch_size, "seed": config.run.seed}
        if config.on_policy.share:
            return OnPolicySampler(features, config.data, **batches, share=config.on_policy.share)
        return Sampler(features, config.data, **batches)
    streams = weights.streams_of(config.objective)
    shared = {"streams": streams, "world_size": world_size, "seed": config.run.seed}
    return TokenSampler(features, config.data, config.optim, **shared)


def build_teacher(
    config: TeacherConfig,
    objective: ObjectiveConfig,
    tokenizer: PreTrainedTokenizerBase,
    features: Features,
    student: nn.Module,
    world: World,
    teacher: Teacher | None,
    stop: StopRequest,
    whole: WholeModel,
    *,
    expects_more: bool,
    alignment: TextAlignment | None = None,
    seed: int,
) -> TeacherAnswers | None:
    """What answers for the teacher while the student learns; None if the objective wants no answers.

    A teacher behind a server gives all its answers here. `teacher`: one that is loaded already. `whole`: the
    student as it will be when its own text is scored.
    `expects_more`: others will join `features`. `alignment`: for a teacher of another vocabulary. `seed`: of
    the run.
    """
    wanted = weights.wanted(objective)
    if not wanted:
        return None
    more = {"expects_more": expects_more, "alignment": alignment, "seed": seed}
    if config.placement == "server":
        head_rows = student.get_output_embeddings().weight.shape[0]
        rest = weights.teacher_streams(objective), head_rows, stop
        server_scoring.fill(config, wanted, tokenizer, features, *rest)
        writer = whole if config.server_candidates == "student" else None
        more["score"] = lambda added: server_scoring.fill(
            config, wanted, tokenizer, added, *rest, probes=False, writer=writer
        )
    return TeacherAnswers(config, wanted, tokenizer, features, student, world, teacher, **more)
