"""The settings of `evaluate_student.py` (its own, and the section `data` of a run) and of `ask.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ibdistill.config.fields import AtLeastOne, NotNegativeInt, Positive, Seed, Share
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
    engine: Literal["transformers", "vllm"] = "transformers"
    """What decodes. vllm: faster on a GPU, for decoder-only students on one process; it has to be
    installed."""
    math_verify: bool = False
    """Also compare labels by their mathematical value, LaTeX included (`accuracy_math_verify`); needs the
    package math-verify."""
    samples: NotNegativeInt = 0
    """Besides the greedy answer, draw so many answers per question and seed; 0: none. Drawn are those of the
    stream predict, or of the streams predict and reason that `reason` names."""
    temperature: Positive = 1.0
    """The logits of samples are divided by this."""
    top_p: Share = 1.0
    """Samples are drawn from the most probable tokens alone, as many as have this probability together."""
    ks: list[AtLeastOne] = field(default_factory=lambda: [1])
    """The k of pass@k, each at most `samples`."""
    seed: Seed = 0
    """The first seed of samples."""
    seeds: AtLeastOne = 1
    """With so many seeds, one after another, samples are drawn; from 2 on their mean has an interval."""
    cache: Literal["auto", "dynamic", "static", "compiled"] = "auto"
    """Keys and values while decoding: growing with the text (dynamic), or of full length from the start
    (static), for which torch may compile the step on a GPU (compiled). auto: static on a GPU."""
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
