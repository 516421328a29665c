"""Questions to an exported student, with the prompt that its folder keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig, StudentConfig
from ibdistill.data import chat, reasoning
from ibdistill.data.llm_text import untagged
from ibdistill.data.records import Record, map_numbers, with_numbers
from ibdistill.data.tokenizers import load_tokenizer
from ibdistill.data.tokenizing import tokenize
from ibdistill.models.decoding import decode
from ibdistill.models.prompt import Prompt
from ibdistill.models.student import load_student

Said = dict[str, Any]


class Student(NamedTuple):
    """An exported student, ready to be asked."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    device: torch.device


def load(folder: Path, device: torch.device) -> Student:
    """The student of an exported folder. Raises ValueError if something in it is missing or damaged."""
    prompt = Prompt.read(folder)
    tokenizer = load_tokenizer(str(folder), "STUDENT")
    model = load_student(StudentConfig(model=str(folder)), tokenizer, seed=0)
    return Student(model.eval().to(device), tokenizer, prompt, device)


def ask(student: Student, questions: Sequence[str], batch_size: int = 64) -> list[Said]:
    """The student's greedy answers, in the order of the questions.

    Each has `label` and `rationale`, as far as the student was taught them. A student with the stream
    `reason` beside others has them of that stream under `reasoned`. The label of a reasoning without an
    answer is None. Where the student was taught with mapped numbers, it is asked with them, and the answers
    have the question's numbers again. A warning says how many questions lost their end, or have characters
    that the student does not know.
    """
    quantities: list[tuple[str, ...]] = [()] * len(questions)
    if student.prompt.map_numbers:
        records = [map_numbers(Record("", "", text, "", "", gold="")) for text in questions]
        questions, quantities = [r.question for r in records], [r.quantities for r in records]
    said: list[Said] = [{} for _ in questions]
    for stream in student.prompt.prefixes:
        texts = _texts(student, stream, questions, batch_size)
        texts = [with_numbers(text, own) for text, own in zip(texts, quantities, strict=True)]
        for own, text in zip(said, texts, strict=True):
            if stream != "reason":
                own["label" if stream == "predict" else "rationale"] = text
                continue
            rationale, label, _ = reasoning.take_apart(text, student.prompt.task, student.prompt.marker)
            if student.prompt.tags is not None:
                rationale = untagged(rationale, student.prompt.tags)
            reasoned = {"label": label, "rationale": rationale}
            own |= {"reasoned": reasoned} if "predict" in student.prompt.prefixes else reasoned
    return said


def _texts(student: Student, stream: str, questions: Sequence[str], batch_size: int) -> list[str]:
    """What the student writes in one stream."""
    prompt = student.prompt
    plain = DataConfig(max_question_tokens=prompt.question_limit, answer_marker=prompt.marker)
    config = prompt.chat_settings() if prompt.tags else plain
    records = [Record("", "", text, "", "", gold="") for text in questions]
    tokenize(
        records, {"": prompt.prefixes}, student.tokenizer, config, "asked", (stream,)
    )  # for its warnings
    answers = decode(
        student.model,
        student.tokenizer,
        prompt.ids(stream, questions, student.tokenizer),
        max_question_tokens=prompt.question_limit,
        max_new_tokens=prompt.limits[stream],
        device=student.device,
        batch_size=batch_size,
    )
    texts = [answer.text for answer in answers]
    if prompt.tags is not None and stream != "reason":
        texts = [chat.visible(text, prompt.chat_settings()) for text in texts]
    return texts
