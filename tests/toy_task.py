"""Questions whose answer is yes or no."""

from ibdistill.data.answer_rules import named, same_text
from ibdistill.data.records import Record
from ibdistill.data.tasks.base import Task
from ibdistill.data.tasks.jsonl import parse_text, read_jsonl

ANSWERS = ("yes", "no")


def named_answers(rationale: str, record: Record) -> list[str]:
    """Every answer that the rationale names word for word."""
    return named(rationale, ANSWERS)


YES_OR_NO = Task(
    name="yes_or_no",
    read=read_jsonl,
    is_correct=same_text,
    parse_llm=parse_text,
    implied=named_answers,
    choices=lambda record: ANSWERS,
)
