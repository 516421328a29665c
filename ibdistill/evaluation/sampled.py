"""Several sampled answers to each question: how often they are right, and how far that can be trusted.

A sample depends on the seed, the record and its own number, not on the batch or on the number of ranks, apart
from rounding: padding changes the last bits of a model's outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.evaluation_sections import EvaluationConfig
from ibdistill.config.sections import DataConfig
from ibdistill.data import chat, reasoning
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.evaluation import intervals, predictions, reasoned
from ibdistill.models import decoding
from ibdistill.models.decoding import Answer, Sampling
from ibdistill.runtime import distributed, files
from ibdistill.runtime.distributed import World


@dataclass(frozen=True)
class Sample:
    """One sampled answer to one record."""

    text: str
    label: str
    correct: bool
    ended: bool
    """Whether the text ended by itself, and not at the limit."""
    tokens: int
    """Tokens written, end token included."""


Samples = list[list[list[Sample]]]
"""[seed][record][sample]."""
_SETTINGS = ("temperature", "top_p", "ks", "seed", "seeds")


def check(has_student: bool, config: EvaluationConfig) -> None:
    """Raise ValueError for settings of samples that contradict each other, or that nothing would use."""
    given, default = asdict(config), asdict(EvaluationConfig())
    unused = [name for name in _SETTINGS if given[name] != default[name]]
    if unused and not config.samples:
        raise ValueError(
            f"eval.{unused[0]} is {given[unused[0]]}, which is for samples, and eval.samples is 0: none are "
            "drawn; give eval.samples, or leave it out"
        )
    if config.samples and not has_student:
        raise ValueError(
            f"eval.samples is {config.samples}, and eval.predictions has one answer per question; give a "
            "STUDENT"
        )
    if config.samples and (not config.ks or max(config.ks) > config.samples):
        raise ValueError(
            f"eval.ks is {config.ks}, and eval.samples {config.samples}; each k is from 1 to eval.samples"
        )


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    stream: str,
    data: DataConfig,
    config: EvaluationConfig,
    world: World,
    decode: Callable[..., list[Answer]] = decoding.decode,
) -> Samples:
    """`eval.samples` answers of a stream, predict or reason, to each record, for each seed. Collective; every
    rank gets all of them."""
    mine = [records[i] for i in range(world.rank, len(records), world.size)]
    asked = predictions.questions(mine, stream, tokenizer, data)
    limit = data.answer_limits()[stream]
    found: Samples = []
    for seed in range(config.seed, config.seed + config.seeds):
        own: list[list[Sample]] = [[] for _ in mine]
        for number in range(config.samples):
            keys = [f"{seed} {record.id} {stream} {number}" for record in mine]
            answers = decode(
                model,
                tokenizer,
                asked,
                max_question_tokens=data.max_question_tokens,
                max_new_tokens=limit,
                device=world.device,
                batch_size=config.batch_size,
                sampling=Sampling(config.temperature, decoding.draws(keys, limit), config.top_p),
            )
            for samples, answer, record in zip(own, answers, mine, strict=True):
                samples.append(_read(answer, record, stream, data, tokenizer))
        shares = distributed.gather_objects(own)
        found.append([shares[i % world.size][i // world.size] for i in range(len(records))])
    return found


def _read(
    answer: Answer, record: Record, stream: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Sample:
    ended = answer.ids[-1:] == (tokenizer.eos_token_id,)
    if stream == "reason":
        read = reasoned.read(answer, record, reasoning.marker_of(record.task, data), tokenizer)
        label, correct = read.label, read.correct
    else:
        label = chat.visible(answer.text, data) if data.format == "chat" else answer.text
        correct = TASKS[record.task].is_correct(label, record)
    return Sample(answer.text, label, correct, ended, len(answer.ids))


def scores(samples: Samples, ks: Sequence[int]) -> dict[str, float]:
    """All scores of the samples of a stream, by name. n: `eval.samples`.

    - `avg@n`, the share of right samples, and `pass@k` (`intervals.pass_at_k`) from the samples of all seeds,
      each with `_low` and `_high`, the ends of its 95 % interval over questions (`intervals.bootstrap`);
    - with several seeds `avg@n_seeds_low` and `avg@n_seeds_high`, the ends of the 95 % interval of the mean
      over seeds (Student's t), which has the noise of sampling alone and not that of the questions;
    - `cut_off`, the share of the texts that reached the limit without an end, and `tokens`, their
      mean length.
    """
    n, drawn = len(samples[0][0]), len(samples[0][0]) * len(samples)
    right = [sum(s.correct for own in per_seed for s in own) for per_seed in zip(*samples, strict=True)]
    rows = [[c / drawn, *(intervals.pass_at_k(drawn, c, k) for k in ks)] for c in right]
    result = {}
    names = [f"avg@{n}", *(f"pass@{k}" for k in ks)]
    for name, column, (low, high) in zip(
        names, zip(*rows, strict=True), intervals.bootstrap(rows), strict=True
    ):
        result |= {name: mean(column), f"{name}_low": low, f"{name}_high": high}
    if len(samples) > 1:
        by_seed = [mean(float(s.correct) for own in questions for s in own) for questions in samples]
        center, half = intervals.interval(by_seed)
        result |= {f"avg@{n}_seeds_low": center - half, f"avg@{n}_seeds_high": center + half}
    every = [s for questions in samples for own in questions for s in own]
    return result | {
        "cut_off": mean(float(not s.ended) for s in every),
        "tokens": mean(s.tokens for s in every),
    }


def results(
    samples: dict[str, Samples], records: list[Record], config: EvaluationConfig, folder: Path
) -> dict[str, Any]:
    """The part of `result.json` about samples by stream, which are written to `samples.jsonl` there too."""
    if not samples:
        return {}
    write(folder / "samples.jsonl", samples, records, config.seed)
    names = ("samples", "seeds", "seed", "temperature", "top_p")
    found: dict[str, Any] = {"sampling": {name: getattr(config, name) for name in names}}
    scored = [i for i, record in enumerate(records) if record.gold]
    if scored:
        found["sampled"] = {
            stream: scores([[own[i] for i in scored] for own in seeds], config.ks)
            for stream, seeds in samples.items()
        }
    return found


def write(path: Path, samples: dict[str, Samples], records: Sequence[Record], seed: int) -> None:
    """One JSON object per sample, with the record's id, the stream and the seed, which begin with `seed`."""
    rows = (
        {"id": record.id, "stream": stream, "seed": seed + i, "sample": j, **asdict(one)}
        for stream, seeds in samples.items()
        for i, questions in enumerate(seeds)
        for record, own in zip(records, questions, strict=True)
        for j, one in enumerate(own)
    )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_atomically(path, text)
