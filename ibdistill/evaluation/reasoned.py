"""What a student writes in the stream `reason`, taken apart and scored.

The answer is what stands behind the marker (`data.reasoning`). Where the text has no marker, the task's
parser of LLM texts looks for the answer, since a student that was never taught the marker may state it in
other words.

The confidence is that of the answer *given* the reasoning that the student wrote itself: the probability of
its tokens alone, from the first token of the answer to the end. A text without an answer has confidence 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from transformers import PreTrainedTokenizerBase

from ibdistill.data import reasoning, token_ids
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.evaluation import calibration
from ibdistill.models.decoding import Answer


@dataclass(frozen=True)
class Reasoned:
    """A student's reasoning about one record."""

    rationale: str
    label: str
    """The answer; empty without one."""
    correct: bool
    confidence: float
    """Probability of the answer with its end token, given the reasoning before it."""
    first_confidence: float
    """Probability of the answer's first token, likewise."""
    answered: bool
    ended: bool
    """Whether the text ended by itself, and not at the limit."""
    tokens: int
    """Tokens written, end token included."""


def read(answer: Answer, record: Record, marker: str, tokenizer: PreTrainedTokenizerBase) -> Reasoned:
    """The reasoning in a decoded text of the reason stream."""
    rationale, label, start = reasoning.take_apart(answer.text, record.task, marker)
    confidence = first = 0.0
    if label is not None:
        token = _token_at(start, answer.ids, tokenizer)
        confidence, first = math.exp(sum(answer.log_probs[token:])), math.exp(answer.log_probs[token])
    return Reasoned(
        rationale,
        label or "",
        correct=label is not None and TASKS[record.task].is_correct(label, record),
        confidence=confidence,
        first_confidence=first,
        answered=label is not None,
        ended=answer.ids[-1:] == (tokenizer.eos_token_id,),
        tokens=len(answer.ids),
    )


def _token_at(place: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The index of the token that writes the character at a place of the text."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(token_ids.read_back([ids[: middle + 1]], tokenizer)[0]) > place:
            high = middle
        else:
            low = middle + 1
    return low


def scores(reasoned: Sequence[Reasoned]) -> dict[str, float]:
    """`accuracy` and `calibration.summary` of the answers given their reasoning; `unanswered`, the share of
    the texts without an answer; `cut_off`, the share of those that reached the limit before one; `tokens`,
    the mean number of tokens that an answer takes, its reasoning included."""
    correct = [r.correct for r in reasoned]
    return {
        "accuracy": mean(map(float, correct)),
        **calibration.summary([r.confidence for r in reasoned], correct),
        "unanswered": mean(float(not r.answered) for r in reasoned),
        "cut_off": mean(float(not r.answered and not r.ended) for r in reasoned),
        "tokens": mean(r.tokens for r in reasoned),
    }
