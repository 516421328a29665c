"""From records to token ids: each text is encoded once, at the start, a block of records at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data import chat_features, reasoning, token_ids
from ibdistill.data.arrow_tables import blocks
from ibdistill.data.features import Features, Numbers
from ibdistill.data.ragged import Ragged
from ibdistill.data.records import SEGMENTS, STREAMS, Record
from ibdistill.data.tokenizing_notes import Notes

Encode = Callable[[Sequence[str], PreTrainedTokenizerBase], list[list[int]]]
Prefixes = dict[str, dict[str, str]]


def tokenize(
    records: Sequence[Record],
    prefixes: Prefixes,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    split: str = "train",
    streams: Sequence[str] = STREAMS,
) -> Features:
    """Token ids of the streams, as `token_ids` makes them; `prefixes` maps task -> stream -> prefix.

    Text beyond the limits of `config` is cut; of the reason stream's rationales `data.long_reasoning` says
    what becomes. How many texts were too long, and how many hold characters that the tokenizer does not know,
    is reported under the name `split`. A record whose reasoning is missing or dropped has no tokens in that
    stream.

    Raises ValueError as `_reasonings` does, and with `data.long_reasoning` refuse for a rationale beyond the
    limit.
    """
    notes = Notes(split, config, tokenizer)
    parts = list(tokenized_blocks(records, prefixes, tokenizer, config, notes, streams))
    notes.report(len(records))
    return Features.joined(parts, notes.cut, sampled=notes.sampled)


def tokenized_blocks(
    records: Sequence[Record],
    prefixes: Prefixes,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    notes: Notes,
    streams: Sequence[str],
) -> Iterator[Features]:
    """`tokenize` block by block of the records; what there is to report is counted in `notes`."""
    numbers, encode = Numbers(), _in_chat if config.format == "chat" else _plain
    for block in blocks(records):
        notes.sampled |= any(record.sample_of for record in block)
        questions, targets = encode(block, prefixes, tokenizer, config, notes, streams)
        yield Features(
            ids=[record.id for record in block],
            groups=numbers.groups(block),  # in the order of data.task
            questions=questions,
            targets=targets,
            whole_prompts=config.format == "chat",
            samples=numbers.samples(block),
        )


Tables = tuple[dict[str, Ragged], dict[str, Ragged]]


def _plain(
    records: Sequence[Record],
    prefixes: Prefixes,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    notes: Notes,
    streams: Sequence[str],
) -> Tables:
    """Questions and targets of a block for `data.format` plain."""

    def table(texts: list[str], encode: Encode, limit: int, what: str) -> Ragged:
        encoded = encode(texts, tokenizer)
        notes.count_cut(what, sum(len(ids) > limit for ids in encoded))
        notes.count_unknown(what, texts, encoded)
        return Ragged(token_ids.cut(ids, limit) for ids in encoded)

    def questions(stream: str) -> Ragged:
        texts = [prefixes[record.task][stream] + record.question for record in records]
        return table(texts, token_ids.question_ids, config.max_question_tokens, f"{stream} questions")

    def targets(name: str, limit: int) -> Ragged:
        return table([getattr(record, name) for record in records], token_ids.target_ids, limit, f"{name}s")

    of_stream = {stream: questions(stream) for stream in streams}
    found = {}
    if "predict" in streams:
        found["predict"] = targets("label", config.max_label_tokens)
    if "explain" in streams:
        found["explain"] = targets("rationale", config.max_rationale_tokens)
    if "reason" in streams:
        found |= _reasonings(records, tokenizer, config, notes)
    return of_stream, found


def _in_chat(
    records: Sequence[Record],
    prefixes: Prefixes,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    notes: Notes,
    streams: Sequence[str],
) -> Tables:
    """The same for `data.format` chat."""
    tables = chat_features.tables(records, prefixes, tokenizer, config, streams)
    for what, number in tables.cut.items():
        notes.count_cut(what, number)
    for stream in tables.prompts:
        texts = [record.question for record in records]
        said = token_ids.text_ids(texts, tokenizer)  # a template may hold the unknown token as its BOS
        notes.count_unknown(f"{stream} questions", texts, said)
    for segment, targets in tables.targets.items():
        texts = [r.label if segment in ("predict", "answer") else r.rationale for r in records]
        notes.count_unknown(f"targets of {segment}", texts, targets)
    if "reason" in streams:
        notes.count_long(tables.long, records)
    found = {segment: Ragged(own) for segment, own in tables.targets.items()}
    return {stream: Ragged(own) for stream, own in tables.prompts.items()}, found


def _reasonings(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DataConfig, notes: Notes
) -> dict[str, Ragged]:
    """The segments of the reason stream. Both of a record without a rationale, or with one that is dropped,
    are empty.

    Raises ValueError for a marker that the tokenizer cannot say or that fills the limit.
    """
    limit, what = config.max_rationale_tokens, config.long_reasoning
    rows: list[tuple[list[int], list[int]]] = [([], [])] * len(records)
    long = []
    for task in dict.fromkeys(record.task for record in records):
        mine = [i for i, record in enumerate(records) if record.task == task and record.rationale]
        texts = [records[i].rationale for i in mine]
        labels = [records[i].label for i in mine]
        marker = reasoning.marker_of(task, config)
        rationales, answers, between = reasoning.segment_ids(texts, labels, marker, tokenizer)
        if len(between) >= limit:
            raise ValueError(
                f"data.max_rationale_tokens is {limit}, and the marker {marker[:100]!r} before the answer "
                "takes "
                f"{len(between)} of them; raise it, or shorten data.answer_marker"
            )
        notes.count_unknown("rationales", texts, rationales)
        notes.count_unknown("labels", labels, answers)
        notes.count_cut("answers", sum(len(ids) > config.max_label_tokens for ids in answers))
        for i, ids, answer in zip(mine, rationales, answers, strict=True):
            if len(ids) + len(between) > limit:
                long.append((i, len(ids) + len(between)))
                if what == "drop":
                    continue
            kept = ids[: limit - len(between)] + between
            rows[i] = kept, token_ids.cut(answer, config.max_label_tokens)
    notes.count_long(long, records)
    return {name: Ragged(row[part] for row in rows) for part, name in enumerate(SEGMENTS["reason"])}


def taught(features: Features) -> np.ndarray:
    """The indices of the records that have something to learn from: all but those whose only stream is
    empty."""
    return np.flatnonzero(sum(table.lengths for table in features.targets.values()))
