"""A rationale and the answer behind it in one text, as a student of the stream `reason` writes them.

    Ann gives 5 of her 12 pens away: 12 - 5 = 7.
    The answer is: 7

The words between the two are the task's marker (`tasks.base.Task.answer_marker`), or `data.answer_marker`.
They belong to the segment `rationale` and mark its end; the segment `answer` is the label and the end
token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data import chat, token_ids
from ibdistill.data.tasks.registry import TASKS

Ids = list[int]


def marker_of(task: str, config: DataConfig) -> str:
    """The words before the answer in a task's reasoning; in format chat the tag behind the rationale."""
    if config.format == "chat":
        return " ".join(chat.tags_of(config)[1].split())
    return " ".join((config.answer_marker or TASKS[task].answer_marker).split())


def join(rationale: str, answer: str, marker: str) -> str:
    """Rationale, marker and answer in one text; `split` takes it apart again."""
    return f"{rationale}\n{marker} {answer}"


def split(text: str, marker: str) -> tuple[str, str | None]:
    """The rationale, and the answer behind the last marker; None if there is no such answer.


    All white space counts as equal, since many tokenizers read a line break as a space.
    """
    found = _last(text, marker)
    if found is None:
        return text.strip(), None
    return text[: found.start()].strip(), text[found.end() :].strip() or None


def take_apart(text: str, task: str, marker: str) -> tuple[str, str | None, int]:
    """Rationale, answer (None: there is none), and the place of the character with which the answer begins.

    An answer that does not stand behind the marker is looked for by the task's rule for texts of LLMs.
    """
    rationale, label = split(text, marker)
    if label is not None:
        return rationale, label, answer_start(text, marker)
    parse = TASKS[task].parse_llm if task in TASKS else None
    parts = parse(text) if parse else None
    if parts is None:
        return rationale, None, len(text)
    rationale, label = parts
    place = text.rfind(label)
    if place < 0:  # a parser may write the answer anew, and then it begins where the rationale ends
        place = max(0, text.find(rationale)) + len(rationale)
    return rationale, label, place


def answer_start(text: str, marker: str) -> int:
    """The place of the character behind the last marker, white space included; the text's end without one."""
    found = _last(text, marker)
    return len(text) if found is None else found.end()


def _last(text: str, marker: str) -> re.Match[str] | None:
    return max(_pattern(marker).finditer(text), key=re.Match.end, default=None)


def segment_ids(
    rationales: Sequence[str], labels: Sequence[str], marker: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Ids], list[Ids], Ids]:
    """The ids of the rationales without the marker, those of the answers, and those of the marker.

    The three are tokenized apart, so that cutting a rationale changes no token before the cut. An answer ends
    with the end token and begins with a space, unless the tokenizer puts one there by itself.

    Raises ValueError if the tokenizer cannot say the marker.
    """
    between = token_ids.text_ids([f"\n{marker}"], tokenizer)[0]
    alone = token_ids.read_back([between], tokenizer)[0]
    if not _pattern(marker).fullmatch(alone):
        raise ValueError(
            f"data.answer_marker is {marker[:100]!r}, which the tokenizer reads back as {alone[:100]!r}, so "
            "no "
            "answer could be found behind a rationale; choose words that the tokenizer knows"
        )
    glued = token_ids.read_back([between + token_ids.text_ids([marker], tokenizer)[0]], tokenizer)[0]
    space = " " if f"{marker}{marker}" in glued else ""
    answers = token_ids.target_ids([f"{space}{label}" if label else "" for label in labels], tokenizer)
    return token_ids.text_ids(rationales, tokenizer), answers, between


def _pattern(marker: str) -> re.Pattern[str]:
    return re.compile(r"\s*" + r"\s+".join(map(re.escape, marker.split())))
