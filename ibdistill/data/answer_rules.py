"""Rules that tasks share: when a prediction is right, and which answers a text names.

The `same_*` functions compare a prediction with a record's ground truth. (The "Distilling
Step-by-Step!" code compares strings, or the results of Python's `eval`.) None of them ever raises.
"""

from __future__ import annotations

from collections.abc import Sequence

from ibdistill.data.arithmetic import evaluate, values_of
from ibdistill.data.records import Record


def same_value(prediction: str, record: Record) -> bool:
    """Whether prediction and gold label have one value; `$1,200`, `1200` and `2 * 600` do.

    False where either has none, so two unreadable answers never count as equal.
    """
    names = values_of(record.quantities)
    value = evaluate(prediction, names)
    return value is not None and (prediction == record.gold or value == evaluate(record.gold, names))


def same_text(prediction: str, record: Record) -> bool:
    """Whether prediction and gold label are one text, apart from case, spacing, quotes, a closing `.`."""
    return plain(prediction) == plain(record.gold)


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
    words, wanted = ([w.strip(".,;:!?\"'") or w for w in t.casefold().split()] for t in (text, part))
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words)))
