"""Records and token ids of a run in tables that the first rank of each node makes, and all ranks read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import Config, DataConfig
from ibdistill.data import arrow_tables, loading, stored_features, stored_records
from ibdistill.data.arrow_tables import Making, Table
from ibdistill.data.features import Features
from ibdistill.data.text_checks import check_texts
from ibdistill.data.tokenizing import taught, tokenized_blocks
from ibdistill.data.tokenizing_notes import Notes
from ibdistill.objectives import weights
from ibdistill.runtime import nodes
from ibdistill.runtime.distributed import World
from ibdistill.teacher import references
from ibdistill.teacher.alignment import TextAlignment
from ibdistill.training import run_folder

logger = logging.getLogger("ibdistill")


class Tokenized(NamedTuple):
    """What a run learns from."""

    records: loading.Loaded
    """The training records that can be learned from, with a report of what was cut."""
    features: Features
    """Their token ids."""
    alignment: TextAlignment | None
    """With a teacher of another vocabulary."""
    described: str
    """`run_folder.described` of these."""


def load(data: DataConfig, world: World, *, needs_rationale: bool) -> loading.Loaded:
    """`loading.load`, with the texts on the disk. Collective."""

    def find() -> tuple[str, bool]:
        source = stored_records.source(data)

        def making() -> Making:
            records = loading.streamed(data, needs_rationale=needs_rationale)
            return stored_records.making(records, lambda: stored_records.check_unchanged(data, source))

        return _ensure(data, "records", source | {"needs_rationale": needs_rationale}, making)

    return stored_records.from_table(_table(find, world))


def keep(records: loading.Loaded, data: DataConfig, world: World) -> loading.Loaded:
    """The same records, with their texts on the disk. Collective."""

    def find() -> tuple[str, bool]:
        return _ensure(data, "records", content, lambda: stored_records.making(records))

    content = run_folder.described(records.train) + records.content
    return stored_records.from_table(_table(find, world))


def tokenize(
    config: Config, records: loading.Loaded, tokenizer: PreTrainedTokenizerBase, world: World
) -> Tokenized:
    """Training records (from `load` or `keep`) as a run learns from them. Collective.

    Raises ValueError for text that cannot be trained on.
    """
    streams, alignment = weights.tokenized_streams(config.objective), None
    if config.objective.alignment == "text":
        alignment = TextAlignment(config.teacher.model, tokenizer, config.data, streams)
    reader = alignment.tokenizer if alignment else tokenizer
    of_references = reader if weights.purifies(config.objective) else None
    making = partial(_making, config.data, records, tokenizer, streams, alignment, of_references)

    def find() -> tuple[str, bool]:
        key = stored_records.settings(config.data) | {
            "records": records.content,
            "streams": streams,
            "tokenizer": stored_features.tokenizer_name(tokenizer),
            "teacher": stored_features.tokenizer_name(alignment.tokenizer) if alignment else "",
            "references": references.INTRODUCTION if of_references else "",
        }
        return _ensure(config.data, "tokens", key, making)

    table = _table(find, world)
    features = _features(table, table.about, config.data)
    if alignment:
        alignment.check(features)
    own = f"{table.about['described']}, all splits {records.content}"
    nodes.check_alike(own, "the records or their tokens")
    report = records.report | table.about["report"]
    records = replace(records, train=records.train.take(table.numbers("record")), report=report)
    return Tokenized(records, features, alignment, table.about["described"])


def _making(
    data: DataConfig,
    records: loading.Loaded,
    tokenizer: PreTrainedTokenizerBase,
    streams: Any,
    alignment: TextAlignment | None,
    of_references: PreTrainedTokenizerBase | None,
) -> Making:
    """How the token ids of the training records become a table. `of_references`: the tokenizer of a teacher
    that reads the records' references."""
    prefixes = {name: loading.TASKS[name].prefixes for name in records.test}
    notes = Notes("train", data, tokenizer)
    logger.info("tokenizing %d training records", len(records.train))

    def batches() -> Iterator[pyarrow.RecordBatch]:
        first = kept = 0
        for features in tokenized_blocks(records.train, prefixes, tokenizer, data, notes, streams):
            block = records.train[first : first + len(features)]
            if alignment:
                features = alignment.with_questions(features, block, prefixes)
            if of_references:
                features = references.with_references(features, block, prefixes, of_references, data)
            indices = taught(features)
            yield stored_features.rows(features, first, indices)
            first, kept = first + len(features), kept + len(indices)
        notes.report(first)
        if nothing := first - kept - notes.cut.get("reasonings", 0):
            logger.warning(
                "%d of %d training records teach nothing, as they have no rationale; earlier turns of the "
                "assistant are such records, which data.loss_on last_turn leaves out",
                *(nothing, first),
            )
        if not kept:
            raise ValueError(
                "no training record is left: the rationale of each is longer than data.max_rationale_tokens. "
                "Raise that limit, or take data.long_reasoning cut"
            )

    def about(table: Table) -> dict[str, Any]:
        found = {"cut": notes.cut, "sampled": notes.sampled}
        features = _features(table, found, data)
        train = records.train.take(table.numbers("record"))
        report = check_texts(replace(records, train=train), features, tokenizer, data)
        if too_long := notes.cut.get("reasonings"):
            report = {"train/long_reasoning": too_long} | report
        return found | {"report": report, "described": run_folder.described(train, features)}

    return Making(batches(), len(records.train), about)


def _features(table: Table, about: dict[str, Any], data: DataConfig) -> Features:
    chat = data.format == "chat"
    return stored_features.features_of(table, about["cut"], sampled=about["sampled"], whole_prompts=chat)


def _ensure(data: DataConfig, kind: str, key: Any, make: Callable[[], Making]) -> tuple[str, bool]:
    """The folder of a table that is there now, and whether it was made now."""
    folder = arrow_tables.folder_of(data.cache_dir, kind, key)

    def noted() -> Making:
        making = make()
        return making._replace(finish=lambda table: making.finish(table) | {"warnings": warnings})

    with _warnings() as warnings:
        return str(folder), arrow_tables.ensure(folder, key, noted)


def _table(find: Callable[[], tuple[str, bool]], world: World) -> Table:
    """The table that `find` finds or makes on the first rank of each node; the warnings that were given when
    it was made are given again. Collective."""
    folder, is_new = nodes.run_on_each(world, find)
    table = arrow_tables.opened(Path(folder))
    if world.rank == 0 and not is_new:
        logger.info("data: %s is there already", folder)
        for message in table.about["warnings"]:
            logger.warning("%s", message)
    return table


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The warnings that are logged within the block."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
