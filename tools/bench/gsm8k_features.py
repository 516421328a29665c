"""Token tables of GSM8K's training split for benchmarks: read from its files, or drawn in like lengths."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from ibdistill.config.load import load_settings
from ibdistill.data import loading, tokenizers
from ibdistill.data.features import Features, Ragged
from ibdistill.data.tokenizing import tokenize

PIECES = 4000
"""Tokens of the vocabulary."""


def read_features(folder: str) -> Features:
    """GSM8K's training split from its folder, as ids of a tokenizer that is trained on it."""
    settings = load_settings(None, {"data.task": "gsm8k", "data.path": folder}).data
    records = loading.load(settings, needs_rationale=True).train
    texts = (text for r in records for text in (r.question, r.label, r.rationale))
    with tempfile.TemporaryDirectory() as target:
        tokenizer = tokenizers.train_tokenizer(texts, PIECES, Path(target))
    return tokenize(records, {"gsm8k": loading.TASKS["gsm8k"].prefixes}, tokenizer, settings)


def generate_features(records: int = 6725) -> Features:
    """Random ids in log-normal lengths, which are fitted to GSM8K's training split in 4000 pieces.

    The logarithm of a question's length, prefix included, has mean 4.12 and deviation 0.35, that of a
    rationale's 4.07 and 0.50, and their correlation is 0.52. Labels have 2 tokens (78 %) or 3, end tokens
    included.
    """
    rng = np.random.default_rng(0)
    x, y = rng.multivariate_normal([0, 0], [[1, 0.52], [0.52, 1]], records).T
    question, rationale = np.exp(4.12 + 0.35 * x).clip(8, 1024), np.exp(4.07 + 0.50 * y).clip(4, 256)
    lengths = [question, 2 + (rng.random(records) > 0.78), rationale]
    q, t, r = (Ragged([rng.integers(3, PIECES, int(n)) for n in part]) for part in lengths)
    questions, targets = {"predict": q, "explain": q}, {"predict": t, "explain": r}
    return Features([str(i) for i in range(records)], np.zeros(records, dtype=int), questions, targets)


LENGTHS = {
    "gsm8k": ((4.12, 0.35, 8, 1024), (4.07, 0.50, 4, 256)),
    "long": ((4.5, 0.5, 8, 512), (6.3, 0.7, 16, 4096)),
}
"""Mean and deviation of the logarithm of a length and its bounds, of questions and of rationales. gsm8k:
fitted to its training split in 4,000 pieces, with their correlation of 0.52; long: made up, medians 90
and 545."""


def draw(lengths: str, family: str, records: int = 2000) -> Features:
    """Random ids in these lengths; answers have 3 tokens."""
    rng = np.random.default_rng(0)
    normal = rng.multivariate_normal([0, 0], [[1, 0.52], [0.52, 1]], records).T
    drawn = [
        np.exp(m + d * part).clip(low, high).astype(int)
        for part, (m, d, low, high) in zip(normal, LENGTHS[lengths], strict=True)
    ]
    questions, rationales, answers = (
        Ragged([rng.integers(3, PIECES, n) for n in part]) for part in (*drawn, np.full(records, 3))
    )
    ids, groups = [str(i) for i in range(records)], np.zeros(records, dtype=int)
    if family == "t5":
        both = {"predict": questions, "explain": questions}
        return Features(ids, groups, both, {"predict": answers, "explain": rationales})
    return Features(ids, groups, {"reason": questions}, {"rationale": rationales, "answer": answers})
