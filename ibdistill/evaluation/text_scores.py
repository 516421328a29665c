"""How close a written rationale is to a reference."""

from __future__ import annotations
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
import torch
from sacrebleu.metrics import BLEU, CHRF
from ibdistill.data import answers
from ibdistill.data.arithmetic import evaluate
from ibdistill.data.tasks.demo import implied_label
from ibdistill.data.formats import NLI_LABELS
from ibdistill.data.records import Record
from ibdistill.data.loading import TASKS


Encoder = Any
"""A `sentence_transformers.SentenceTransformer`; the package is optional."""


def text_scores(rationales: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`bleu` and `chrf` of the corpus (sacrebleu's defaults, 0..100), `rouge_l` (mean F1 of words, 0..100),
    `words` (mean length)."""
    n = len(rationales)
    return {
        "bleu": BLEU(force=True).corpus_score(rationales, [references]).score,
        "chrf": CHRF().corpus_score(rationales, [references]).score,
        "rouge_l": 100 * sum(map(rouge_l, rationales, references)) / n,
        "words": sum(len(text.split()) for text in rationales) / n,
    }


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-case words (Lin 2004), in 0..1.

    Words are what spaces separate. (The package rouge-score keeps letters and digits only, which would
    drop the operators of a rationale.)
    """
    ours, theirs = text.casefold().split(), reference.casefold().split()
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, start=1):
            diagonal, lengths[j] = (
                lengths[j],
                diagonal + 1 if word == other else max(lengths[j], lengths[j - 1]),
            )
    return 2 * lengths[-1] / (len(ours) + len(theirs)) if ours and theirs else 0.0


def load_encoder(folder: str) -> Encoder:
    """A local sentence-transformers model. Raises ValueError if the package or the folder is missing."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            "eval.embedding_model needs the package sentence-transformers: pip install sentence-transformers"
        ) from None
    if not Path(folder).is_dir():
        raise ValueError(f"eval.embedding_model is {folder!r}; it must be the folder of a downloaded model")
    return SentenceTransformer(folder)


def embedding_cosine(encoder: Encoder, rationales: Sequence[str], references: Sequence[str]) -> float:
    """Mean cosine (-1..1) of each rationale's and its reference's sentence embedding."""
    ours, theirs = (
        torch.as_tensor(encoder.encode(list(texts), show_progress_bar=False))
        for texts in (rationales, references)
    )
    return float(torch.cosine_similarity(ours, theirs, dim=1).mean())
