"""From records to token ids: each text is encoded once, at the start, and stays in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data import chat_features, reasoning, token_ids
from ibdistill.data.features import Features, numbered, samples_of
from ibdistill.data.ragged import Ragged
from ibdistill.data.records import SEGMENTS, STREAMS, Record

logger = logging.getLogger("ibdistill")

Encode = Callable[[Sequence[str], PreTrainedTokenizerBase], list[list[int]]]


def tokenize(
    records: Sequence[Record],
    prefixes: dict[str, dict[str, str]],
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

    Raises ValueError as `reasonings` does.
    """
    if config.format == "chat":
        return _in_chat(records, prefixes, tokenizer, config, split, streams)
    cut: dict[str, int] = {}

    def table(texts: list[str], encode: Encode, limit: int, what: str) -> Ragged:
        encoded = encode(texts, tokenizer)
        cut[what] = sum(len(ids) > limit for ids in encoded)
        if cut[what]:
            message = "%s: %d of %d %s are longer than %d tokens and were cut"
            logger.warning(message, split, cut[what], len(texts), what, limit)
        _report_unknown(texts, encoded, tokenizer, f"{split}: %d of %d {what}")
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
        found |= reasonings(records, tokenizer, config, split, cut)
    return Features(
        ids=[record.id for record in records],
        groups=numbered(record.task for record in records),  # in the order of data.task
        questions=of_stream,
        targets=found,
        samples=samples_of(records),
        cut=cut,
    )


def _in_chat(
    records: Sequence[Record],
    prefixes: dict[str, dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    split: str,
    streams: Sequence[str],
) -> Features:
    """`tokenize` for `data.format` chat."""
    tables = chat_features.tables(records, prefixes, tokenizer, config, streams)
    limits = {"labels": config.max_label_tokens, "rationales": config.max_rationale_tokens}
    for what, number in tables.cut.items():
        if number:
            message = "%s: %d of %d %s are longer than %d tokens and were cut"
            limit = limits.get(what, config.max_question_tokens)
            logger.warning(message, split, number, len(records), what, limit)
    for stream in tables.prompts:
        texts = [record.question for record in records]
        said = token_ids.text_ids(texts, tokenizer)  # a template may hold the unknown token as its BOS
        _report_unknown(texts, said, tokenizer, f"{split}: %d of %d {stream} questions")
    for segment, targets in tables.targets.items():
        texts = [r.label if segment in ("predict", "answer") else r.rationale for r in records]
        _report_unknown(texts, targets, tokenizer, f"{split}: %d of %d targets of {segment}")
    cut = tables.cut
    if "reason" in streams:
        cut = cut | {"reasonings": len(tables.long)}
        _report_long(tables.long, records, config, split)
    return Features(
        ids=[record.id for record in records],
        groups=numbered(record.task for record in records),
        questions={stream: Ragged(own) for stream, own in tables.prompts.items()},
        targets={segment: Ragged(own) for segment, own in tables.targets.items()},
        whole_prompts=True,
        samples=samples_of(records),
        cut=cut,
    )


def reasonings(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    split: str,
    cut: dict[str, int],
) -> dict[str, Ragged]:
    """The segments of the reason stream; too long ones are counted in `cut` and, unless they are refused,
    warned of. Both segments of a record without a rationale, or with one that is dropped, are empty.

    Raises ValueError for a marker that the tokenizer cannot say or that fills the limit, and with
    `data.long_reasoning` refuse for a rationale beyond the limit.
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
        _report_unknown(texts, rationales, tokenizer, f"{split}: %d of %d rationales")
        _report_unknown(labels, answers, tokenizer, f"{split}: %d of %d labels")
        cut["answers"] = cut.get("answers", 0) + sum(len(ids) > config.max_label_tokens for ids in answers)
        for i, ids, answer in zip(mine, rationales, answers, strict=True):
            if len(ids) + len(between) > limit:
                long.append((i, len(ids) + len(between)))
                if what == "drop":
                    continue
            kept = ids[: limit - len(between)] + between
            rows[i] = kept, token_ids.cut(answer, config.max_label_tokens)
    cut["reasonings"] = len(long)
    if cut.get("answers"):
        message = "%s: %d of %d answers of the reason stream are longer than %d tokens and were cut"
        logger.warning(message, split, cut["answers"], len(records), config.max_label_tokens)
    _report_long(long, records, config, split)
    return {name: Ragged(row[part] for row in rows) for part, name in enumerate(SEGMENTS["reason"])}


def _report_long(
    long: list[tuple[int, int]], records: Sequence[Record], config: DataConfig, split: str
) -> None:
    """Warn of the rationales of a reason stream that are too long, as (record, tokens), or raise
    ValueError with `data.long_reasoning` refuse."""
    limit, what = config.max_rationale_tokens, config.long_reasoning
    if long:
        index, tokens = long[0]
        message = (
            f"{split}: {len(long)} of {len(records)} rationales of the reason stream are longer than {limit} "
            f"tokens (data.max_rationale_tokens, with the marker before the answer); the first has {tokens} "
            f"({records[index].id[:100]})"
        )
        if what == "refuse":
            raise ValueError(f"{message}. Raise the limit, or take data.long_reasoning drop or cut")
        done = {"drop": "these records do not train it", "cut": "they lost their end"}[what]
        logger.warning("%s: %s (data.long_reasoning %s)", message, done, what)


def drop_untaught(records: list[Record], features: Features) -> tuple[list[Record], Features]:
    """The records that have something to learn from, and their tokens: all but those whose only stream is
    empty. Raises ValueError if none is left."""
    taught = np.flatnonzero(sum(table.lengths for table in features.targets.values()))
    if len(taught) == len(records):
        return records, features
    if not len(taught):
        raise ValueError(
            "no training record is left: the rationale of each is longer than data.max_rationale_tokens. "
            "Raise "
            "that limit, or take data.long_reasoning cut"
        )
    return [records[i] for i in taught], features.take(taught.tolist())


def _report_unknown(
    texts: list[str], encoded: list[list[int]], tokenizer: PreTrainedTokenizerBase, these: str
) -> None:
    """Warn of texts with characters that have no token. `these` takes their number and that of all texts."""
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.eos_token_id):  # GPT-2's tokens spell any text
        return
    found = [text for text, ids in zip(texts, encoded, strict=True) if unknown in ids]
    if found:
        logger.warning(
            f"{these} have characters that the tokenizer does not know; the model sees %s in their place "
            "and cannot write them. The first is %.200r",
            len(found),
            len(texts),
            tokenizer.unk_token,
            found[0],
        )
