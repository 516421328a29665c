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
