"""Predictions: a split decoded greedily over all ranks, its scores, and the file that keeps them.

Rank r decodes records r, r + world size, and so on; shares may be uneven. The answers are
gathered, so scores are computed from all of them, and each record counts exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data import chat, chat_features, reasoning
from ibdistill.data.json_rows import read_rows, shown
from ibdistill.data.llm_text import untagged
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.evaluation import calibration, faithfulness, text_scores
from ibdistill.evaluation import reasoned as reasoned_text
from ibdistill.evaluation.reasoned import Reasoned
from ibdistill.models.decoding import Answer, decode
from ibdistill.runtime import distributed, files
from ibdistill.runtime.distributed import World


@dataclass(frozen=True)
class Prediction:
    """The student's answer to one record."""

    record: Record
    label: str
    rationale: str | None
    """None if the explain stream was not decoded."""
    correct: bool
    confidence: float
    """Probability of the whole label, by the student itself (`calibration`)."""
    first_confidence: float
    """Probability of the label's first token."""
    reasoned: Reasoned | None = None
    """What it wrote in the reason stream. If that is the only stream, label, rationale and confidence are
    those of it."""

    @property
    def implied(self) -> list[str]:
        """The labels that the rationale implies; empty where the task has no rule."""
        rule = TASKS[self.record.task].implied
        return rule(self.rationale, self.record) if rule and self.rationale is not None else []


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    streams: Sequence[str],
    config: DataConfig,
    world: World,
    batch_size: int = 64,
    decoder: Callable[..., list[Answer]] | None = None,
) -> list[Prediction]:
    """Decode `records`, all of one task. Collective; every rank gets all predictions, in order.

    `decoder` decodes in the place of `decoding.decode`. Raises ValueError if there are no records.
    """
    if not records:
        raise ValueError("there are no records to evaluate: the split is empty, or its limit is 0")
    mine = range(world.rank, len(records), world.size)
    limits, task = config.answer_limits(), records[0].task
    decoded = {
        stream: (decoder or decode)(
            model,
            tokenizer,
            questions([records[i] for i in mine], stream, tokenizer, config),
            max_question_tokens=config.max_question_tokens,
            max_new_tokens=limits[stream],
            device=world.device,
            batch_size=batch_size,
        )
        for stream in streams
    }
    if config.format == "chat":
        decoded |= {
            stream: [answer._replace(text=chat.visible(answer.text, config)) for answer in decoded[stream]]
            for stream in decoded.keys() - {"reason"}
        }
    nothing, marker = [None] * len(mine), reasoning.marker_of(task, config)
    reasoned = [
        reasoned_text.read(answer, records[i], marker, tokenizer)
        for i, answer in zip(mine, decoded.get("reason", ()), strict="reason" in decoded)
    ]
    if config.format == "chat":
        tags = chat.tags_of(config)
        reasoned = [replace(own, rationale=untagged(own.rationale, tags)) for own in reasoned]
    parts = decoded.get("predict", nothing), decoded.get("explain", nothing), reasoned or nothing
    share = {i: own for i, *own in zip(mine, *parts, strict=True)}
    answers = {i: own for part in distributed.gather_objects(share) for i, own in part.items()}
    return [prediction(record, *answers[i]) for i, record in enumerate(records)]


def questions(
    records: Sequence[Record], stream: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[str] | list[list[int]]:
    """What a student is asked about records of one task in a stream, for `decoding.decode`."""
    if not records:
        return []
    task = records[0].task
    prefixes = TASKS[task].prefixes
    if config.format == "chat":
        return chat_features.prompts(records, stream, {task: prefixes}, tokenizer, config)
    return [prefixes[stream] + record.question for record in records]


def prediction(
    record: Record, label: Answer | None, rationale: Answer | None, reasoned: Reasoned | None = None
) -> Prediction:
    """The scored prediction of one record; without a `label` it is that of the reason stream."""
    if label is None:
        label = Answer(reasoned.label, reasoned.confidence, reasoned.first_confidence)
        rationale = Answer(reasoned.rationale, 1.0, 1.0)
    return Prediction(
        record,
        label.text,
        None if rationale is None else rationale.text,
        correct=TASKS[record.task].is_correct(label.text, record),
        confidence=label.confidence,
        first_confidence=label.first_confidence,
        reasoned=reasoned,
    )


def scores(predictions: Sequence[Prediction], encoder: text_scores.Encoder = None) -> dict[str, float]:
    """All scores of one task's predictions, by name.

    - `accuracy`, a share, by the task's rule `is_correct`. All figures of this project are measured by it, so
      it stays as it is, and calibration, the choice of the best checkpoint and the study use it;
    - `accuracy_strict`, by the official rule of the data set, for comparison with published figures: the
      task's `is_strict` names it;
    - `accuracy_lenient`, the share of answers that any of the task's rules accepts, `is_lenient` included,
      which takes what any reader would take (`8 apples`, `The answer is (b)`). The distance to `accuracy` is
      what the form of the answers costs. Some official rules accept what `is_correct` refuses, so that
      `accuracy` need not lie between the two;
    - `confidence`, `ece`, `ece_mass`, `ece_adaptive`, `brier`, `aurc`: `calibration.summary` of the whole
      label, and the same of its first token under `first_token_...`;
    - if rationales were decoded: `rationale_bleu`, `rationale_chrf`, `rationale_rouge_l` and
      `rationale_words` (`text_scores.text_scores`), with an `encoder` also `rationale_cosine`, all over the
      records that have a reference rationale; and the scores of `faithfulness.faithfulness` over all;
    - if the reason stream was decoded: `reasoned.scores` under `reason_...`.
    """
    correct = [p.correct for p in predictions]
    task = TASKS[predictions[0].record.task]
    strict = [(task.is_strict or task.is_correct)(p.label, p.record) for p in predictions]
    lenient = [
        one or other or bool(task.is_lenient and task.is_lenient(p.label, p.record))
        for one, other, p in zip(correct, strict, predictions, strict=True)
    ]
    counts = {"accuracy": correct, "accuracy_strict": strict, "accuracy_lenient": lenient}
    result = {name: sum(accepted) / len(predictions) for name, accepted in counts.items()}
    result |= calibration.summary([p.confidence for p in predictions], correct)
    first = calibration.summary([p.first_confidence for p in predictions], correct)
    result |= {f"first_token_{name}": value for name, value in first.items()}
    explained = [p for p in predictions if p.rationale is not None]
    compared = [p for p in explained if p.record.rationale]
    if compared:
        pair = [p.rationale for p in compared], [p.record.rationale for p in compared]
        texts = text_scores.text_scores(*pair)
        if encoder is not None:
            texts["cosine"] = text_scores.embedding_cosine(encoder, *pair)
        result |= {f"rationale_{name}": value for name, value in texts.items()}
    if explained:
        result |= faithfulness.faithfulness(
            [p.label for p in explained], [p.rationale for p in explained], [p.record for p in explained]
        )
    reasoned = [p.reasoned for p in predictions if p.reasoned is not None]
    if reasoned:
        result |= {f"reason_{name}": value for name, value in reasoned_text.scores(reasoned).items()}
    return result


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one JSON object per line; `read_predictions` reads them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_as_row(p), ensure_ascii=False) + "\n" for p in predictions]
    files.write_atomically(path, "".join(lines))


