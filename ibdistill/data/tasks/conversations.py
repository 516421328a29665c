"""The field `messages` of a record, and records that stand for several: turns of a conversation, rationales.

{"messages": [{"role": "user", "content": "3 + 4 ?"}, {"role": "assistant", "content": "7"}]}
{"question": "3 + 4 ?", "label": "7", "rationales": ["3 and 4 make 7.", "Count on from 3: 4, 5, 6, 7."]}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ibdistill.config.sections import DataConfig
from ibdistill.data import chat
from ibdistill.data.json_rows import field_text, shown
from ibdistill.data.lazy import Lazy
from ibdistill.data.records import Record

MESSAGES, RATIONALES = "messages", "rationales"
Turn = tuple[str, str, str]


class Conversation(NamedTuple):
    """The last question of a conversation, and what was said before."""

    history: tuple[Turn, ...]
    question: str
    label: str
    rationale: str


def conversation(row: dict[str, Any], config: DataConfig) -> Conversation:
    """A row's conversation. The assistant's rationale is its `reasoning_content`, or stands between the tags
    before its text.

    Raises ValueError if it is none that ends with the assistant, if the row says elsewhere too what the
    assistant answers, or if there is more than one question where `data.format` is plain.
    """
    value = row[MESSAGES]
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {MESSAGES!r} is {shown(value)}; it must be a list of messages")
    turns = [_turn(message, i, config) for i, message in enumerate(value)]
    roles = [role for role, *_ in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken and spoken[-1] == "user":
        raise ValueError(
            f"field {MESSAGES!r} ends with a user's turn ({shown(turns[-1][1])}), to which there is no "
            "answer to learn; leave the turn out, or add the assistant's"
        )
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(
            f"field {MESSAGES!r} has the roles {shown(', '.join(roles))}; after a system message, which may "
            "be left out, user and assistant must take turns"
        )
    *history, (_, question, _), (_, label, rationale) = turns
    again = [config.label_field, config.rationale_field, *([RATIONALES] if rationale else [])]
    if beside := [name for name in again if row.get(name) is not None]:
        raise ValueError(
            f"the fields {MESSAGES!r} and {beside[0]!r} exclude each other: label and rationale "
            "are what the assistant says at the end"
        )
    if history and config.format == "plain":
        raise ValueError(
            f"field {MESSAGES!r} has a system message or several turns, which data.format plain does not "
            "know; set data.format chat"
        )
    return Conversation(tuple(history), question, label, rationale)


def rationales(row: dict[str, Any], config: DataConfig) -> tuple[str, ...]:
    """The texts of a row's field `rationales`; empty without one. Raises ValueError if they are no texts, or
    if the row has a single rationale too."""
    value = row.get(RATIONALES)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"field {RATIONALES!r} is {shown(value)}; it must be a list of texts, none empty")
    if row.get(config.rationale_field) is not None:
        raise ValueError(f"the fields {config.rationale_field!r} and {RATIONALES!r} exclude each other")
    return tuple(text.strip() for text in value)


def spread(record: Record, config: DataConfig, *, needs_rationale: bool) -> Iterator[Record]:
    """The training records that a record stands for: with `data.loss_on` all_turns one for each earlier turn
    of the assistant, after what was said before it, and one for each of its rationales.

    An earlier turn is learned from a row of its own, since some templates leave the rationales of earlier
    turns out, so that a prompt is what a student will read at that point.
    """
    for i, (role, text, rationale) in enumerate(record.history):
        if role == "assistant" and config.loss_on == "all_turns":
            yield replace(
                record,
                id=f"{record.id}/turn-{i}",
                history=record.history[: i - 1],
                question=record.history[i - 1][1],
                label=text,
                gold=text,
                rationale=rationale,
                rationales=(),
            )
    if len(record.rationales) < 2 or not needs_rationale:
        yield record
        return
    for i, rationale in enumerate(record.rationales):
        yield replace(
            record,
            id=f"{record.id}/sample-{i}",
            rationale=rationale,
            rationales=(),
            sample_of=record.id,
        )


class Spread(Lazy[Record]):
    """The training records that these records stand for (`spread`), of which each has so many."""

    def __init__(
        self, records: Sequence[Record], numbers: np.ndarray, config: DataConfig, needs_rationale: bool
    ) -> None:
        self._records, self._spread = records, partial(spread, config=config, needs_rationale=needs_rationale)
        self._whole = np.repeat(np.arange(len(records)), numbers)
        self._firsts = np.cumsum(numbers) - numbers

    def __len__(self) -> int:
        return len(self._whole)

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(map(self._spread, self._records))

    def _item(self, index: int) -> Record:
        whole = self._whole[index]
        return list(self._spread(self._records[whole]))[index - self._firsts[whole]]


def _turn(message: Any, index: int, config: DataConfig) -> Turn:
    """Role, text and rationale of a message. Raises ValueError."""
    if not isinstance(message, dict):
        raise ValueError(f"message {index} is {shown(message)}; it must be an object with role and content")
    try:
        role, text = message["role"], field_text(message, "content").strip()
    except KeyError as error:
        raise ValueError(f"message {index} has no {error.args[0]!r}") from None
    if role not in ("user", "assistant") and (role, index) != ("system", 0):
        raise ValueError(
            f"message {index} has the role {shown(role)}; known are user and assistant, and system for the "
            "first one"
        )
    rationale = ""
    if role == "assistant":
        if message.get("reasoning_content") is not None:
            rationale = field_text(message, "reasoning_content").strip()
        else:
            opened, closed = chat.tags_of(config)
            before, has_tag, after = text.rpartition(closed)
            if has_tag and before.lstrip().startswith(opened):
                rationale, text = before.strip().removeprefix(opened).strip(), after.strip()
    if not text:
        raise ValueError(f"message {index}, of the role {role}, says nothing; each message needs a text")
    return role, text, rationale
