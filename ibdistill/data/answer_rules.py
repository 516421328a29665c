"""Rules that tasks share: when a prediction is right, and which answers a text names.

The `same_*` functions compare a prediction with a record's ground truth; none of them ever raises. A task
has up to three rules (`tasks.base.Task`):

- `is_correct`, by which `accuracy` is measured, labels of an LLM are judged and streams are compared;
- `is_strict`, the rule of the data set's own scorer or of the code whose figures are compared with;
- `is_lenient`, which takes an answer that any reader would: with its unit, its letter, `The answer is`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ibdistill.data.amounts import amount, lone_number, numbers
from ibdistill.data.arithmetic import evaluate, values_of
from ibdistill.data.llm_text import stated
from ibdistill.data.records import Record

_PUNCTUATION = ".,;:!?\"'"
_BRACKETS = "()[]\u201c\u201d\u2018\u2019"
_PYTHON = re.compile(r"[-+*/(). n0-9]*")


def same_value(prediction: str, record: Record) -> bool:
    """Whether prediction and gold label have one value; `$1,200`, `1200` and `2 * 600` do.

    False where either has none, so two unreadable answers never count as equal.
    """
    names = values_of(record.quantities)
    value = evaluate(prediction, names)
    return value is not None and (prediction == record.gold or value == evaluate(record.gold, names))


def same_python_value(prediction: str, record: Record) -> bool:
    """The rule of the "Distilling Step-by-Step!" code for equations: Python's `eval` of both gives one
    number. Values are exact here. What is no Python (`$5`, `1,200`, `2 x 3`, `8 - 3 = 5`) is wrong."""
    return bool(_PYTHON.fullmatch(prediction)) and same_value(prediction, record)


def same_amount(prediction: str, record: Record) -> bool:
    """Whether the prediction, perhaps behind `The answer is` or `####`, states one amount
    (`amounts.amount`) and it is the gold label's value: `8 apples`, `#### 8`, `5 + 3 = 8`."""
    text = stated(prediction)
    value = None if text is None else amount(text)
    return value is not None and value == evaluate(record.gold, values_of(record.quantities))


def same_text(prediction: str, record: Record) -> bool:
    """Whether prediction and gold label are one text, apart from case, spacing, quotes, a closing `.`."""
    return plain(prediction) == plain(record.gold)


def same_exact_text(prediction: str, record: Record) -> bool:
    """The rule of the "Distilling Step-by-Step!" code for texts: both are one text, character by character
    (spaces around them apart)."""
    return prediction.strip() == record.gold.strip()


def same_stated_text(prediction: str, record: Record) -> bool:
    """`same_text`, or that of what stands behind `The answer is`, `Answer:` or `####`."""
    text = stated(prediction)
    return same_text(prediction, record) or (text is not None and same_text(text, record))


def same_text_or_number(prediction: str, record: Record) -> bool:
    """`same_text`; two numbers are compared by value, so that `8`, `8.0` and `$8` are one label."""
    value = lone_number(prediction)
    return same_text(prediction, record) or (value is not None and value == lone_number(record.gold))


def plain(text: str) -> str:
    """The text in lower case, without quotes, closing punctuation and extra spaces. Signs stay: `-5` is
    not `5`."""
    text = " ".join(text.casefold().split())
    # A text of punctuation alone is the answer itself.
    return text.strip("\"'`\u201c\u201d\u2018\u2019 ").rstrip(".,;:!?\"'\u201d\u2019 ") or text


def named(text: str, answers: Sequence[str]) -> list[str]:
    """The answers that a text names word for word, whatever the case. An answer within another one that is
    named (`bank` in `river bank`) does not count."""
    found = [answer for answer in answers if contains_words(text, answer)]
    return [a for a in found if not any(a != other and contains_words(other, a) for other in found)]


def contains_words(text: str, part: str) -> bool:
    """Whether the words of `part` stand in the text one after the other, apart from case and punctuation."""
    # The parentheses of an equation belong to it; those around other words do not.
    marks = _PUNCTUATION if set(part) & set(_BRACKETS) else _PUNCTUATION + _BRACKETS
    words, wanted = ([w.strip(marks) or w for w in t.casefold().split()] for t in (text, part))
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def contains_answer(text: str, answer: str) -> bool:
    """Whether a text states an answer: a number by its value, wherever it stands (`= $18`, `2+1=3`), any
    other answer word for word."""
    value = lone_number(answer.strip("() "))
    return contains_words(text, answer) or (value is not None and value in numbers(text))
