"""Targets of 8,192 tokens in a packed row beside short ones: losses and gradients.

`tests/ops/test_memory.py` has the logits that exist at once.
"""

from __future__ import annotations

import pytest
import torch
from feature_tables import features_of
from tiny_models import tiny
from torch.nn import functional as F

from ibdistill.config.sections import ObjectiveConfig
from ibdistill.data import batches
from ibdistill.models import forward
from ibdistill.models.fused import fused
from ibdistill.objectives.distillation import Distillation
from ibdistill.objectives.weights import step_weights


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_of_a_target_of_8192_tokens(checkpointing):
    table = features_of([(9, 2, 8192), (20, 1, 30)])
    for part in (*table.questions.values(), *table.targets.values()):
        part.flat[:] = part.flat % 400 + 1
    layout = {"pad": 0, "start": None, "separator": 5}
    packed, padded = (
        batches.collate(table, [0, 1], ("predict", "explain"), packed=on, **layout) for on in (True, False)
    )
    model = fused(tiny("qwen2", max_position_embeddings=16384))
    with torch.no_grad():
        hidden = forward.states(model, padded).targets
        logits = {s: model.get_output_embeddings()(h) for s, h in hidden.items()}
        expected = sum(
            0.5 * F.cross_entropy(logits[s], packed.labels[s], reduction="sum") / len(packed.labels[s])
            for s in logits
        )
    if checkpointing:
        model.activation_checkpointing_enable()
    objective = ObjectiveConfig(method="dss")
    counts = {s: len(labels) for s, labels in packed.labels.items()} | {"questions": 2, "explained": 2}
    loss, _ = Distillation(model.train(), objective)(packed, step_weights(objective, counts))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
