"""The settings of `evaluate_student.py` (its own, and the section `data` of a run) and of `ask.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ibdistill.config.fields import AtLeastOne, NotNegativeInt
from ibdistill.config.sections import DataConfig


@dataclass(kw_only=True)
class EvaluationConfig:
    """How `evaluate_student.py` evaluates, and where to."""

    dir: str = ""
    """Folder for `result.json`, `predictions.jsonl` and plots. Empty: `evaluation/STUDENT-TASK`."""
    split: Literal["test", "valid"] = "test"
    """Which records are answered."""
    questions: str = ""
    """Answer the questions of this JSONL file instead of a split, under `data.question_field`. Labels under
    `data.label_field` are scored; a question may lack one. Empty: a split."""
    limit: NotNegativeInt = 0
    """Answer at most this many records; 0: all of them."""
    batch_size: AtLeastOne = 64
    """Records decoded together on one rank."""
    rationales: bool = True
    """Decode and score rationales too; false: labels only."""
    reason: Literal["no", "only", "also"] = "no"
    """Whether the stream `reason` (rationale, then answer) is decoded: instead of the other two streams
    (only), as a student of method cot is asked, or beside them (also), as for dss+cot."""
    predictions: str = ""
    """Score this file of predictions instead of decoding with a student."""
    embedding_model: str = ""
    """Folder of a sentence-transformers model, for `rationale_cosine`. Empty: none."""


@dataclass(kw_only=True)
class StudentEvaluation:
    """All sections of an evaluation by `evaluate_student.py`."""

    data: DataConfig = field(default_factory=DataConfig)
    eval: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(kw_only=True)
class AskConfig:
    """What `ask.py` asks, and where the answers go."""

    questions: str = ""
    """A JSONL file of questions; empty: the question on the command line, else the standard input."""
    question_field: str = "question"
    """The field of that file with the question."""
    out: str = ""
    """A JSONL file for the answers to `questions`; empty: the standard output."""
    batch_size: AtLeastOne = 64
    """Questions of a file that are answered together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the student runs; auto: on a GPU if there is one."""


@dataclass(kw_only=True)
class Asking:
    """All sections of `ask.py`."""

    ask: AskConfig = field(default_factory=AskConfig)
