"""What an answer is: parsed from an LLM's text, and compared with the ground truth.

The `parse_*` functions turn an LLM's text into (rationale, label). Prompted with a few
examples, the LLM gives its reasons, a marker, the answer, and often runs on into a next
question of its own. The markers are those of the "Distilling Step-by-Step!" data release; what
parses there parses to the same here, but where that code yields a blank label or rationale,
or stops, these return None, so that the caller counts it. None for: no marker, the marker
twice, an empty rationale, an answer that is none. PaLM's and GPT-NeoX's outputs are written alike.

The `same_*` functions are the tasks' rules for a prediction (that code compares strings, or the
results of `eval`). None of them ever raises.
"""

from __future__ import annotations

import re

from ibdistill.data.arithmetic import evaluate
from ibdistill.data.records import Record

_NLI_ANSWER = re.compile(r"\W*(entailment|neutral|contradiction)\b", re.IGNORECASE)
_AMOUNT = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
_OPTION = re.compile(r"^\(([a-z])\) (.*)$", re.MULTILINE)  # as `formats.cqa_fields` writes options


def parse_equation(text: str) -> tuple[str, str] | None:
    """SVAMP and ASDiv: `He ate 3 of 8. The answer is (8 - 3).` -> the reason, `(8 - 3)`.

    The answer is what the outermost parentheses of the line hold, and must be arithmetic.
    """
    parts = _split(_before(text, "Q:"), "The answer is")
    if parts is None:
        return None
    line = parts[1].split("\n")[0]
    label = line[line.find("(") : line.rfind(")") + 1]
    return (parts[0], label) if evaluate(label) is not None else None


def parse_choice(text: str) -> tuple[str, str] | None:
    """CommonsenseQA: `Money is kept there. So the answer is (b) bank.` -> the reason, `bank`."""
    parts = _split(_before(text, "Q:"), "So the answer is")
    if parts is None:
        return None
    options = re.split(r"\(.\)", parts[1].split("\n")[0])
    label = options[1].strip().removesuffix(".").strip() if len(options) > 1 else ""
    return (parts[0], label) if label else None


def parse_esnli(text: str) -> tuple[str, str] | None:
    """e-SNLI: `A dog is an animal. Answer: entailment` -> the reason, `entailment`.

    Only the first answer counts: what follows it is a next example's.
    """
    rationale, _, answer = text.partition("Answer:")
    label = _NLI_ANSWER.match(answer)
    return (rationale.strip(), label[1].lower()) if rationale.strip() and label else None


def parse_anli(text: str) -> tuple[str, str] | None:
    """ANLI: `The text names no year. So the answer is neutral.` -> the reason, `neutral`."""
    parts = _split(_before(text, "Premise:"), "So the answer is", "The answer is")
    label = _NLI_ANSWER.match(parts[1]) if parts else None
    return (parts[0], label[1].lower()) if parts and label else None


def parse_amount(text: str) -> tuple[str, str] | None:
    """GSM8K: `24 + 48 = 72. The answer is $72.` -> the reason, `72`. Also with GSM8K's own marker `####`."""
    parts = _split(_before(text, "Q:"), "So the answer is", "The answer is", "####")
    label = _AMOUNT.search(parts[1].split("\n")[0]) if parts else None
    return (parts[0], label[0].rstrip(",")) if parts and label else None


def parse_text(text: str) -> tuple[str, str] | None:
    """Any task: `It rains. The answer is an umbrella.` -> the reason, `an umbrella`, the rest of the line."""
    parts = _split(_before(text, "Q:"), "So the answer is", "The answer is", "####", "Answer:")
    label = parts[1].split("\n")[0].strip().removesuffix(".").strip() if parts else ""
    return (parts[0], label) if parts and label else None


def _before(text: str, leak: str) -> str:
    """The text without the next question that the LLM went on to invent."""
    return text.partition(leak)[0].strip()


def _split(text: str, *markers: str) -> tuple[str, str] | None:
    """Text before and after the first of the markers that occurs exactly once, neither empty."""
    for marker in markers:
        parts = [part.strip() for part in text.split(marker)]
        if len(parts) == 2:
            return (parts[0], parts[1]) if all(parts) else None
    return None


def same_value(prediction: str, record: Record) -> bool:
    """Whether prediction and gold label have one value; `$1,200`, `1200` and `2 * 600` do.

    False where either has none, so two unreadable answers never count as equal.
    """
    values = {f"n{i}": evaluate(text) for i, text in enumerate(record.quantities)}
    names = {name: value for name, value in values.items() if value is not None}
    value = evaluate(prediction, names)
    return value is not None and (prediction == record.gold or value == evaluate(record.gold, names))


def same_text(prediction: str, record: Record) -> bool:
    """Whether prediction and gold label are one text, apart from case, spacing, quotes, a closing `.`."""
    return _plain(prediction) == _plain(record.gold)


def options(record: Record) -> list[str]:
    """The texts of a multiple-choice question's options, without their letters."""
    return [text for _, text in _OPTION.findall(record.question)]


def letter(label: str, record: Record) -> str:
    """The letter in parentheses of the option whose text this is; the label itself if there is none."""
    found = [key for key, text in _OPTION.findall(record.question) if _plain(text) == _plain(label)]
    return f"({found[0]})" if found else label


def same_choice(prediction: str, record: Record) -> bool:
    """As `same_text`; an option of the question may also be named by its letter: `(b) bank`, `(b)`, `b`."""
    options = dict(_OPTION.findall(record.question))
    answer = _plain(prediction)
    texts = {letter: _plain(text) for letter, text in options.items()}
    if answer not in texts.values():
        for letter, text in texts.items():
            if answer in (letter, f"({letter})", f"({letter}) {text}"):
                answer = text
                break
    return answer == _plain(record.gold)


def same_value_or_text(prediction: str, record: Record) -> bool:
    """Of demo_pretrain, some of whose labels are restored words: text equality, or else equal values."""
    return same_text(prediction, record) or same_value(prediction, record)


def _plain(text: str) -> str:
    """Case, spacing, quotes and sentence punctuation removed. Signs stay: `-5` is not `5`."""
    text = " ".join(text.casefold().split())
    # Alone, punctuation is the answer itself.
    return text.strip("\"'`\u201c\u201d\u2018\u2019 ").rstrip(".,;:!?\"'\u201d\u2019 ") or text
