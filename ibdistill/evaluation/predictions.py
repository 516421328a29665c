"""Greedy decoding of a split over all ranks, and its scores.

Rank r decodes records r, r + world size, ...; shares may be uneven. The answers are gathered,
so scores are computed from all of them, each record counted exactly once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ibdistill.evaluation import calibration
from ibdistill.data import batches
from ibdistill.runtime import distributed
from ibdistill.models import families
from ibdistill.evaluation import faithfulness
from ibdistill.config.sections import DataConfig
from ibdistill.runtime.distributed import World
from ibdistill.data.formats import read_rows
from ibdistill.data.records import Record
from ibdistill.data.loading import TASKS

logger = logging.getLogger("ibdistill")


@dataclass(frozen=True)
class Prediction:
    """What the student said to one record."""

    record: Record
    label: str
    rationale: str | None
    """None if the explain stream was not decoded."""
    correct: bool
    confidence: float
    """Of the label: see `calibration`."""
    first_confidence: float
    """Of the label's first token."""

    @property
    def implied(self) -> list[str]:
        """The labels that the rationale implies; empty where the task has no rule (`rationale_quality`)."""
        rule = faithfulness.IMPLIED.get(self.record.task)
        return rule(self.rationale, self.record) if rule and self.rationale is not None else []


class Answer(NamedTuple):
    """What the student generates in one stream, and the probabilities it gave it."""

    text: str
    confidence: float
    """Of the whole answer, the end token included if it was reached within the limit."""
    first_confidence: float
    """Of its first token."""


class _Confidence(LogitsProcessor):
    """Notes the log-probability of each step's greedy token; keeps [B] a step, not [B, V]."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log_probs.append(scores.amax(-1) - scores.logsumexp(-1))
        return scores

    def of(self, generated: Tensor, eos: int) -> tuple[list[float], list[float]]:
        """(whole, first token) probabilities [B]; `generated` [B, T] may hold padding behind `eos`."""
        ends = generated == eos
        is_real = ends.cumsum(1) - ends.long() == 0
        log_probs = torch.stack(self.log_probs, dim=1).double()
        whole = torch.where(is_real, log_probs, 0.0).sum(1).exp()
        return whole.tolist(), log_probs[:, 0].exp().tolist()


class Sampling(NamedTuple):
    """What turns greedy decoding into sampling."""

    temperature: float
    draws: Tensor
    """[questions, max_new_tokens] fp32 in [0, 1): the random number behind each token. Given from
    outside, so that a question's answer does not depend on which others are decoded with it."""


class _Draw(LogitsProcessor):
    """Leaves one token a row: where the cumulated probabilities pass the row's random number."""

    def __init__(self, temperature: float, draws: Tensor) -> None:
        self._temperature, self._draws = temperature, iter(draws.T)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulated = torch.softmax(scores.float() / self._temperature, -1).cumsum(-1)
        bound = next(self._draws)[:, None] * cumulated[:, -1:]
        chosen = (cumulated <= bound).sum(-1, keepdim=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    streams: Sequence[str],
    config: DataConfig,
    world: World,
    batch_size: int = 64,
) -> list[Prediction]:
    """Decode `records`, all of one task. Collective; every rank gets all predictions, in order.

    Raises ValueError if there are none.
    """
    if not records:
        raise ValueError("there are no records to evaluate: the split is empty, or its limit is 0")
    mine = range(world.rank, len(records), world.size)
    limits = {"predict": config.max_label_tokens, "explain": config.max_rationale_tokens}
    prefixes = TASKS[records[0].task].prefixes
    decoded = {
        stream: decode(
            model,
            tokenizer,
            [prefixes[stream] + records[i].question for i in mine],
            max_question_tokens=config.max_question_tokens,
            max_new_tokens=limits[stream],
            device=world.device,
            batch_size=batch_size,
        )
        for stream in streams
    }
    labels = decoded["predict"]
    rationales = decoded.get("explain", [None] * len(labels))
    share = {i: pair for i, *pair in zip(mine, labels, rationales, strict=True)}
    answers = {i: pair for part in distributed.gather_objects(share) for i, pair in part.items()}
    return [prediction(record, *answers[i]) for i, record in enumerate(records)]


def prediction(record: Record, label: Answer, rationale: Answer | None) -> Prediction:
    """The scored prediction of one record."""
    return Prediction(
        record,
        label.text,
        None if rationale is None else rationale.text,
        correct=TASKS[record.task].is_correct(label.text, record),
        confidence=label.confidence,
        first_confidence=label.first_confidence,
    )


