"""The teacher writes rationales, and labels, for training records that lack them or for all.

All of it happens before the first training step: were scoring and writing done in turns, a sharded teacher
would lose its prefetch trace at every change from one to the other. `generation` asks the teacher; this
module decides which records it is asked about, and what becomes of its texts.

The texts are kept (`texts`), so that an interrupted run goes on where it stopped and the teacher is never
asked about the same data twice. Parsing and `teacher.keep` happen when the texts are read, so a change of
their rules needs no new texts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import Config
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.models import families, presets
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.runtime import distributed, files
from ibdistill.runtime.distributed import StopRequest, World
from ibdistill.teacher import server_writing
from ibdistill.teacher.generation import Writer, check_unparsed
from ibdistill.teacher.teacher import Teacher
from ibdistill.teacher.texts import (
    FORMAT,
    Texts,
    key_of,
    open_cache,
    parse,
    prompts_of,
    read_template,
    read_texts,
)
from ibdistill.teacher.vocabulary import PROBE, own_tokenizer

logger = logging.getLogger("ibdistill")


class Written(NamedTuple):
    """The result of `write`."""

    records: list[Record]
    """The records to train on; those that the teacher was not asked about are as they were."""
    counts: dict[str, int]
    """TASK/train/teacher_WHAT: asked; parsed; agrees (with the ground truth); kept."""
    teacher: Teacher | None
    """The teacher, loaded and done with writing; None if it was not needed or is not wanted further."""


def write(
    config: Config,
    records: Sequence[Record],
    world: World,
    stop: StopRequest,
    *,
    wanted: Wanted | None = None,
    student: tuple[PreTrainedTokenizerBase, int] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Written:
    """Let the teacher write about `records`, or read what it wrote. Collective.

    Args:
        wanted: what the teacher will be asked for after it has written; None: it is closed.
        student: the student's tokenizer and the number of rows of its head, which a teacher that goes on to
            answer must match.
        part: (i, n): ask only about the i-th of n shares, because other jobs ask about the rest. Records that
            nobody has asked about yet are then left out of the result.

    Raises:
        ValueError: as `Teacher` raises it; the template has no question; the cache was written by something
            else; too many answers have no rationale and label.
        SystemExit: a signal asked the run to stop; the teacher will not be asked again about what is written.
    """
    settings = config.teacher
    template = read_template(config)
    folder = config.rationale_folder()
    distributed.run_on_rank_0(lambda: open_cache(folder, fingerprint(config, template)))
    asked = [r for r in records if settings.rationales == "all" or not (r.rationale and r.label)]
    prompts = {key_of(prompt): prompt for r in asked for prompt in [prompts_of(r, template)]}
    texts = distributed.run_on_rank_0(lambda: read_texts(folder))
    missing = [key for key in prompts if key not in texts and int(key, 16) % part[1] == part[0]]
    loaded = None
    if missing:
        if settings.placement == "cache":
            raise ValueError(
                f"teacher.rationale_cache {folder} lacks {len(missing)} of {len(prompts)} records; "
                "let the teacher write in another placement, or with ibdistill/write_rationales.py"
            )
        by_key = {key_of(prompts_of(r, template)): r for r in asked}
        longest_first = sorted(missing, key=lambda key: (-len(by_key[key].question), key))
        todo = [(by_key[key], key, prompts[key]) for key in longest_first]
        if settings.placement == "server":
            texts |= server_writing.ServerWriter(config, folder).write_all(todo, stop)
        else:
            tokenizer = own_tokenizer(settings.model)
            asks = replace(wanted, text=True) if wanted else Wanted(questions=False, targets=False, text=True)
            loaded = Teacher(settings, asks, tokenizer, None, world)
            if wanted and student:
                loaded.pair(*student)
            with loaded.text_model(tokenizer) as model:
                writer = Writer(config, model, tokenizer, template, folder, world)
                texts |= writer.write_all(todo, stop)
            if not wanted:
                del model, writer
                loaded.close()
                loaded = None
    kept, counts = read(config, records, texts, template, partial=part[1] > 1)
    if world.rank == 0 and part[1] == 1:
        files.write_json(folder / "summary.json", {"teacher.model": settings.model, "counts": counts})
    logger.info("teacher's text: %s (%s)", ", ".join(f"{k} {n}" for k, n in counts.items()), folder)
    return Written(kept, counts, loaded)


def read(
    config: Config,
    records: Sequence[Record],
    texts: dict[str, Texts],
    template: str,
    *,
    partial: bool = False,
) -> tuple[list[Record], dict[str, int]]:
    """The records with what the teacher wrote about them, and the counts of `Written.counts`.

    A record is left out if the teacher was asked about it and gave no rationale and label, or, with
    `teacher.keep` agree, another label than the ground truth. With `partial`, so is one that the teacher was
    not asked about yet. Raises ValueError if too many answers have no rationale and label, or no record is
    left.
    """
    settings = config.teacher
    counts: Counter[str] = Counter()
    kept, bad = [], []
    for record in records:
        if settings.rationales != "all" and record.rationale and record.label:
            kept.append(record)
            continue
        answer = texts.get(key_of(prompts_of(record, template)))
        if answer is None and partial:
            continue
        name = f"{record.task}/train/teacher_"
        counts[f"{name}asked"] += 1
        parts = parse(answer, record)
        if parts is None:
            bad.append((record, answer))
            continue
        counts[f"{name}parsed"] += 1
        rationale, label = parts
        agrees = TASKS[record.task].is_correct(label, record)
        counts[f"{name}agrees"] += agrees
        if agrees or settings.keep == "all":
            counts[f"{name}kept"] += 1
            if settings.rationales == "missing":
                rationale = record.rationale or rationale
            own = config.data.label_source != "teacher"
            kept.append(replace(record, rationale=rationale, label=record.label if own else label))
    asked = sum(n for name, n in counts.items() if name.endswith("asked"))
    check_unparsed(config, asked, bad)
    if not kept and not partial:
        raise ValueError(
            f"teacher.keep {settings.keep} leaves none of the {asked} records that the teacher was asked "
            f"about ({dict(counts)}); take teacher.keep all, or a better teacher"
        )
    return kept, dict(counts)


def fingerprint(config: Config, template: str) -> dict[str, Any]:
    """Everything that a text depends on besides its prompts.

    The tokenizer's chat template is none of it, because prompts are not made with it.
    """
    settings = config.teacher
    if settings.placement == "server":
        return server_writing.fingerprint(config, template)
    if settings.model not in presets.PRESETS:
        families.load_config(settings.model, "teacher.model")
    tokenizer = own_tokenizer(settings.model)
    cuts = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items())]
    found = {
        "format": FORMAT,
        "teacher": families.identity(settings.model),
        "tokenizer": files.digest(repr([cuts, tokenizer(PROBE).input_ids]).encode()).hex(),
        "precision": "8bit" if settings.load_in_8bit else settings.precision,
        "template": template or "prefixes",
        "temperature": settings.temperature,
        "max_question_tokens": config.data.max_question_tokens,
        "max_label_tokens": config.data.max_label_tokens,
        "max_rationale_tokens": config.data.max_rationale_tokens,
    }
    return found | ({"seed": config.run.seed} if settings.temperature else {})