def _as_row(p: Prediction) -> dict[str, Any]:
    own = {} if p.reasoned is None else {"reasoned": asdict(p.reasoned)}
    return own | {
        "id": p.record.id,
        "question": p.record.question,
        "gold": p.record.gold,
        "label": p.label,
        "correct": p.correct,
        "confidence": p.confidence,
        "first_confidence": p.first_confidence,
        "gold_rationale": p.record.rationale,
        "rationale": p.rationale,
        "implied": p.implied,
    }


def read_predictions(path: Path, records: Sequence[Record]) -> list[Prediction]:
    """The predictions of a file, scored anew against `records` of one task.

    Raises ValueError if the file is missing, does not hold predictions, holds those of other records, or
    has a record twice; the message begins with `FILE:LINE`.
    """
    by_id = {record.id: record for record in records}
    task = records[0].task
    if not path.is_file():
        raise ValueError(f"{path} does not exist; predictions of a run are in RUN/predictions/step-*/")
    predictions, places = [], {}
    for where, row in read_rows(path):
        name, label, rationale = _checked_row(row, where)
        if name in places:
            raise ValueError(
                f"{where}: {name!r} stands at {places[name]} already; each record counts once: keep one line"
            )
        places[name] = where
        if name not in by_id:
            raise ValueError(
                f"{where}: {name!r} is none of the {len(records)} records of task {task!r} that are "
                "evaluated; give the data settings that the predictions were made with"
            )
        if row.get("question") != by_id[name].question:
            raise ValueError(f"{where}: {name!r} has another question in the data that is loaded now")
        reasoned = _reasoned(row, by_id[name], where)
        predictions.append(prediction(by_id[name], label, rationale, reasoned))
    if not predictions:
        raise ValueError(f"{path} is empty: there are no predictions to evaluate")
    return predictions


def _reasoned(row: dict[str, Any], record: Record, where: str) -> Reasoned | None:
    """What a row of a predictions file says of the reason stream, scored anew. Raises ValueError."""
    if row.get("reasoned") is None:
        return None
    try:
        found = Reasoned(**row["reasoned"])
        correct = found.answered and TASKS[record.task].is_correct(found.label, record)
        numbers = [float(x) for x in (found.confidence, found.first_confidence, found.tokens)]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where}: reasoned is {shown(row['reasoned'])}, which is not what an evaluation writes "
            f"({error}); "
            "leave it out to score the label alone"
        ) from None
    return replace(found, correct=correct, confidence=numbers[0], first_confidence=numbers[1])


def _checked_row(row: Any, where: str) -> tuple[str, Answer, Answer | None]:
    """Id, label and rationale of a row of a predictions file. Raises ValueError if it is none."""
    needs = "each line needs id, label, rationale, confidence and first_confidence"
    try:
        name, label, rationale = row["id"], row["label"], row["rationale"]
        confidences = row["confidence"], row["first_confidence"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a prediction ({type(error).__name__}: {error}); {needs}") from None
    if not isinstance(name, str) or not isinstance(label, str):
        key, value = ("label", label) if isinstance(name, str) else ("id", name)
        raise ValueError(f"{where}: the {key} is {shown(value)}; it must be text, as the student wrote it")
    if not isinstance(rationale, str | None):
        raise ValueError(f"{where}: the rationale is {shown(rationale)}; it must be text, or null for none")
    for value in confidences:
        if type(value) not in (int, float) or not 0 <= value <= 1.001:  # more is no rounding
            raise ValueError(f"{where}: a confidence is {shown(value)}; it must be a number from 0 to 1")
    return (
        name,
        Answer(label, *map(float, confidences)),
        None if rationale is None else Answer(rationale, 1.0, 1.0),
    )
