"""Intervals around means, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np

_RESAMPLES = 2000
_T = "12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131".split()


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t.

    Beyond the table it is the expansion in 1 / degrees (Fisher and Cornish, 1960), within 0.001 there.
    """
    if degrees <= len(_T):
        return float(_T[degrees - 1])
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval, which is NaN for a single value."""
    n = len(values)
    if n == 1:
        return values[0], math.nan
    return mean(values), t_quantile(n - 1) * stdev(values) / math.sqrt(n)


def bootstrap(values: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The 95 % interval of the mean of each column of [questions, scores], over questions.

    Whole questions are drawn with replacement, so that samples of one question stay together (the percentile
    bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3). The draws are
    the same in each call.
    """
    table = np.asarray(values, dtype=np.float64)
    generator, n = np.random.default_rng(0), len(table)
    means = [table[generator.integers(n, size=n)].mean(0) for _ in range(_RESAMPLES)]
    return [(float(low), float(high)) for low, high in np.percentile(means, (2.5, 97.5), axis=0).T]


def pass_at_k(n: int, right: int, k: int) -> float:
    """An unbiased estimate of the probability that one of k samples is right, from n samples: 1 minus the
    share of the sets of k of them that hold no right one (Chen et al., "Evaluating Large Language Models
    Trained on Code", 2021, section 2.1)."""
    assert 0 <= right <= n and 1 <= k <= n, (n, right, k)
    return 1 - math.comb(n - right, k) / math.comb(n, k)
