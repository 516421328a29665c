"""Calibration: against torchmetrics, against formulas written another way, and in the awkward cases."""

from __future__ import annotations

import random
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
