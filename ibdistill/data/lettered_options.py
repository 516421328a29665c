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
from ibdistill.data.llm_text import stated
from ibdistill.data.records import Record

_OPTION = re.compile(r"^\(([a-z])\) (.*)$", re.MULTILINE)
_LETTERED = re.compile(
    r"(?P<word>(?:option|choice|letter)\s+)?[(\[]?(?P<letter>[a-z])(?P<mark>\s+[-\u2013]|[)\].:]*)"
    r"(?:(?:\s+|(?<=[)\]]))(?P<rest>.+))?",
    re.DOTALL,
)


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


def option_of(answer: str, record: Record) -> str:
    """The option that an answer is, as `answer_rules.plain` text, whether the answer has the option's text,
    its letter or both: `bank`, `(b) bank`, `(b)`, `b`; other answers as plain text. An option whose text is
    a letter means itself."""
    answer = plain(answer)
    texts = {letter: plain(text) for letter, text in _OPTION.findall(record.question)}
    if answer not in texts.values():
        for letter, text in texts.items():
            if answer in (letter, f"({letter})", f"({letter}) {text}"):
                return text
    return answer


def same_choice(prediction: str, record: Record) -> bool:
    """Whether prediction and gold label are one option, see `option_of`."""
    return option_of(prediction, record) == option_of(record.gold, record)


def same_exact_choice(prediction: str, record: Record) -> bool:
    """The rule of the "Distilling Step-by-Step!" code: the prediction is the gold option's text, character by
    character. As CommonsenseQA's own scorer compares letters, the letter in parentheses counts too."""
    return prediction.strip() in (record.gold, letter_of(record.gold, record))


def same_stated_choice(prediction: str, record: Record) -> bool:
    """Whether the prediction, perhaps behind `The answer is`, names the gold option as a reader would
    understand it: `b)`, `[b] bank`, `option b`, `B: bank`. A letter with another option's text is wrong."""
    text = stated(prediction)
    if text is None:
        return False
    if same_choice(text, record):
        return True
    texts = {letter: plain(text) for letter, text in _OPTION.findall(record.question)}
    match = _LETTERED.fullmatch(plain(text))
    if match is None or match["letter"] not in texts:
        return False
    option, rest = texts[match["letter"]], match["rest"]
    if rest and (plain(rest) != option or not (match["word"] or match["mark"])):
        return False
    return option == option_of(record.gold, record)
