"""Objectives against transformers' own loss, and their weights."""

from __future__ import annotations

import pytest
import torch
from feature_tables import features_of, random_features
from tiny_t5 import SHAPE, two_forwards
from transformers import T5Config, T5ForConditionalGeneration

from ibdistill.config.sections import DataConfig, ObjectiveConfig, OptimConfig
from ibdistill.data import batches
from ibdistill.data.sampler import Sampler
from ibdistill.objectives import distillation
from ibdistill.objectives.weights import check_split, means, mi_settings, step_weights, streams_of, total
from ibdistill.ops.head_loss.estimators import ESTIMATORS, Estimator, infonce


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("method", ["finetune", "dss", "ib"])
def test_loss_and_gradients_equal_two_forwards_with_transformers_loss(method, tie):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE, tie_word_embeddings=tie)).double().eval()
    objective = ObjectiveConfig(method=method, alpha=0.3, beta=0.0)
    features = random_features(40)
    plan = Sampler(features, DataConfig(), batch_size=6, seed=0)
    streams = streams_of(objective)
    batch = batches.collate(features, plan.step(0), streams, pad=0, start=0)

    wrapped = distillation.Distillation(model, objective)
    loss, terms = wrapped(batch, step_weights(objective, plan.counts(0)))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    expected = two_forwards(model, batch, "predict")
    if method != "finetune":
        expected = 0.3 * expected + 0.7 * two_forwards(model, batch, "explain")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-12)

    mean = means({k: float(v) for k, v in terms.items()}, plan.counts(0))
    assert total(objective, mean) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_the_papers_term_is_pooled_over_target_positions_where_the_published_code_takes_padding_too(pool):
    """So a question's term is the same whatever its neighbours are; the published form's is not."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE | {"vocab_size": 400})).double().eval()
    objective = ObjectiveConfig(method="ib", estimator="paper", beta=1.0, pool=pool)
    features = features_of([(9, 2, 7), (4, 5, 3), (13, 1, 40)])
    ours = distillation.Distillation(model, objective)

    def batch_of(*questions: int) -> batches.Batch:
        return batches.collate(features, questions, streams_of(objective), pad=0, start=0)

    def term(batch: batches.Batch) -> float:
        _, terms = ours(batch, {"ce_predict": 0.0, "ce_explain": 0.0, "mi": 1.0})
        return terms["mi"].item()

    def published(batch: batches.Batch, *, own: bool) -> torch.Tensor:
        """Cross entropy per question; `own`: over its own positions and not over all that the batch has."""
        pooled = []
        for stream, ids in zip(batch.cu, batch.input_ids.chunk(2), strict=True):
            rows = dict(input_ids=ids, attention_mask=batch.attention_mask.chunk(2)[len(pooled)])
            logits = model(**rows, decoder_input_ids=batch.decoder_input_ids[stream]).logits
            lengths = batch.cu[stream].diff().tolist() if own else [None] * len(logits)
            chosen = [row[:n].softmax(-1) for row, n in zip(logits, lengths, strict=True)]
            pooled.append(torch.stack([p.amax(0) if pool == "max" else p.mean(0) for p in chosen]))
        return torch.nn.functional.cross_entropy(pooled[1], pooled[0], reduction="none")

    whole, alone = batch_of(0, 1, 2), [batch_of(i) for i in range(3)]
    with torch.no_grad():
        each = [term(batch) for batch in alone]
        assert each == pytest.approx(published(whole, own=True).tolist(), rel=1e-10)
        assert term(whole) == pytest.approx(sum(each), rel=1e-10)
        assert each == pytest.approx([published(batch, own=False).item() for batch in alone], rel=1e-10)
        moved = published(whole, own=False) - torch.tensor(each, dtype=torch.float64)
    assert moved[:2].abs().min() > 1e-5 * max(each)


def test_streams_and_terms_of_each_method():
    assert streams_of(ObjectiveConfig(method="finetune")) == ("predict",)
    assert mi_settings(ObjectiveConfig(method="dss")) is None
    assert mi_settings(ObjectiveConfig(method="ib", beta=0.0)) is None
    mi = mi_settings(ObjectiveConfig(method="ib", estimator="infonce", mi_gradient="both", pool="mean"))
    assert (mi.estimator, mi.gradient, mi.pool, mi.temperature) == ("infonce", "both", "mean", 0.1)


def test_infonce_is_refused_where_a_step_is_split(make_job, tmp_path):
    """It compares questions: 8 of them in one, two or four micro-batches would be three losses."""
    settings = {"objective.method": "ib", "objective.estimator": "infonce", "optim.micro_batch_size": 2}
    words = "infonce, which compares .* splits the 8 of optim.batch_size into 4 micro-batches per rank"
    with pytest.raises(ValueError, match=words):
        make_job(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    check_split(ObjectiveConfig(method="ib", estimator="infonce"), OptimConfig(batch_size=8), 1)
    for own in ({"method": "ib", "estimator": "normalized"}, {"method": "dss", "estimator": "infonce"}):
        check_split(ObjectiveConfig(beta=0.1, **own), OptimConfig(batch_size=8), 4)
    check_split(ObjectiveConfig(method="ib", estimator="infonce", beta=0.0), OptimConfig(batch_size=8), 4)


def test_any_estimator_on_states_is_refused_so(monkeypatch):
    """An estimator that somebody registers is refused too, but not one on distributions."""
    monkeypatch.setitem(ESTIMATORS, "own_states", Estimator(infonce, "state"))
    monkeypatch.setitem(ESTIMATORS, "own_distributions", Estimator(infonce, "distribution"))
    with pytest.raises(ValueError, match="own_states"):
        check_split(
            ObjectiveConfig(method="ib", estimator="own_states", beta=0.1), OptimConfig(batch_size=8), 2
        )
    check_split(
        ObjectiveConfig(method="ib", estimator="own_distributions", beta=0.1), OptimConfig(batch_size=8), 2
    )


def test_weights_divide_by_global_counts():
    counts = {"predict": 20, "explain": 50, "questions": 4, "explained": 3}
    weights = step_weights(ObjectiveConfig(method="ib", estimator="paper", alpha=0.25, beta=0.6), counts)
    used = {"ce_predict": 0.25 / 20, "ce_explain": 0.75 / 50, "mi": 0.2, "kd_predict": 0.0, "kd_explain": 0.0}
    assert weights == pytest.approx(used)
    nothing_explained = counts | {"explain": 0, "explained": 0}
    weights = step_weights(ObjectiveConfig(method="ib", estimator="paper", beta=0.1), nothing_explained)
    assert weights["ce_explain"] == 0.5 and weights["mi"] == 0.1  # finite; their sums are empty


def test_means_are_per_token_and_per_question():
    counts = {"predict": 10, "explain": 40, "questions": 4, "explained": 4}
    sums = {"ce_predict": 20.0, "ce_explain": 20.0, "correct_predict": 5.0, "mi": 8.0, "mi_questions": 4.0}
    assert means(sums, counts) == {
        "ce_predict": 2.0,
        "ce_explain": 0.5,
        "correct_predict": 0.5,
        "mi": 2.0,
    }
