"""Does a student know when it is right? Confidence against correctness of whole answers.

A confidence is a probability that the student gave its own greedy answer: the *sequence*
confidence is that of the whole answer, the product of its tokens' probabilities, end token
included; the *first-token* confidence is that of its first token alone. An answer is correct
by the rule of its task. Everything here is a function of these two arrays, one entry per answer:
`confidence` [n] in [0, 1] and `correct` [n] 0 or 1. The public code of this field compares an
answer's tokens with a single predicted token, so its accuracy is always 0.

Equal confidences are interchangeable: where a measure needs an order (bins of equal mass,
coverage), each answer of a tie counts with the tie's mean correctness, so that the order of the
records changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BINS = 15
"""Bins of `ece` and `ece_mass`, as in Guo et al., ICML 2017."""


@dataclass(frozen=True)
class Bins:
    """Answers in bins of confidence; empty bins are left out."""

    edges: np.ndarray
    """[bins, 2] lowest and highest confidence: a bin's limits (equal width) or what it holds (equal mass)."""
    count: np.ndarray
    """[bins] number of answers; a tie may lie in two bins of equal mass, and counts in each by its share."""
    confidence: np.ndarray
    """[bins] mean confidence."""
    accuracy: np.ndarray
    """[bins] mean correctness."""

    @property
    def error(self) -> float:
        """The calibration error of these bins: mean over answers of |accuracy - confidence| of their bin."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.count * gaps).sum() / self.count.sum())


def checked(confidence: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [n]. Raises ValueError if they are empty, differ in length, or are out of range."""
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            f"confidence has shape {confidence.shape} and correct {correct.shape}; they must be two lists of "
            "the same length, one entry per answer, and not empty"
        )
    # a product of rounded probabilities may exceed 1 by a few units in the last place
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
        raise ValueError(
            f"confidences lie in {confidence.min()} .. {confidence.max()}; they must be in [0, 1]"
        )
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("correct must hold only 0 and 1")
    return confidence.clip(0, 1), correct


def equal_width(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> Bins:
    """Bins [i / bins, (i + 1) / bins), the last one closed."""
    confidence, correct = checked(confidence, correct)
    limits = np.arange(bins + 1) / bins  # rounded once: linspace(0, 1, 11)[3] is above 0.3
    index = np.searchsorted(limits[1:-1], confidence, side="right")
    count = np.bincount(index, minlength=bins)
    used = np.flatnonzero(count)
    sums = [np.bincount(index, weights, minlength=bins)[used] for weights in (confidence, correct)]
    edges = np.stack([limits[used], limits[used + 1]], axis=1)
    return Bins(edges, count[used], *(part / count[used] for part in sums))


def equal_mass(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> Bins:
    """Bins whose sizes differ by at most one answer; with fewer answers than bins, one answer per bin."""
    return _split(*_ordered(*checked(confidence, correct)), bins)


def adaptive(confidence: ArrayLike, correct: ArrayLike) -> Bins:
    """Bins of equal mass, as many as keep their accuracies from falling as confidence rises.

    The monotonic sweep of Roelofs et al., "Mitigating Bias in Calibration Error Estimation",
    AISTATS 2022: add bins until an accuracy is below that of the bin before it. A fixed number
    of bins overestimates the error where each holds few answers. Accuracies are compared as exact
    fractions, since with ties many are equal, and rounding would make one of them the smaller.
    """
    confidence, correct = checked(confidence, correct)
    _, tie, count = np.unique(confidence, return_inverse=True, return_counts=True)
    right = [round(k) for k in np.bincount(tie, correct)]
    # In units of 1 / scale every tie's mean is a whole number, and so are the sums of a bin.
    scale = math.lcm(*(n // math.gcd(k, n) for k, n in zip(right, count.tolist(), strict=True)))
    means = [k * scale // n for k, n in zip(right, count.tolist(), strict=True)]
    fits = scale * len(correct) ** 2 < 2**62  # else Python's own integers, which have no limit
    sums = np.cumsum(np.repeat(np.array([0, *means], dtype=np.int64 if fits else object), [1, *count]))
    bins = 1
    while bins < len(correct) and _rises(sums, bins + 1):
        bins += 1
    return equal_mass(confidence, correct, bins)


def brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean squared difference between confidence and correctness of the given answers (Brier, 1950)."""
    confidence, correct = checked(confidence, correct)
    return float(np.square(confidence - correct).mean())


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, risk), both [n]: answering only the k most confident questions, k = 1 .. n.

    Coverage is k / n, risk the share of wrong answers among those k (El-Yaniv and Wiener, JMLR 2010).
    """
    _, correct = _ordered(*checked(confidence, correct))
    answered = np.arange(1, len(correct) + 1)
    return answered / len(correct), np.cumsum(1 - correct[::-1]) / answered


def summary(confidence: ArrayLike, correct: ArrayLike) -> dict[str, float]:
    """All measures, as shares (0..1).

    `confidence` is the mean; `ece` and `ece_mass` are calibration errors over `BINS` bins of equal width and
    of equal mass; `ece_adaptive` is that of `adaptive`; `brier`; and `aurc` is the mean risk over all
    coverages. Smaller is better for all but `confidence`.
    """
    _, risk = risk_coverage(confidence, correct)
    return {
        "confidence": float(checked(confidence, correct)[0].mean()),
        "ece": equal_width(confidence, correct).error,
        "ece_mass": equal_mass(confidence, correct).error,
        "ece_adaptive": adaptive(confidence, correct).error,
        "brier": brier(confidence, correct),
        "aurc": float(risk.mean()),
    }


def _ordered(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both [n] by rising confidence, where the members of a tie have the tie's mean correctness."""
    values, tie, count = np.unique(confidence, return_inverse=True, return_counts=True)
    means = np.bincount(tie, correct) / count
    return np.repeat(values, count), np.repeat(means, count)


def _rises(sums: np.ndarray, bins: int) -> bool:
    """Whether no bin's accuracy is below that of the bin before it. `sums` [n + 1] are whole numbers: those
    of the correctness of the first 0 .. n answers, in any unit."""
    count = _sizes(len(sums) - 1, bins)
    ends = np.concatenate([[0], np.cumsum(count)])
    total = np.diff(sums[ends])
    return bool((total[1:] * count[:-1] >= total[:-1] * count[1:]).all())


def _sizes(n: int, bins: int) -> np.ndarray:
    """[bins] numbers of answers that differ by at most one, the larger bins first."""
    size, larger = divmod(n, bins)
    return np.where(np.arange(bins) < larger, size + 1, size)


def _split(confidence: np.ndarray, correct: np.ndarray, bins: int) -> Bins:
    """Ordered answers in `bins` bins, or in as many as there are answers if these are fewer."""
    count = _sizes(len(confidence), min(bins, len(confidence)))
    start = np.cumsum(count) - count
    means = [np.add.reduceat(values, start) / count for values in (confidence, correct)]
    return Bins(np.stack([confidence[start], confidence[start + count - 1]], axis=1), count, *means)
