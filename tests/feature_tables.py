"""Token tables of made-up records, whose ids tell record and place."""

from __future__ import annotations

import numpy as np

from ibdistill.data.features import Features, Ragged


def features_of(lengths: list[tuple[int, int, int]], groups: list[int] | None = None) -> Features:
    """Records with the given (question, label, rationale) token counts; token ids tell record and place."""
    rows = range(len(lengths))
    ragged = [Ragged([np.arange(lengths[i][part]) + 100 * i + 10 for i in rows]) for part in range(3)]
    return Features(
        ids=[f"r{i}" for i in rows],
        groups=np.array(groups or [0] * len(lengths)),
        questions={"predict": ragged[0], "explain": ragged[0]},
        targets={"predict": ragged[1], "explain": ragged[2]},
    )


def random_features(n: int, seed: int = 0, groups: list[int] | None = None) -> Features:
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.integers(5, 80, n), rng.integers(1, 9, n), rng.integers(0, 90, n)], axis=1)
    return features_of([tuple(row) for row in lengths.tolist()], groups)
