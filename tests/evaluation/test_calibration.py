"""Calibration: against torchmetrics, against formulas written another way, and in the awkward cases."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise
from statistics import mean

import numpy as np
import pytest

from ibdistill.evaluation import calibration


def answers(n: int, seed: int, digits: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident answers; `digits` rounds, for ties."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(4, 1.5, n)
    correct = (rng.random(n) < confidence**2).astype(int)
    return (confidence if digits is None else confidence.round(digits)), correct


@pytest.mark.parametrize("n", [1, 7, 100, 1001])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_is_that_of_torchmetrics(n, bins):
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, correct = answers(n, seed=n + bins)
    theirs = binary_calibration_error(torch.tensor(confidence), torch.tensor(correct), n_bins=bins)
    assert calibration.equal_width(confidence, correct, bins).error == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("n", [15, 150, 1001])
def test_measures_equal_loops_over_answers(n):
    confidence, correct = answers(n, seed=n)
    pairs = sorted(zip(confidence.tolist(), correct.tolist(), strict=True))
    width = 0.0
    for low in range(15):
        inside = [p for p in pairs if low <= p[0] * 15 < low + 1]
        if inside:
            gap = mean(c for c, _ in inside) - mean(y for _, y in inside)
            width += len(inside) / n * abs(gap)
    assert calibration.equal_width(confidence, correct).error == pytest.approx(width, abs=1e-12)

    # the first n % 15 bins hold one more
    sizes = [n // 15 + (i < n % 15) for i in range(15)]
    mass, start = 0.0, 0
    for size in sizes:
        inside = pairs[start : start + size]
        mass += abs(sum(c - y for c, y in inside)) / n
        start += size
    assert calibration.equal_mass(confidence, correct).error == pytest.approx(mass, abs=1e-12)

    assert calibration.brier(confidence, correct) == pytest.approx(mean((c - y) ** 2 for c, y in pairs))
    risks = [mean(1 - y for _, y in pairs[n - k :]) for k in range(1, n + 1)]
    coverage, risk = calibration.risk_coverage(confidence, correct)
    assert coverage.tolist() == pytest.approx([k / n for k in range(1, n + 1)])
    assert risk.tolist() == pytest.approx(risks)
    assert calibration.summary(confidence, correct)["aurc"] == pytest.approx(mean(risks))
    assert risk[-1] == pytest.approx(1 - correct.mean())


def test_the_adaptive_error_takes_the_most_bins_whose_accuracies_rise():
    confidence, correct = answers(400, seed=3)
    chosen = calibration.adaptive(confidence, correct)
    bins = len(chosen.count)
    assert bins > 2 and (np.diff(chosen.accuracy) >= 0).all()
    assert (np.diff(calibration.equal_mass(confidence, correct, bins + 1).accuracy) < 0).any()
    # a student that is always right
    assert len(calibration.adaptive(confidence, np.ones(400)).count) == 400
    # falling accuracies: one bin is left, and the error is the gap of the means
    falling = calibration.adaptive([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0])
    assert len(falling.count) == 1 and falling.error == pytest.approx(0.0)


def _exact_sweep(confidence: list[float], correct: list[int]) -> tuple[int, Fraction]:
    """Number of bins and error of the monotonic sweep, answer by answer in fractions."""
    n = len(confidence)
    tied = {c: [y for other, y in zip(confidence, correct, strict=True) if other == c] for c in confidence}
    ordered = [(Fraction(c), Fraction(sum(tied[c]), len(tied[c]))) for c in sorted(confidence)]
    best = None
    for bins in range(1, n + 1):
        parts, start = [], 0
        for i in range(bins):
            size = n // bins + (i < n % bins)
            parts.append(ordered[start : start + size])
            start += size
        accuracies = [sum(y for _, y in part) / len(part) for part in parts]
        if any(after < before for before, after in pairwise(accuracies)):
            break
        best = bins, sum(abs(sum(c - y for c, y in part)) for part in parts) / n
    return best


def test_the_adaptive_error_of_ties_is_that_of_exact_fractions():
    """Equal accuracies, of which rounding makes one the smaller, do not end the sweep."""
    confidence = [0.2, 0.7, 0.1, 0.1, 0.7, 0.7, 0.1, 0.1, 0.7, 0.7, 0.1]
    correct = [0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0]
    assert len(calibration.adaptive(confidence, correct).count) == 11
    rng = random.Random(0)
    for _ in range(2000):
        n, levels = rng.randint(1, 24), rng.randint(1, 9)
        confidence = [rng.randint(0, levels) / levels for _ in range(n)]
        correct = [int(rng.random() < 0.2 + 0.7 * c) for c in confidence]
        bins, error = _exact_sweep(confidence, correct)
        chosen = calibration.adaptive(confidence, correct)
        assert len(chosen.count) == bins and chosen.error == pytest.approx(float(error), abs=1e-12)


def test_the_adaptive_error_of_ties_of_many_sizes_has_no_overflow():
    """Ties of 1 .. 60 answers, half of which are right, share a denominator beyond 64 bits."""
    sizes = range(1, 61)
    confidence = [size / 60 for size in sizes for _ in range(size)]
    correct = [int(i < size / 2) for size in sizes for i in range(size)]
    bins, error = _exact_sweep(confidence, correct)
    chosen = calibration.adaptive(confidence, correct)
    assert len(chosen.count) == bins and chosen.error == pytest.approx(float(error), abs=1e-12)


@pytest.mark.parametrize("bins", [3, 7, 10, 15])
def test_a_confidence_on_a_limit_lies_in_the_bin_that_begins_there(bins):
    for i in range(bins):
        assert calibration.equal_width([i / bins], [1], bins).edges.tolist() == [[i / bins, (i + 1) / bins]]


def test_it_is_near_zero_for_a_calibrated_student_and_the_adaptive_one_is_less_biased():
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    correct = (rng.random(20_000) < confidence).astype(int)
    values = calibration.summary(confidence, correct)
    assert values["ece"] < 0.02 and values["ece_mass"] < 0.02 and values["ece_adaptive"] < 0.02
    assert values["brier"] == pytest.approx(1 / 6, abs=0.005)  # E[c (1 - c)]
    few = [calibration.summary(c, y) for c, y in (_calibrated(60, seed) for seed in range(40))]
    assert mean(v["ece_adaptive"] for v in few) < mean(v["ece_mass"] for v in few)


def _calibrated(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    return confidence, (rng.random(n) < confidence).astype(int)


def test_the_order_of_records_changes_nothing_even_with_ties():
    confidence, correct = answers(300, seed=5, digits=1)
    expected = calibration.summary(confidence, correct)
    for seed in range(5):
        order = list(range(300))
        random.Random(seed).shuffle(order)
        assert calibration.summary(confidence[order], correct[order]) == pytest.approx(expected, abs=1e-12)
    # all answers tied: risk is flat, and every kind of bin sees the same gap
    flat = calibration.summary([0.7] * 10, [1] * 4 + [0] * 6)
    assert flat["ece"] == pytest.approx(0.3) and flat["ece_mass"] == pytest.approx(0.3)
    assert flat["ece_adaptive"] == pytest.approx(0.3) and flat["aurc"] == pytest.approx(0.6)


def test_edges_of_the_scale_belong_to_a_bin():
    bins = calibration.equal_width([0.0, 0.2, 1.0, 1.0 + 5e-8], [0, 1, 1, 1], bins=5)
    assert bins.count.tolist() == [1, 1, 2]
    assert bins.edges.tolist() == pytest.approx(np.array([[0, 0.2], [0.2, 0.4], [0.8, 1.0]]))


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "not empty"),
        ([0.5, 0.5], [1], "the same length"),
        ([0.5, 1.5], [1, 0], "in \\[0, 1\\]"),
        ([0.5, float("nan")], [1, 0], "in \\[0, 1\\]"),
        ([0.5], [2], "only 0 and 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        calibration.summary(confidence, correct)
