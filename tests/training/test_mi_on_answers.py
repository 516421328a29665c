"""`data.agree_use` mi: the term between the streams on unlabelled questions, cross entropies on gold ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_tables import random_features
from harness import same, tiny, weights
from test_pseudo_labels import AGREE, OFF, said
from tiny_t5 import SHAPE, two_forwards
from transformers import T5Config, T5ForConditionalGeneration
from workers.agreeing import answers_of_an_oracle

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig, ObjectiveConfig
from ibdistill.data import batches
from ibdistill.data.sampler import ExtraSampler, Sampler
from ibdistill.evaluation import predictions as evaluation_predictions
from ibdistill.objectives import distillation
from ibdistill.objectives.weights import step_weights
from ibdistill.training import pseudo_labels
from ibdistill.training.prepare import prepare

MI = AGREE | {
    "data.agree_use": "mi",
    "objective.method": "ib",
    "objective.estimator": "normalized",
    "objective.mi_gradient": "both",
}


def pooled(model, batch: batches.Batch, stream: str) -> list[torch.Tensor]:
    """For each question the maximum over its positions of transformers' own probabilities, summing to 1."""
    index, size = list(batch.decoder_input_ids).index(stream), len(batch.question_ids)
    rows = slice(index * size, (index + 1) * size)
    logits = model(
        input_ids=batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        decoder_input_ids=batch.decoder_input_ids[stream],
    ).logits
    probabilities = logits.flatten(0, 1)[batch.positions[stream]].softmax(-1)
    spans = zip(batch.cu[stream], batch.cu[stream][1:], strict=False)
    tops = [probabilities[a:b].max(0).values for a, b in spans]
    return [top / top.sum() for top in tops]


@pytest.mark.parametrize("num_extra", [0, 2, 5])
def test_the_term_is_on_the_extra_questions_and_the_cross_entropies_are_on_the_others(num_extra):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE)).double().eval()
    objective = ObjectiveConfig(method="ib", estimator="normalized", mi_gradient="both", alpha=0.3, beta=0.7)
    features, rows = random_features(40), [3, 8, 1, 30, 12, 7, 9]
    first, layout = len(rows) - num_extra, {"pad": 0, "start": 0}
    streams = ("predict", "explain")
    batch = batches.collate(features, rows, streams, **layout)
    object.__setattr__(batch, "num_extra", num_extra)
    wrapped = distillation.Distillation(model, objective, mi_on_extra=True)
    wrapped.head.measures = True
    counts = {name: len(batch.labels[name][: batch.cu[name][first]]) for name in streams}
    loss, terms = wrapped(batch, step_weights(objective, counts | {"explained": num_extra}))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    gold = batches.collate(features, rows[:first], streams, **layout)
    expected = 0.3 * two_forwards(model, gold, "predict") + 0.7 * two_forwards(model, gold, "explain")
    if num_extra:
        extra = batches.collate(features, rows[first:], streams, **layout)
        pairs = list(zip(pooled(model, extra, "predict"), pooled(model, extra, "explain"), strict=True))
        ways = [-(p.detach() * e.log()).sum() - (e.detach() * p.log()).sum() for p, e in pairs]
        expected = expected + 0.7 * sum(ways) / 2 / num_extra
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-7, atol=1e-11)
    assert float(terms["mi_questions"]) == num_extra
    gradients = {"gradient_ce_predict", "gradient_ce_explain", "gradient_mi"}
    assert gradients <= terms.keys() and bool(terms["gradient_mi"] > 0) == bool(num_extra)


