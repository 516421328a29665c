"""The teacher writes: rationales, and labels, for training records that lack them, or for all.

It is asked in one of two ways:

- as a student is, through the task's two prefixes: two decodings, label and rationale;
- with `teacher.template`, as a model that was never trained on the task: one decoding, which
  the task's parser for LLM text takes apart.

All of it happens before the first training step. Scoring and writing in turns would cost a
sharded teacher its prefetch trace at every change.

What it wrote is kept (`texts`), so that an interrupted run goes on where it stopped and
the same data is never asked about twice. Parsing and `teacher.keep` happen when the texts are read,
so other rules need no new texts.

A sampled text depends on `run.seed` and the record, not on the batch or on the number of ranks
(but for rounding: padding changes the last bits of a model's outputs).
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import Config
from ibdistill.data import token_ids
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.models import decoding, families, presets
from ibdistill.models.decoding import Sampling
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.runtime import distributed, files
from ibdistill.runtime.distributed import StopRequest, World
from ibdistill.teacher.teacher import SHARDED, Teacher, own_tokenizer
from ibdistill.teacher.texts import (
    FORMAT,
    Texts,
    append,
    key_of,
    open_cache,
    parse,
    prompts_of,
    read_template,
    read_texts,
    template_prompt,
)

logger = logging.getLogger("ibdistill")

ENOUGH = 64
"""Answers after which the share of unparsable ones is looked at before all are there."""


class Written(NamedTuple):
    """What came of it."""

    records: list[Record]
    """The records to train on; those that the teacher was not asked about are as they were."""
    counts: dict[str, int]
    """TASK/train/teacher_WHAT: asked; parsed; agrees (with the ground truth); kept."""
    teacher: Teacher | None
    """Loaded, and in between done with writing; None if it was not needed."""


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
        wanted: what else a teacher that is loaded will be asked for.
        student: its tokenizer and the rows of its head, for a teacher that has to match them.
        part: (i, n): ask about the i-th of n shares only, of which the other jobs do the rest; what
            nobody has written about yet is then left out.

    Raises:
        ValueError: see `Teacher`; a template without a question; a cache of something else; too many
            answers without a rationale and label.
        SystemExit: a signal came; what is written will not be asked again.
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
        tokenizer = own_tokenizer(settings.model)
        asks = replace(wanted, text=True) if wanted else Wanted(questions=False, targets=False, text=True)
        loaded = Teacher(settings, asks, tokenizer, None, world)
        if wanted and student:
            loaded.pair(*student)
        by_key = {key_of(prompts_of(r, template)): r for r in asked}
        longest_first = sorted(missing, key=lambda key: (-len(by_key[key].question), key))
        with loaded.text_model(tokenizer) as model:
            writer = _Writer(config, model, tokenizer, template, folder, world)
            texts |= writer.write_all([(by_key[key], key, prompts[key]) for key in longest_first], stop)
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
    """The records with what the teacher wrote about them, and counts (`Written.counts`).

    A record that was asked about and gets no rationale and label, or with `teacher.keep` agree another
    label than the ground truth, is left out. Raises ValueError if too many have none, or nothing is left.
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
    _check_share(config, asked, bad)
    if not kept and not partial:
        raise ValueError(
            f"teacher.keep {settings.keep} leaves none of the {asked} records that the teacher was asked "
            f"about ({dict(counts)}); take teacher.keep all, or a better teacher"
        )
    return kept, dict(counts)


def fingerprint(config: Config, template: str) -> dict[str, Any]:
    """What a text depends on, besides its prompts."""
    settings = config.teacher
    if settings.model not in presets.PRESETS:
        families.load_config(settings.model, "teacher.model")
    found = {
        "format": FORMAT,
        "teacher": families.identity(settings.model),
        "precision": "8bit" if settings.load_in_8bit else settings.precision,
        "template": template or "prefixes",
        "temperature": settings.temperature,
        "max_question_tokens": config.data.max_question_tokens,
        "max_label_tokens": config.data.max_label_tokens,
        "max_rationale_tokens": config.data.max_rationale_tokens,
    }
    return found | ({"seed": config.run.seed} if settings.temperature else {})