@torch.no_grad()
def decode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_question_tokens: int,
    max_new_tokens: int,
    device: torch.device,
    batch_size: int = 64,
    as_written: bool = False,
    sampling: Sampling | None = None,
    synced: bool = False,
) -> list[Answer]:
    """The greedy answers to `questions` (prefix included), in order. Batches are of similar length.

    Args:
        as_written: give a decoder-only model the text alone, without the separator that our students learn.
        sampling: draw tokens instead; confidences remain those of the greedy ones.
        synced: go on until all ranks have finished, each with the same number of batches; for sharded models.
    """
    layout = families.layout(model, tokenizer)
    decoder_only = families.family(model) == families.DECODER_ONLY
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = [questions[i] for i in rows]
        if decoder_only and not as_written:
            input_ids, mask = batches.prompts(texts, tokenizer, max_question_tokens, **layout)
        else:
            inputs = tokenizer(
                texts,
                padding=True,
                padding_side="left" if decoder_only else "right",
                truncation=True,
                max_length=max_question_tokens,
                return_tensors="pt",
            )
            input_ids, mask = inputs.input_ids, inputs.attention_mask
        confidence = _Confidence()
        draw = [_Draw(sampling.temperature, sampling.draws[rows].to(device))] if sampling else []
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([confidence, *draw]),
            synced_gpus=synced,
        )
        if decoder_only:
            output = output[:, input_ids.shape[1] :]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        probabilities = confidence.of(output[:, -len(confidence.log_probs) :], tokenizer.eos_token_id)
        answers |= {i: Answer(*parts) for i, *parts in zip(rows, texts, *probabilities, strict=True)}
    return [answers[i] for i in range(len(questions))]


def scores(predictions: Sequence[Prediction], encoder: faithfulness.Encoder = None) -> dict[str, float]:
    """All scores of one task's predictions, by name.

    - `accuracy`, a share;
    - `confidence`, `ece`, `ece_mass`, `ece_adaptive`, `brier`, `aurc`: `calibration.summary` of the whole
      label, and the same of its first token under `first_token_...`;
    - if rationales were decoded: `rationale_bleu`, `rationale_chrf`, `rationale_rouge_l`,
      `rationale_words` (`rationale_quality.text_scores`), with an `encoder` `rationale_cosine`,
      all over the records that have a reference rationale; and `rationale_quality.faithfulness` over all.
    """
    correct = [p.correct for p in predictions]
    result = {"accuracy": sum(correct) / len(predictions)}
    result |= calibration.summary([p.confidence for p in predictions], correct)
    first = calibration.summary([p.first_confidence for p in predictions], correct)
    result |= {f"first_token_{name}": value for name, value in first.items()}
    explained = [p for p in predictions if p.rationale is not None]
    compared = [p for p in explained if p.record.rationale]
    if compared:
        pair = [p.rationale for p in compared], [p.record.rationale for p in compared]
        texts = faithfulness.text_scores(*pair)
        if encoder is not None:
            texts["cosine"] = faithfulness.embedding_cosine(encoder, *pair)
        result |= {f"rationale_{name}": value for name, value in texts.items()}
    if explained:
        result |= faithfulness.faithfulness(
            [p.label for p in explained], [p.rationale for p in explained], [p.record for p in explained]
        )
    return result


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One JSON object a line; `read_predictions` reads it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for p in predictions:
            file.write(json.dumps(_as_row(p), ensure_ascii=False) + "\n")


def _as_row(p: Prediction) -> dict[str, Any]:
    return {
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

    Raises ValueError if the file is missing, is none of predictions, or is of other records.
    """
    by_id = {record.id: record for record in records}
    task = records[0].task
    if not path.is_file():
        raise ValueError(f"{path} does not exist; predictions of a run are in RUN/predictions/step-*/")
    predictions = []
    for where, row in read_rows(path):
        try:
            name, label, rationale = row["id"], row["label"], row["rationale"]
            confidences = float(row["confidence"]), float(row["first_confidence"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: not a prediction ({type(error).__name__}: {error}); each line needs id, label, "
                "rationale, confidence and first_confidence"
            ) from None
        if name not in by_id:
            raise ValueError(
                f"{where}: {name!r} is none of the {len(records)} records of task {task!r} that are "
                "evaluated; give the data settings that the predictions were made with"
            )
        if row.get("question") != by_id[name].question:
            raise ValueError(f"{where}: {name!r} has another question in the data that is loaded now")
        explained = None if rationale is None else Answer(rationale, 1.0, 1.0)
        predictions.append(prediction(by_id[name], Answer(label, *confidences), explained))
    if not predictions:
        raise ValueError(f"{path} is empty: there are no predictions to evaluate")
    return predictions
