"""The estimator vib in a run: its loss against transformers' forward, ZeRO, resuming, export, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from feature_tables import random_features
from harness import same, steps, weights
from tiny_t5 import SHAPE
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig, ObjectiveConfig
from ibdistill.data import batches
from ibdistill.data.sampler import Sampler
from ibdistill.models.fused import fused
from ibdistill.objectives import distillation
from ibdistill.objectives import weights as objectives_weights

VIB = {"objective.method": "ib", "objective.estimator": "vib", "objective.beta": 0.01}


def test_loss_and_gradients_equal_transformers_forward_on_noisy_encoder_states():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE)).double().eval()
    objective = ObjectiveConfig(method="ib", estimator="vib", alpha=0.3, beta=0.05)
    features = random_features(40)
    plan = Sampler(features, DataConfig(), batch_size=6, seed=0)
    batch = batches.collate(features, plan.step(0), ("predict", "explain"), pad=0, start=0)
    wrapped = distillation.Distillation(model, objective).double()
    wrapped.head.measures = True
    g = wrapped.vib.log_variance
    torch.nn.init.normal_(g)
    counts = plan.counts(0)
    torch.manual_seed(5)
    loss, terms = wrapped(
        batch, objectives_weights.step_weights(objective, counts), question_tokens=counts["question_tokens"]
    )
    loss.backward()
    ours = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}

    wrapped.zero_grad()
    torch.manual_seed(5)
    encoded = model.encoder(batch.input_ids, attention_mask=batch.attention_mask)[0]
    noisy = encoded + torch.exp(g / 2) * torch.randn_like(encoded)
    expected = 0.0
    for index, (stream, share) in enumerate({"predict": 0.3, "explain": 0.7}.items()):
        rows = slice(6 * index, 6 * index + 6)
        labels = torch.full(batch.decoder_input_ids[stream].shape, -100).flatten()
        labels[batch.positions[stream]] = batch.labels[stream]
        expected = (
            expected
            + share
            * model(
                encoder_outputs=BaseModelOutput(noisy[rows]),
                attention_mask=batch.attention_mask[rows],
                labels=labels.view(6, -1),
            ).loss
        )
    means = encoded[batch.attention_mask.bool()]
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(means, torch.exp(g / 2)), torch.distributions.Normal(0.0, 1.0)
    )
    expected = expected + 0.05 * divergence.sum() / counts["question_tokens"]
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    theirs = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() >= {"vib.log_variance"}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-12)
    squared = (0.05 / counts["question_tokens"] * means).square().sum()
    torch.testing.assert_close(terms["gradient_vib"], squared.detach())
    mean = objectives_weights.means({k: float(v) for k, v in terms.items() if "gradient" not in k}, counts)
    assert objectives_weights.total(objective, mean) == pytest.approx(expected.item(), rel=1e-6)


def test_packed_rows_give_the_loss_and_gradients_of_padded_ones():
    """With noise that is next to nothing, because a draw depends on the order of the tokens."""
    torch.manual_seed(0)
    model = fused(T5ForConditionalGeneration(T5Config(**SHAPE))).double().eval()
    objective, features = ObjectiveConfig(method="ib", estimator="vib", beta=0.05), random_features(40)
    plan = Sampler(features, DataConfig(), batch_size=6, seed=0)
    wrapped = distillation.Distillation(model, objective).double()
    torch.nn.init.constant_(wrapped.vib.log_variance, -90.0)
    counts, found = plan.counts(0), []
    share = objectives_weights.step_weights(objective, counts)
    for packed in (False, True):
        wrapped.zero_grad()
        batch = batches.collate(features, plan.step(0), ("predict", "explain"), pad=0, start=0, packed=packed)
        loss, terms = wrapped(batch, share, question_tokens=counts["question_tokens"])
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
        found.append([loss, terms, gradients])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_noise_is_learned_resumed_and_left_out_of_what_decodes(make_job, tmp_path, stage):
    settings = VIB | {"deepspeed.config": stage, "run.save_every": 5, "run.term_gradients_every": 5}
    whole = make_job(tmp_path / "whole", **settings)
    train.train(whole)
    broken = make_job(tmp_path / "broken", **settings)
    steps(broken, 5)
    broken.checkpoints.save(broken.engine, broken.state)
    again = make_job(tmp_path / "broken", **settings)
    train.train(again)
    assert again.state.step == 12 and same(weights(again), weights(whole))
    moved = weights(whole)["vib.log_variance"] - 2 * math.log(0.1)
    assert len(moved) == 64 and moved.abs().min() > 0

    train.close(whole)
    student = AutoModelForSeq2SeqLM.from_pretrained(whole.folder / "student").eval()
    assert not [name for name in student.state_dict() if "vib" in name]
    batch = whole.collate([0, 1, 2])
    rows = {"input_ids": batch.input_ids[:3], "attention_mask": batch.attention_mask[:3]}
    with whole.whole() as model, torch.no_grad():
        ours, theirs = (m.generate(**rows, max_new_tokens=8) for m in (model, student))
        starts = batch.decoder_input_ids["predict"]
        states = [m(**rows, decoder_input_ids=starts).logits for m in (model, student)]
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(*states)


def test_a_decoder_only_student_is_refused_before_its_teacher_is_loaded(make_job):
    with pytest.raises(
        ValueError, match="vib, but student.model is decoder-only .*choose an encoder-decoder"
    ):
        make_job(**VIB | {"student.model": "demo-student-decoder"})


def test_defaults_and_refusals(tmp_path):
    given = {"objective.method": "ib", "objective.estimator": "vib"}
    assert load_settings(None, given).objective.beta == 1e-3
    with pytest.raises(ValueError, match="mi_pair teacher goes with estimator paper or normalized, not vib"):
        load_settings(
            None,
            given
            | {"objective.mi_pair": "teacher", "teacher.placement": "replica", "teacher.model": "t5-mini"},
        )