class _Writer:
    """Asks the teacher for its texts, batch by batch, and appends them to this rank's file."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        folder: Path,
        world: World,
    ) -> None:
        self._config, self._model, self._tokenizer, self._world = config, model, tokenizer, world
        self._sharded = config.teacher.placement in SHARDED
        data = config.data
        self._template = template
        self._prompt_tokens = data.max_question_tokens
        limits = {"predict": data.max_label_tokens, "explain": data.max_rationale_tokens}
        if template:
            self._prompt_tokens += len(tokenizer(template).input_ids)
            limits = {"answer": sum(limits.values())}
        self._limits = limits
        self._folder = folder
        self._path = folder / f"rank-{world.rank:05d}-{uuid.uuid4().hex[:12]}.jsonl"

    def write_all(self, todo: list[tuple[Record, str, Texts]], stop: StopRequest) -> dict[str, Texts]:
        """Ask about all of them, round by round; key -> texts. Collective, and the same list on all ranks.

        In each round every rank has a batch, or at the end perhaps none: then a sharded teacher is asked
        something for nothing, since all ranks take part in each of its forwards.
        """
        self._report_cuts([record for record, _, _ in todo])
        size, ranks = self._config.teacher.write_batch_size, self._world.size
        written: dict[str, Texts] = {}
        unparsed: list[tuple[Record, Texts]] = []
        for start in range(0, len(todo), size * ranks):
            batch = todo[start : start + size * ranks][self._world.rank :: ranks]
            rows, error = [], ""
            if batch or self._sharded:
                texts = self._ask(batch or todo[:1])
                rows = [(*item[:2], text) for item, text in zip(batch, texts, strict=False)]
                error = self._keep(rows)
            for rows_, error_ in distributed.gather_objects((rows, error)):
                if error_:
                    raise ValueError(error_)
                written |= {key: texts for _, key, texts in rows_}
                unparsed += [(record, texts) for record, _, texts in rows_ if parse(texts, record) is None]
            logger.info("teacher's text: %d of %d, %d unparsable", len(written), len(todo), len(unparsed))
            if len(written) >= ENOUGH:
                _check_share(self._config, len(written), unparsed)
            if code := stop.exit_code():
                logger.warning("stopped by a signal after %d records, exit code %d", len(written), code)
                dist.barrier()
                sys.exit(code)
        return written

    def _ask(self, batch: list[tuple[Record, str, Texts]]) -> list[Texts]:
        """The texts for one batch of (record, key, prompts)."""
        texts: list[Texts] = [{} for _ in batch]
        for name, limit in self._limits.items():
            decoded = decoding.decode(
                self._model,
                self._tokenizer,
                [self._prompt(record, prompts[name]) for record, _, prompts in batch],
                max_question_tokens=self._prompt_tokens,
                max_new_tokens=limit,
                device=self._world.device,
                batch_size=len(batch),
                as_written=name == "answer",
                sampling=self._sampling([f"{key} {name}" for _, key, _ in batch], limit),
                synced=self._sharded,
            )
            for text, answer in zip(texts, decoded, strict=True):
                text[name] = answer.text
        return texts

    def _prompt(self, record: Record, text: str) -> str:
        """A prompt as the teacher gets it, from its text of `prompts_of`."""
        limit = self._config.data.max_question_tokens
        return template_prompt(record, self._template, self._tokenizer, limit) if self._template else text

    def _report_cuts(self, records: Sequence[Record]) -> None:
        limit = self._config.data.max_question_tokens
        encoded = token_ids.question_ids([record.question for record in records], self._tokenizer)
        if cut := sum(len(ids) > limit for ids in encoded):
            message = "teacher's text: %d of %d questions are longer than %d of its tokens and are cut"
            logger.warning(message, cut, len(records), limit)

    def _sampling(self, keys: Sequence[str], limit: int) -> Sampling | None:
        if not self._config.teacher.temperature:
            return None
        seed = self._config.run.seed
        draws = [_generator(f"{seed} {key}").random(limit, dtype=np.float32) for key in keys]
        return Sampling(self._config.teacher.temperature, torch.from_numpy(np.stack(draws)))

    def _keep(self, rows: list[tuple[Record, str, Texts]]) -> str:
        """Write them out; what went wrong."""
        try:
            append(self._path, rows)
        except OSError as error:
            return (
                f"teacher.rationale_cache {self._path.parent} takes no more texts: {error.strerror}; "
                "free some space. What was written before is good, and the same command goes on from there"
            )
        return ""


def _generator(name: str) -> np.random.Generator:
    seed = int.from_bytes(files.digest(name.encode(), 16), "little")
    return np.random.Generator(np.random.PCG64(seed))


def _check_share(config: Config, asked: int, unparsed: Sequence[tuple[Record, Texts]]) -> None:
    """Raise ValueError, with two examples, if too many answers cannot be read."""
    settings = config.teacher
    if len(unparsed) <= settings.max_unparsed * asked:
        return
    examples = "; ".join(
        f"asked {record.question[:200]!r} it wrote { ({name: text[:200] for name, text in texts.items()}) }"
        for record, texts in unparsed[:2]
    )
    raise ValueError(
        f"{len(unparsed)} of {asked} answers of teacher.model {settings.model} "
        f"({len(unparsed) / asked:.0%}) have no rationale and label, more than teacher.max_unparsed "
        f"{settings.max_unparsed}. For example, {examples}. Change teacher.template or the model, with "
        "another teacher.rationale_cache, or raise teacher.max_unparsed"
    )
