"""Rows that are padded to a multiple of 8, as on a GPU: the losses and gradients are those without."""

from __future__ import annotations

import pytest
import torch
from feature_tables import features_of
from tiny_models import SHAPES, T5
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ibdistill.config import sections
from ibdistill.data import batches
from ibdistill.objectives import distillation
from ibdistill.objectives.weights import step_weights
from ibdistill.runtime import hardware


@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen2"])
def test_wider_padding_changes_no_loss_and_no_gradient(name):
    """A ragged batch with an empty rationale; fp64."""
    torch.manual_seed(0)
    if name == "t5":
        model, layout = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5)), {}
    else:
        config = AutoConfig.for_model(name, **SHAPES[name])
        model, layout = AutoModelForCausalLM.from_config(config), {"separator": 5}
    objective = sections.ObjectiveConfig(method="ib", estimator="paper", beta=0.1)
    module = distillation.Distillation(model.double().eval(), objective)
    features = features_of([(11, 2, 7), (4, 5, 0), (13, 1, 3)])
    found = []
    for multiple in (1, 8):
        batch = batches.collate(
            features, [0, 1, 2], ("predict", "explain"), pad=0, start=0, multiple=multiple, **layout
        )
        widths = [ids.shape[1] for ids in (batch.input_ids, *batch.decoder_input_ids.values())]
        assert (multiple == 1) == any(width % 8 for width in widths)
        module.zero_grad()
        weights = step_weights(objective, {"predict": 8, "explain": 10, "questions": 3, "explained": 2})
        loss, _ = module(batch, weights, None, 28)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]))
    (loss, gradients), (wide, others) = found
    torch.testing.assert_close(wide, loss, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("device", "positions", "multiple"),
    [("cpu", 256, 1), ("cuda", 256, 8), ("cuda", None, 8), ("cuda", 1021, 1)],
)
def test_widths_are_rounded_on_a_gpu_as_far_as_positions_allow(device, positions, multiple):
    assert hardware.width_multiple(torch.device(device), positions) == multiple
