"""An estimator and a divergence added from outside the package, as CONTRIBUTING shows it: one entry each."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import toy_objective
from feature_tables import random_features
from harness import ROOT
from tiny_t5 import SHAPE
from transformers import T5Config, T5ForConditionalGeneration

from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig, ObjectiveConfig
from ibdistill.data import batches
from ibdistill.data.sampler import Sampler
from ibdistill.models import forward
from ibdistill.objectives.distillation import Distillation
from ibdistill.objectives.teacher_answers import TeacherAnswer
from ibdistill.objectives.weights import step_weights
from ibdistill.ops.head_loss.arguments import TeacherStream
from ibdistill.ops.head_loss.divergences import DIVERGENCES, Divergence
from ibdistill.ops.head_loss.estimators import ESTIMATORS, Estimator

ENTRIES = (
    'ESTIMATORS["overlap"] = Estimator(overlap, "distribution")',
    'DIVERGENCES["squared_difference"] = Divergence(squared_difference)',
)


@pytest.fixture
def added(monkeypatch):
    """What ENTRIES say, undone afterwards."""
    monkeypatch.setitem(ESTIMATORS, "overlap", None)
    monkeypatch.setitem(DIVERGENCES, "squared_difference", None)
    names = {"ESTIMATORS": ESTIMATORS, "Estimator": Estimator}
    names |= {"DIVERGENCES": DIVERGENCES, "Divergence": Divergence} | vars(toy_objective)
    for entry in ENTRIES:
        exec(entry, names)


def test_contributing_shows_the_code_that_these_tests_run():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"```python\n{Path(toy_objective.__file__).read_text()}```\n" in text
    assert "```python\n" + "\n".join(ENTRIES) + "\n```\n" in text


def test_their_names_are_settings(added):
    given = {"objective.method": "ib", "objective.estimator": "overlap"}
    assert load_settings(None, given).objective.estimator == "overlap"
    with pytest.raises(ValueError, match="objective.estimator is 'overlay'; it must be auto, paper"):
        load_settings(None, given | {"objective.estimator": "overlay"})


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_step_equals_autograd_of_the_plain_formulas(added, pool):
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": 10_000}
    model = T5ForConditionalGeneration(T5Config(**shape)).double().eval()
    objective = ObjectiveConfig(
        method="ib+kd", estimator="overlap", divergence="squared_difference",
        alpha=0.3, beta=0.6, gamma=0.7, pool=pool,
    )  # fmt: skip
    features = random_features(20)
    plan = Sampler(features, DataConfig(), batch_size=4, seed=0)
    batch = batches.collate(features, plan.step(0), ("predict", "explain"), pad=0, start=0)
    weight = torch.randn(10_000, 5, dtype=torch.float64)
    targets = {
        name: TeacherStream(torch.randn(len(labels), 5, dtype=torch.float64))
        for name, labels in batch.labels.items()
    }
    factors = step_weights(objective, plan.counts(0))
    loss, terms = Distillation(model, objective)(batch, factors, TeacherAnswer(None, targets, weight))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    expected, pooled = 0.0, {}
    for name, hidden in forward.states(model, batch).targets.items():
        log_p = torch.log_softmax(hidden @ model.lm_head.weight.T, -1)
        q = torch.softmax(targets[name].hidden @ weight.T, -1)
        ce = torch.nn.functional.nll_loss(log_p, batch.labels[name], reduction="sum")
        kd = (q - log_p.exp()).square().sum()
        expected = expected + factors[f"ce_{name}"] * ce + factors[f"kd_{name}"] * kd
        cu = batch.cu[name].tolist()
        spans = [log_p[a:b].exp() for a, b in itertools.pairwise(cu)]
        pooled[name] = [(p.amax(0) if pool == "max" else p.mean(0)) if len(p) else None for p in spans]
    for p, e in zip(pooled["predict"], pooled["explain"], strict=True):
        if p is not None and e is not None:
            p = p.detach()
            expected = expected - factors["mi"] * ((p / p.sum()) * (e / e.sum())).sqrt().sum().log()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert terms["mi"] > 0 and terms["kd_predict"] > 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-7, atol=1e-11)


def test_a_method_on_the_label_alone_is_distilled_in_one_stream():
    model = T5ForConditionalGeneration(T5Config(**SHAPE | {"vocab_size": 100}))
    asked = TeacherStream(torch.zeros(3, 5))
    answer = TeacherAnswer(None, {"predict": asked}, torch.zeros(100, 5))
    given = Distillation(model, ObjectiveConfig(method="kd"))._teacher(answer, ("predict", "explain"))
    assert given.predict is asked and given.explain is None
