"""The same text in the tokens of two tokenizers: which tokens they share, and where both end a token.

A token stands for bytes (`Pieces`). Two token sequences of one text are cut into spans, as short as can be,
whose ends lie at the same byte of it (`spans`). So the parts of a character that one tokenizer splits are one
span with the whole character of the other, and an end token is a letter of its own that both have.

Tokenizers change text: some put a space in front of it, take runs of white space together, normalise
characters or do not know one. Where the bytes differ, white space is compared as single spaces, and the rest
word by word: ends within equal words count, and what differs lies within a span.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ibdistill.config.sections import DataConfig
from ibdistill.data import chat_features, token_ids
from ibdistill.data.chat_features import Prefixes
from ibdistill.data.ragged import Ragged
from ibdistill.data.records import Record

END = b"\xff"
"""What an end token stands for: a byte that no text in UTF-8 has."""
_WORDS = re.compile(rb"\xff| ?[!-~]+| ?[\xc0-\xfe][\x80-\xbf]*|.", re.DOTALL)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's mark for a space

Span = tuple[int, int, int, int]
"""First and end token on the one side, and on the other."""


class Pieces(NamedTuple):
    """The bytes that each token of a tokenizer stands for."""

    texts: list[bytes]
    """By id. Of the end token `END`, of the unknown token nothing, of other special tokens their spelling."""
    special: frozenset[int]
    """The special tokens, the end token and the unknown token among them."""
    spaced: bool
    """Whether the tokenizer puts a space in front of a text."""
    own: dict[bytes, int]
    """Bytes -> the token that stands for them, special ones apart."""
    roles: dict[str, int]
    """Role or spelling -> special token."""

    @property
    def unknown(self) -> int | None:
        """The token of what the tokenizer has no token for."""
        return self.roles.get("unk_token")

    def of(self, ids: Sequence[int], *, special: bool = False) -> list[bytes]:
        """The bytes of each token; of special ones but the end token nothing, unless asked for."""

        def text(index: int) -> bytes:
            if index >= len(self.texts):  # a row of the head that pads it, which a student may sample
                return b""
            hidden = index in self.special and not special and self.texts[index] != END
            return b"" if hidden else self.texts[index]

        return [text(index) for index in ids]


def pieces_of(tokenizer: PreTrainedTokenizerBase, setting: str) -> Pieces:
    """What a tokenizer's tokens stand for. Raises ValueError, which names `setting`, without an end token and
    for a kind that is not known: known are byte-level BPE, and sentencepiece with or without tokens for
    bytes."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    found = json.loads(core.to_str()) if core is not None else {}
    kinds = {json.dumps(found.get(part)) for part in ("decoder", "pre_tokenizer", "normalizer")}
    by_byte = '"ByteLevel"' in json.dumps(found.get("decoder"))
    if not by_byte and not any('"Metaspace"' in kind or json.dumps(_SPACE) in kind for kind in kinds):
        raise ValueError(
            f"objective.alignment is 'text', and it is not known which bytes a token of {setting} stands for "
            f"({type(tokenizer).__name__}); byte-level BPE and sentencepiece tokenizers can be aligned"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"objective.alignment is 'text', and the tokenizer of {setting} has no end token")
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    texts = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    unknown = tokenizer.unk_token_id
    special = {*token_ids.special_tokens(tokenizer), tokenizer.eos_token_id}
    special |= set() if unknown is None else {unknown}
    added = tokenizer.added_tokens_decoder
    late: set[int] = set()  # tokens for bytes, which text is not made of where there is a piece for it
    for piece, index in tokenizer.get_vocab().items():
        if index in added or index in special:
            texts[index] = piece.encode()
        elif by_byte:
            texts[index] = bytes(letters[letter] for letter in piece if letter in letters)
        elif byte := _BYTE.fullmatch(piece):
            texts[index] = bytes.fromhex(byte[1])
            late.add(index)
        else:
            texts[index] = piece.replace(_SPACE, " ").encode()
        texts[index] = b"" if texts[index] == END else texts[index]
    if unknown is not None:
        texts[unknown] = b""
    texts[tokenizer.eos_token_id] = END
    own: dict[bytes, int] = {}
    for index in sorted(range(len(texts)), key=late.__contains__):
        if index not in special and texts[index]:
            own.setdefault(texts[index], index)
    words = (text[1:].decode() for text in own if re.fullmatch(rb" [!-~]+", text))
    [probe] = token_ids.text_ids([next(words, "a")], tokenizer)
    roles = {tokenizer.convert_ids_to_tokens(index): index for index in sorted(special)}
    for role in ("bos_token", "pad_token", "unk_token", "eos_token"):
        if (index := getattr(tokenizer, f"{role}_id")) is not None:
            roles = {role: index} | {name: i for name, i in roles.items() if i != index}
    return Pieces(texts, frozenset(special), texts[probe[0]].startswith(b" "), own, roles)


class Shared(NamedTuple):
    """Tokens that stand for the same bytes in two vocabularies, and special tokens of the same role or
    spelling."""

    student: list[int]
    teacher: list[int]
    bucket: dict[bytes, int]
    """Bytes, or `END` -> place in both lists."""