@pytest.mark.parametrize(("share", "micro", "ranks"), [(0.5, 4, 2), (0.25, 8, 2), (0.5, 16, 1), (0.75, 4, 4)])
def test_gold_micro_batches_are_those_without_the_extra_records(share, micro, ranks):
    settings = DataConfig(agree_share=share)
    gold, extra = random_features(50, seed=1), random_features(23, seed=2)
    plan = ExtraSampler(gold, extra, settings, batch_size=16, seed=3)
    off = Sampler(gold, settings, batch_size=16, seed=3)
    seen = []
    for step in (0, 1, 40):
        found = []
        for rank in range(ranks):
            place = {"rank": rank, "world_size": ranks, "micro_batch_size": micro}
            for mixed, alone in zip(
                plan.micro_batches(step, **place), off.micro_batches(step, **place), strict=True
            ):
                assert mixed[:micro].tolist() == alone.tolist()
                assert len(mixed) == micro * (1 + share) and (mixed[micro:] >= 50).all()
                found += mixed[micro:].tolist()
        assert len(set(found)) == 16 * share
        counts, lengths = plan.counts(step), extra.targets["explain"].lengths
        assert counts == off.counts(step) | {"explained": int((lengths[np.array(found) - 50] > 0).sum())}
        seen.append(sorted(found))
    assert seen[0] != seen[1]


def test_answers_are_used_unfiltered_if_both_are_there():
    predictions = [
        said("demo", "q", "n0 + n1", "start n0 . bred means * n1 ."),  # disagree
        said("demo", "q", "n0", "no rationale at all"),
        said("demo", "q", "n0", ""),
        said("demo", "q", "", "start n0 ."),
    ]
    used = pseudo_labels.used(predictions, DataConfig(unlabelled=4, agree_use="mi"))
    assert [(r.label, r.rationale) for r in used] == [
        ("n0 + n1", "start n0 . bred means * n1 ."),
        ("n0", "no rationale at all"),
    ]
    assert pseudo_labels.used(predictions, DataConfig(unlabelled=4)) == []


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_a_run_is_the_same_until_the_answers_and_resumes(make_job, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(evaluation_predictions, "decode", answers_of_an_oracle([]))
    common = {"deepspeed.config": stage, "optim.schedule": "constant"}
    dss = make_job(tmp_path / "dss", **OFF | common | {"optim.max_steps": 5})
    train.train(dss)
    settings = MI | common | {"run.save_every": 6}
    job = make_job(tmp_path / "run", **settings)
    before = []
    step = train.train_step

    def observed(job):
        if job.state.step == 5:
            before.append(weights(job))
        step(job)

    monkeypatch.setattr(train, "train_step", observed)
    train.train(job)
    assert same(before[0], weights(dss)), "before the first answers the run is DSS, bit for bit"
    sizes = [len(rows) for rows, _ in job.micro_batches()]
    assert sizes == [12] and [batch.num_extra for _, batch in job.micro_batches()] == [4]
    assert len(job.features) - 100 == 40, "all answers, not the agreed three quarters"

    broken = make_job(tmp_path / "broken", **settings)

    class Killed(Exception):
        pass

    def killed(job):
        if job.state.step == 7:
            raise Killed
        step(job)

    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(Killed):
        train.train(broken)
    monkeypatch.setattr(train, "train_step", step)
    again = make_job(tmp_path / "broken", **settings)
    assert again.state.step == 6
    train.train(again)
    assert same(weights(again), weights(job))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.unlabelled": None}, "agree_use is mi, but of which questions"),
        ({"objective.method": "dss"}, r"set objective.method ib \(it is dss\)"),
        ({"objective.beta": 0.0}, "objective.beta above 0"),
        ({"objective.estimator": "vib"}, r"paper, normalized or infonce \(it is vib\)"),
        (
            {
                "objective.mi_pair": "teacher",
                "teacher.placement": "replica",
                "teacher.model": "demo-teacher",
            },
            "takes no teacher's answers, for which objective.mi_pair teacher asks",
        ),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, tiny(tmp_path) | MI | settings)


def test_a_share_that_does_not_divide_micro_batches_is_refused_before_a_model_is_loaded(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "ibdistill.training.prepare.load_student", lambda *a: pytest.fail("a model was loaded")
    )
    settings = tiny(tmp_path / "run") | MI | {"optim.micro_batch_size": 1}
    with pytest.raises(
        ValueError, match="each micro-batch of 1 questions gets so many answers more, 0.5, which"
    ):
        prepare(load_settings(None, settings), world)
