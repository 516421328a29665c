"""How close a written rationale is to a reference: BLEU and chrF (sacrebleu), ROUGE-L and the cosine of
sentence embeddings.

These scores compare wording. A rationale may be right and far from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU, CHRF

MAX_WORDS = 10_000
"""Words of a text that ROUGE-L looks at. A pair of this length takes 0.03 s and some MB. No rationale is so
long, but a damaged reference may be, and time grows with the product of the lengths."""
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
    drop the operators of a rationale.) Of each text the first `MAX_WORDS` words count.

    The length is computed as in Hyyrö, "Bit-parallel LCS-length computation revisited" (2004): a bit for each
    word of the reference, and one addition of long integers for each word of the text.
    """
    ours, theirs = (t.casefold().split(maxsplit=MAX_WORDS)[:MAX_WORDS] for t in (text, reference))
    if not ours or not theirs:
        return 0.0
    places: dict[str, int] = {}
    for i, word in enumerate(theirs):
        places[word] = places.get(word, 0) | 1 << i
    ones = (1 << len(theirs)) - 1
    open_ = ones  # a bit is 0 where the subsequence has grown by the word of the reference there
    for word in ours:
        matched = open_ & places.get(word, 0)
        open_ = ((open_ + matched) | (open_ - matched)) & ones
    return 2 * (len(theirs) - open_.bit_count()) / (len(ours) + len(theirs))


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
