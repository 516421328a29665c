"""Text scores: formulas written another way, texts with known scores."""

from __future__ import annotations

import random
import sys
import time
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


def test_rouge_l_equals_the_table_of_lengths():
    """The textbook's table, on texts of up to 200 words of small and large vocabularies."""
    rng = random.Random(0)
    for n, m, words in [(1, 1, 2), (63, 64, 3), (64, 65, 2), (65, 200, 5), (200, 130, 40), (150, 150, 1)]:
        ours, theirs = ([str(rng.randrange(words)) for _ in range(k)] for k in (n, m))
        table = [[0] * (m + 1) for _ in range(n + 1)]
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        expected = 2 * table[n][m] / (n + m)
        assert text_scores.rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(expected)


def test_rouge_l_of_very_long_texts_is_bounded():
    """The first `MAX_WORDS` words count, in bounded time and memory."""
    limit = text_scores.MAX_WORDS
    start = time.process_time()
    many = " ".join(str(i) for i in range(limit))
    assert text_scores.rouge_l(many + " 0" * 10**6, many + " x" * 10**6) == 1.0
    assert text_scores.rouge_l("a " * 10**6, "b " * 10**6) == 0.0
    assert text_scores.rouge_l("a" * 10**6, "a" * 10**6) == 1.0
    assert text_scores.rouge_l("a " * 10**6, "a") == pytest.approx(2 / (limit + 1))
    assert time.process_time() - start < 5  # a table would take an hour


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
