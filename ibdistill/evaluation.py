"""Greedy decoding of a split over all ranks, and its scores.

Rank r decodes records r, r + world size, ...; shares may be uneven. The texts are gathered,
so every rank computes the same scores from all of them, each record counted exactly once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU
from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill import data, distributed, families
from ibdistill.config import DataConfig
from ibdistill.distributed import World
from ibdistill.records import Record
from ibdistill.tasks import TASKS

logger = logging.getLogger("ibdistill")


@dataclass(frozen=True)
class Prediction:
    """What the student said to one record."""

    record: Record
    label: str
    rationale: str | None
    """None if the explain stream was not decoded."""
    correct: bool


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    streams: Sequence[str],
    config: DataConfig,
    world: World,
    batch_size: int = 64,
) -> list[Prediction]:
    """Decode `records`, all of one task. Collective; every rank gets all predictions, in order."""
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
    share = {i: texts for i, *texts in zip(mine, labels, rationales, strict=True)}
    texts = {i: pair for part in distributed.gather_objects(share) for i, pair in part.items()}
    is_correct = TASKS[records[0].task].is_correct
    return [
        Prediction(record, *texts[i], correct=is_correct(texts[i][0], record))
        for i, record in enumerate(records)
    ]


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
) -> list[str]:
    """The greedy answers to `questions` (prefix included), in order. Batches are of similar length."""
    decoder_only, layout = families.family(model) == families.DECODER_ONLY, families.layout(model, tokenizer)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    answers = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = [questions[i] for i in rows]
        if decoder_only:
            input_ids, mask = data.prompts(texts, tokenizer, max_question_tokens, **layout)
        else:
            inputs = tokenizer(
                texts, padding=True, truncation=True, max_length=max_question_tokens, return_tensors="pt"
            )
            input_ids, mask = inputs.input_ids, inputs.attention_mask
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        if decoder_only:
            output = output[:, input_ids.shape[1] :]
        for i, text in zip(rows, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            answers[i] = text
    return answers


def scores(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Accuracy (share, 0..1) and, if rationales were decoded, their BLEU (0..100, sacrebleu's default)."""
    result = {"accuracy": sum(p.correct for p in predictions) / len(predictions)}
    explained = [p for p in predictions if p.record.rationale and p.rationale is not None]
    if explained:
        bleu = BLEU(force=True).corpus_score(
            [p.rationale for p in explained], [[p.record.rationale for p in explained]]
        )
        result["rationale_bleu"] = bleu.score
        result["rationale_words"] = sum(len(p.rationale.split()) for p in explained) / len(explained)
    return result


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One JSON object a line: id, question, gold, label, correct, gold_rationale, rationale."""
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
        "gold_rationale": p.record.rationale,
        "rationale": p.rationale,
    }
