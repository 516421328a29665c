"""How often the host waits for a GPU in the parts of a train step."""

from __future__ import annotations

import pytest
import torch
from feature_tables import features_of
from syncs import GPU, counted
from tiny_models import ENCODER_DECODER_SHAPES, config_of
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ibdistill.config.sections import ObjectiveConfig
from ibdistill.data import batches
from ibdistill.models import forward
from ibdistill.models.fused import fused
from ibdistill.monitor.meter import Meter
from ibdistill.objectives import distillation
from ibdistill.objectives.teacher_answers import TeacherAnswer
from ibdistill.objectives.weights import step_weights
from ibdistill.ops import implementation
from ibdistill.ops.head_loss.arguments import TeacherStream


def step_of(model_type: str, measures: bool, packed: bool = False) -> list[str]:
    """Everything of a train step but the engine and the optimizer: where the host waited."""
    is_pair = model_type in ENCODER_DECODER_SHAPES
    auto = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    objective = ObjectiveConfig(method="ib+kd", beta=0.1, estimator="vid")
    streams = ("predict", "explain")
    features = features_of([(9, 2, 7), (4, 5, 2), (13, 1, 3)])
    layout = {"pad": 0, "start": 0, "separator": None if is_pair else 5, "packed": packed}
    on_host = batches.collate(features, [0, 1, 2], streams, **layout)
    counts = {name: 10 for name in ("predict", "explain", "explained", "question_tokens")}
    with torch.device(GPU):
        model = fused(auto.from_config(config_of(model_type))).train()
        module = distillation.Distillation(model, objective, teacher_width=24)
    module.head.measures = measures
    meter = Meter()
    with counted() as syncs:
        batch = on_host.to(torch.device(GPU))
        new = lambda rows: torch.empty(rows, 24, device=GPU)  # noqa: E731
        targets = {name: TeacherStream(new(len(labels))) for name, labels in batch.labels.items()}
        head = torch.empty(model.config.vocab_size, 24, device=GPU)
        answer = TeacherAnswer(new(len(batch.question_positions)), targets, head)
        weights = step_weights(objective, counts)
        loss, terms = module(batch, weights, answer, counts["question_tokens"])
        loss.backward()
        meter.add(on_host, terms)
        meter.end_step(counts, 0.0, norm=torch.ones((), device=GPU))
    assert batch.labels["predict"].device.type == GPU and meter._tokens == on_host.num_tokens
    return syncs.places


@pytest.mark.parametrize("model_type", ["t5", "llama", "gpt2", "gemma2", "opt"])
def test_a_step_waits_for_nothing(model_type, monkeypatch):
    """The one wait of a whole step, for the norm of the gradients, is DeepSpeed's.

    All other types but mixtures of experts do the same; these route tokens by `nonzero`.
    """
    monkeypatch.setattr(implementation, "on_gpu", lambda x: x.device.type == GPU)
    places = step_of(model_type, measures=True)
    assert places == [], places


def test_transformers_masks_would_wait(monkeypatch):
    """What the test above would find if `_decoder_only` gave no mask, and if T5 did not know its device."""
    with monkeypatch.context() as patched:
        patched.setattr(forward, "no_padding", lambda ids: None)
        assert [place.split(":")[0] for place in step_of("qwen2", False)] == ["forward.py"]
    assert [place.split(":")[0] for place in step_of("t5", False)] == ["fused.py"] * 3


@pytest.mark.parametrize("model_type", ["t5", "llama", "gpt2"])
def test_nothing_waits_for_packed_rows(model_type):
    assert step_of(model_type, measures=False, packed=True) == []
