"""Text scores: formulas written another way, texts with known scores."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from ibdistill.evaluation import text_scores


def test_rouge_l_equals_a_recursion_over_subsequences():
    def by_recursion(a: tuple, b: tuple) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return by_recursion(a[:-1], b[:-1]) + 1
        return max(by_recursion(a[:-1], b), by_recursion(a, b[:-1]))

    pairs = [
        ("a b c d", "b d"),
        ("the cat the mat", "mat the cat the"),
        ("A b", "a B"),
        ("x", "y"),
        ("a a a", "a a"),
    ]
    for ours, theirs in pairs:
        a, b = tuple(ours.lower().split()), tuple(theirs.lower().split())
        assert text_scores.rouge_l(ours, theirs) == pytest.approx(2 * by_recursion(a, b) / (len(a) + len(b)))
    assert text_scores.rouge_l("", "a") == text_scores.rouge_l("", "") == 0.0
    scores = text_scores.text_scores(["a b c d", "start n0 ."], ["a b c d", "start n0 ."])
    assert scores == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 100, "words": 3.5})


def test_embedding_cosine_is_the_mean_over_pairs(monkeypatch, tmp_path):
    import numpy as np

    class Encoder:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def encode(self, texts, show_progress_bar):
            return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder))
    encoder = text_scores.load_encoder(str(tmp_path))
    cosine = text_scores.embedding_cosine(encoder, ["aa", "b"], ["aa", "bbb"])
    assert cosine == pytest.approx((1 + 4 / (2**0.5 * 10**0.5)) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="must be the folder of a downloaded model"):
        text_scores.load_encoder(str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        text_scores.load_encoder(str(tmp_path))