def shared(student: Pieces, teacher: Pieces) -> tuple[Shared, Shared, Shared]:
    """What two vocabularies share: within a text, and where a text begins to which only the student's
    tokenizer adds a space (then its token of ` a` is the partner of `a`), or only the teacher's."""
    names = [name for name in student.roles if name in teacher.roles]  # the end token's comes first
    special = [[pieces.roles[name] for name in names] for pieces in (student, teacher)]

    def matched(mine: Mapping[bytes, int], yours: Mapping[bytes, int]) -> Shared:
        texts = sorted(mine.keys() & yours.keys(), key=mine.__getitem__)
        found = special[0] + [mine[t] for t in texts], special[1] + [yours[t] for t in texts]
        places = {text: place for place, text in enumerate(texts, start=len(names))}
        return Shared(*found, {END: 0} | places)

    def bare(own: Mapping[bytes, int]) -> dict[bytes, int]:
        return {text[1:]: i for text, i in own.items() if text.startswith(b" ") and len(text) > 1}

    return (
        matched(student.own, teacher.own),
        matched(bare(student.own), teacher.own),
        matched(student.own, bare(teacher.own)),
    )


def begins(student: Sequence[bytes], teacher: Sequence[bytes]) -> int:
    """Which of `shared`'s three holds at the beginning of a text in these tokens."""
    texts = [b"".join(side) for side in (student, teacher)]
    more = (len(text) - len(text.lstrip(b" ")) for text in texts)
    return {1: 1, -1: 2}.get(next(more) - next(more), 0)


def spans(student: Sequence[bytes], teacher: Sequence[bytes], *, cover: bool = False) -> list[Span]:
    """The shortest spans of tokens, from the bytes of each, whose ends lie at the same place of the text.

    With `cover` every token is in a span, as long as both sides have any: what is behind the last common end
    belongs to the last span.
    """
    texts, ends, first = [], [], begins(student, teacher)
    for number, side in enumerate((student, teacher), start=1):
        text = b"".join(side)
        lead = int(number == first)  # the space that one side alone has in front of the text
        texts.append(text[lead:])
        ends.append(np.maximum(np.cumsum([len(piece) for piece in side], dtype=int) - lead, 0))
    if texts[0] != texts[1]:
        texts, ends = zip(*map(_collapsed, texts, ends), strict=True)
        ends = [_onto(*texts, ends[0]), ends[1]]
    found, i, j, a, c = [], 0, 0, 0, 0
    mine, yours = (side.tolist() for side in ends)
    while i < len(mine) and j < len(yours):
        if mine[i] == yours[j]:
            i, j = i + 1, j + 1
            found.append((a, i, c, j))
            a, c = i, j
        elif mine[i] < yours[j]:
            i += 1
        else:
            j += 1
    if cover and mine and yours:
        start = found.pop() if found else (0, 0, 0, 0)
        found.append((start[0], len(mine), start[2], len(yours)))
    return found


def _collapsed(text: bytes, ends: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The text with single spaces for runs of white space and none in front, and the tokens' ends in it."""
    raw = np.frombuffer(text, dtype=np.uint8)
    space = np.isin(raw, list(b" \t\n\r\v\f"))
    keep = ~(space & np.concatenate([[True], space[:-1]])[: len(raw)])
    places = np.concatenate([[0], keep.cumsum()])
    return np.where(space, ord(" "), raw)[keep].astype(np.uint8).tobytes(), places[ends]


def _onto(text: bytes, other: bytes, ends: np.ndarray) -> np.ndarray:
    """Places of a text in another one; halves where the two differ, which no token ends at."""
    words = _WORDS.findall(text), _WORDS.findall(other)
    places = [np.cumsum([0, *map(len, side)]) for side in words]
    blocks = SequenceMatcher(None, *words, autojunk=False).get_matching_blocks()[:-1]
    starts = np.array([0, *(places[0][b.a] for b in blocks)])
    others = np.array([0, *(places[1][b.b] for b in blocks)])
    sizes = np.array([0, *(places[0][b.a + b.size] - places[0][b.a] for b in blocks)])
    before = np.maximum(np.searchsorted(starts, ends) - 1, 0)
    behind = ends - starts[before]
    follows = np.searchsorted(starts, ends, side="right") - 1  # where a block begins, the text before it ends
    between = np.where(starts[follows] == ends, others[follows], others[before] + sizes[before] + 0.5)
    return np.where(behind <= sizes[before], others[before] + behind, between)


def text_for(raw: bytes, student: Pieces, teacher: Pieces, *, begins_target: bool) -> str:
    """The text of a student's tokens as the teacher's tokenizer is to read it.

    A space that one of the tokenizers puts there by itself is no part of it.
    """
    text = raw.replace(END, b"").decode(errors="ignore")
    return text[1:] if text[:1] == " " and (teacher.spaced or (begins_target and student.spaced)) else text


def questions(
    records: Sequence[Record],
    prefixes: Prefixes,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    streams: Sequence[str],
) -> dict[str, Ragged]:
    """Stream -> the questions of `Features`, in another tokenizer's tokens and under its own template."""
    if config.format == "chat":
        return {s: Ragged(chat_features.prompts(records, s, prefixes, tokenizer, config)) for s in streams}
    limit = config.max_question_tokens
    texts = {s: [prefixes[record.task][s] + record.question for record in records] for s in streams}
    encoded = {stream: token_ids.question_ids(own, tokenizer) for stream, own in texts.items()}
    return {s: Ragged(token_ids.cut(ids, limit) for ids in rows) for s, rows in encoded.items()}
