"""Multiple choice: questions that list their options under letters, and answers that name an option.

Where is money kept?
Answer Choices:
(a) safe
(b) bank
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ibdistill.data.answer_rules import plain
from ibdistill.data.records import Record

_OPTION = re.compile(r"^\(([a-z])\) (.*)$", re.MULTILINE)


def with_options(question: str, texts: Iterable[str]) -> str:
    """The question followed by up to ten options, a line each, as the "Distilling Step-by-Step!" release
    writes them."""
    lines = [f"({letter}) {text}" for letter, text in zip("abcdefghij", texts, strict=False)]
    return "\n".join([question, "Answer Choices:", *lines])


def options(record: Record) -> list[str]:
    """The texts of a multiple-choice question's options, without their letters; empty if it lists none."""
    return [text for _, text in _OPTION.findall(record.question)]


def letter_of(label: str, record: Record) -> str:
    """The letter in parentheses of the option whose text this is; the label itself if there is none."""
    found = [letter for letter, text in _OPTION.findall(record.question) if plain(text) == plain(label)]
    return f"({found[0]})" if found else label


def same_choice(prediction: str, record: Record) -> bool:
    """Whether the prediction is the gold option, as `answer_rules.same_text` compares texts. An option may
    also be given by its letter: `(b) bank`, `(b)`, `b`. An option whose text is a letter means itself."""
    answer = plain(prediction)
    texts = {letter: plain(text) for letter, text in _OPTION.findall(record.question)}
    if answer not in texts.values():
        for letter, text in texts.items():
            if answer in (letter, f"({letter})", f"({letter}) {text}"):
                answer = text
                break
    return answer == plain(record.gold)
