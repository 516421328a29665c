"""An LLM's text about a question, taken apart: what the tasks' parsers share.

Prompted with a few examples, an LLM writes its reasons, a marker and the answer, and often runs on into
a next question of its own. A task's parser turns such a text into (rationale, label). The markers are
those of the "Distilling Step-by-Step!" data release. What parses in that release's code parses to the
same here. Where that code yields a blank label or rationale, or stops with an error, a parser here
returns None, so that the caller counts the text. None stands for: no marker, the marker twice, an empty
rationale, an answer that cannot be one, two answers. PaLM's and GPT-NeoX's outputs are written alike. No
parser raises.
"""

from __future__ import annotations

import re


def before(text: str, next_question: str) -> str:
    """The text up to `next_question`, the words with which the LLM went on to invent another question."""
    return text.partition(next_question)[0].strip()


FINAL = "####"
"""GSM8K's marker: a solution ends with the line that has it, so whatever follows is another text."""
_STATED = re.compile(rf"{FINAL}|\b(?:answer|label)(?:\s+is\b|\s*:)[\s:]*", re.IGNORECASE)
_WRAPPED = re.compile(r"\*\*([^*]+)\*\*\.?|\$?\\boxed\{([^{}]+)\}\$?\.?")


def split_at_marker(text: str, *markers: str) -> tuple[str, str] | None:
    """The text before and after the first of the markers that occurs exactly once; None if either is
    empty, or if no marker does. Where `FINAL` is among the markers, the text ends with the first line
    that has it."""
    if FINAL in markers and FINAL in text:
        solution, _, rest = text.partition(FINAL)
        text = solution + FINAL + rest.split("\n")[0]
    for marker in markers:
        parts = [part.strip() for part in text.split(marker)]
        if len(parts) == 2:
            return (parts[0], parts[1]) if all(parts) else None
    return None


def stated(text: str) -> str | None:
    """What stands behind `The answer is`, `Answer:` or `####` in an answer; an answer without such words as
    it is; None where they stand there twice. Bold type or a box around the answer is taken off."""
    parts = _STATED.split(text)
    if len(parts) > 2:
        return None
    said = parts[-1].strip()
    if said.count("**") == 1:  # `**Answer:** 8` or `**Answer: 8**`
        said = said.removeprefix("**").removesuffix("**").strip()
    wrapped = _WRAPPED.fullmatch(said)
    return said if wrapped is None else (wrapped[1] or wrapped[2]).strip()


def untagged(rationale: str, tags: tuple[str, str]) -> str:
    """A rationale without tags of its own, as trace sets have them: the chat template sets them."""
    opened, closed = map(str.strip, tags)
    return rationale.strip().removeprefix(opened).removesuffix(closed).strip()
