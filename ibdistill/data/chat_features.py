"""The prompts and targets of records in format chat, within the limits of the data settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data import token_ids
from ibdistill.data.chat import Chat, Row
from ibdistill.data.records import Record

Ids = list[int]
Prefixes = Mapping[str, Mapping[str, str]]


class Tables(NamedTuple):
    """Token ids of records, and what did not fit."""

    prompts: dict[str, list[Ids]]
    """Stream -> whole prompts."""
    targets: dict[str, list[Ids]]
    """Segment -> targets; empty where a record has none."""
    cut: dict[str, int]
    """How many of each kind of text lost something, under the names of `Features.cut`."""
    long: list[tuple[int, int]]
    """The records whose rationale is too long for the reason stream, and its tokens."""


def user_text(record: Record, stream: str, prefix: str) -> str:
    """What the user says: in the reason stream the question alone."""
    question = record.question.replace(token_ids.JOINT, "\n")
    return question if stream == "reason" else prefix + question


def conversations(
    records: Sequence[Record], stream: str, prefixes: Sequence[str], chat: Chat, limit: int
) -> tuple[list[tuple[str, tuple, str]], list[int]]:
    """(system, history, user's text) of each record, and the indices of those that lost something.

    `limit`: the most tokens of the question, the turns before it and a system message of the record's own.
    The template's tokens around earlier turns count, and those around the question do not. A longer
    conversation loses its oldest turns, two at a time, and then the end of its question.

    Raises ValueError for a system message that leaves no room for a question.
    """
    per_turn = _per_turn(chat) if any(record.history for record in records) else 0
    texts = [chat.defused(user_text(r, stream, p)) for r, p in zip(records, prefixes, strict=True)]
    found, cut = [], []
    for i, (record, ids) in enumerate(zip(records, token_ids.text_ids(texts, chat.tokenizer), strict=True)):
        history = record.history
        system = history[0][1] if history and history[0][0] == "system" else ""
        history = history[1:] if system else history
        said = token_ids.text_ids([system, *(text + thought for _, text, thought in history)], chat.tokenizer)
        first, *lengths = map(len, said)
        room, dropped = limit - first, 0
        if room < 1:
            raise ValueError(
                f"the system message of {record.id[:100]} has {first} tokens, and data.max_question_tokens "
                f"is {limit}, which leaves none for the question; raise it, or shorten the message"
            )
        costs = [length + per_turn for length in lengths]
        while dropped < len(history) and len(ids) + sum(costs[dropped:]) > room:
            dropped += 2
        if dropped or len(ids) > room:
            cut.append(i)
        if len(ids) > room:
            texts[i] = token_ids.read_back([ids[:room]], chat.tokenizer)[0]
        found.append((system, history[dropped:], texts[i]))
    return found, cut


def _per_turn(chat: Chat) -> int:
    """How many tokens the template puts around a turn before the last one, at most."""
    talk = (("user", "a", ""), ("assistant", "a", "")) * 2
    short, long = map(len, chat.prompts([("", talk[:2], "a"), ("", talk, "a")], thinks=False))
    return -(-(long - short - 2 * len(token_ids.text_ids(["a"], chat.tokenizer)[0])) // 2)


def prompts(
    records: Sequence[Record],
    stream: str,
    prefixes: Prefixes,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> list[Ids]:
    """What a student is asked about each record in a stream."""
    chat = Chat.of(tokenizer, config, thinks=stream == "reason")
    before = [prefixes[record.task][stream] for record in records]
    asked, _ = conversations(records, stream, before, chat, config.max_question_tokens)
    return chat.prompts(asked, thinks=stream == "reason")


def tables(
    records: Sequence[Record],
    prefixes: Prefixes,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    streams: Sequence[str],
) -> Tables:
    """The token ids of all streams. Raises ValueError as `Chat.of` and `Chat.rows` do, and for tags that fill
    `data.max_rationale_tokens`."""
    found = Tables({}, {}, {}, [])
    for stream in streams:
        chat = Chat.of(tokenizer, config, thinks=stream == "reason")
        before = [prefixes[record.task][stream] for record in records]
        asked, cut = conversations(records, stream, before, chat, config.max_question_tokens)
        found.cut[f"{stream} questions"] = len(cut)
        rows = _rows(chat, records, asked, stream)
        found.prompts[stream] = [row.prompt for row in rows]
        if stream == "reason":
            parts = [_fit(i, row, config, found.long) for i, row in enumerate(rows)]
            found.targets["rationale"], found.targets["answer"] = ([p[i] for p in parts] for i in (0, 1))
            continue
        limit = config.max_label_tokens if stream == "predict" else config.max_rationale_tokens
        answers = [row.answer for row in rows]
        found.cut["labels" if stream == "predict" else "rationales"] = sum(len(a) > limit for a in answers)
        found.targets[stream] = [token_ids.cut(answer, limit) for answer in answers]
    return found


def _rows(
    chat: Chat, records: Sequence[Record], asked: Sequence[tuple[str, tuple, str]], stream: str
) -> list[Row]:
    """The rows of a stream; of a record without a target there is the prompt alone."""
    said = []
    for record, conversation in zip(records, asked, strict=True):
        answer = record.rationale if stream == "explain" else record.label
        said.append((*conversation, record.rationale if stream == "reason" else None, answer))
    taught = [i for i, (*_, thought, answer) in enumerate(said) if answer and thought != ""]
    untaught = [i for i in range(len(said)) if i not in set(taught)]
    rows = dict(zip(taught, chat.rows([said[i] for i in taught]), strict=True))
    alone = chat.prompts([asked[i] for i in untaught], thinks=stream == "reason")
    rows |= {i: Row(prompt, [], 0, []) for i, prompt in zip(untaught, alone, strict=True)}
    return [rows[i] for i in range(len(said))]


def _fit(index: int, row: Row, config: DataConfig, long: list[tuple[int, int]]) -> tuple[Ids, Ids]:
    """Rationale and answer of the reason stream, cut to their limits as `data.long_reasoning` says. A
    record beyond the limit is added to `long`."""
    rationale, limit = row.rationale, config.max_rationale_tokens
    if len(rationale) > limit:
        if row.tail >= limit:
            raise ValueError(
                f"data.max_rationale_tokens is {limit}, and the tag behind a rationale takes {row.tail} of "
                "them; raise it"
            )
        long.append((index, len(rationale)))
        if config.long_reasoning == "drop":
            return [], []
        rationale = rationale[: limit - row.tail] + rationale[len(rationale) - row.tail :]
    return rationale, token_ids.cut(row.answer, config.max_label_tokens)
