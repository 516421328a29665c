"""Divergences estimated from the student's own tokens: what a step minimises, and what is refused."""

from __future__ import annotations

import pytest
import torch
from harness import tiny
from test_on_policy import TAUGHT

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.models import forward, model_card
from ibdistill.teacher.teacher import Teacher
from ibdistill.training import on_policy


@pytest.mark.parametrize(("method", "divergence"), [("kd", "k1"), ("cot+kd", "k3")])
def test_a_step_is_autograd_of_the_plain_formula(make_job, method, divergence):
    """Cross entropy on the data's text, the estimate alone on own text."""
    mine = {"objective.method": method, "objective.divergence": divergence, "optim.micro_batch_size": 4}
    job = make_job(**TAUGHT | mine)
    on_policy.refresh(job)
    n, counts, model, expected, value = (
        len(job.gold),
        job.sampler.counts(0),
        job.engine.module.model,
        0.0,
        0.0,
    )
    text, label = ("explain", "predict") if method == "kd" else ("rationale", "answer")
    mixed = (0.5 if method == "kd" else 1.0) * 0.5 / counts["sampled"]
    for micro, batch in job.micro_batches():
        states, theirs = forward.states(model, batch).targets, job.teacher_answers.of(micro, batch)
        for segment in (label, text):
            labels = batch.labels[segment][:, None]
            log_p = torch.log_softmax(states[segment] @ model.lm_head.weight.T, -1).gather(1, labels)[:, 0]
            own = torch.repeat_interleave(torch.from_numpy(micro >= n), batch.cu[segment].diff().long())
            if segment == "predict":
                own = torch.zeros_like(own)  # labels stay the data's
            share = 0.5 if segment == "predict" else 0.25
            expected = expected - share / counts[segment] * log_p[~own].sum()
            if segment not in theirs.targets:  # the data's text is not scored
                continue
            log_q = torch.log_softmax(theirs.targets[segment].hidden @ theirs.weight.T, -1)
            r = torch.zeros_like(log_p)
            r[own] = log_q.gather(1, labels[own])[:, 0] - log_p[own].detach()
            factor, estimate = (-r, -r) if divergence == "k1" else (1 - r.exp(), r.exp() - 1 - r)
            expected = expected + mixed * (factor * log_p)[own].sum()
            value = value + mixed * (estimate - factor * log_p)[own].sum().detach()
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    factors, total, terms = train.step_weights(job.config.objective, counts), 0.0, []
    for micro, batch in job.micro_batches():
        loss, more = job.engine.module(batch, factors, job.teacher_answers.of(micro, batch), 1)
        total, terms = total + loss, [*terms, more]
    torch.testing.assert_close(total, (expected + value).detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(total, parameters, allow_unused=True), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)
    assert all([name for name in own if name.startswith("kd_")] == ["kd_sampled"] for own in terms)
    train.train_step(job)
    job.state.step = 1
    scalars = train.monitor_log.losses(job.meter.close_interval(), job.config)
    assert scalars["loss/total"] == pytest.approx(float(total.detach()), rel=1e-4)


@pytest.mark.parametrize("method", ["kd", "ib+kd", "cot+kd"])
def test_the_teacher_reads_the_student_s_own_text_alone(make_job, tmp_path, monkeypatch, method):
    """Its answers are those that it gives where it reads all; with `vid` it reads all questions, and no
    target of the data's. A micro-batch without own text takes one row, so that sharded teachers are called
    equally often."""
    mine = TAUGHT | {"objective.method": method, "optim.micro_batch_size": 2, "on_policy.share": 0.25}
    mine |= {"objective.divergence": "k1", "student.model": "demo-student-decoder"}
    job = make_job(tmp_path / "k1", **mine, **{"teacher.cache": str(tmp_path / "answers")})
    seen, honest = [], Teacher.states
    monkeypatch.setattr(Teacher, "states", lambda self, batch: seen.append(batch) or honest(self, batch))
    on_policy.refresh(job)
    whole = make_job(tmp_path / "reverse", **mine | {"objective.divergence": "reverse"})
    on_policy.refresh(whole)
    text, n, some = job.gold.text, len(job.gold), 0
    for rows, batch in job.micro_batches():
        seen.clear()
        answer, full = job.teacher_answers.of(rows, batch), whole.teacher_answers.of(rows, batch)
        own = int((rows >= n).sum())
        mine, everything = seen
        tokens = int(batch.cu[text][-1] - batch.cu[text][len(rows) - own])
        assert sum(len(labels) for labels in mine.labels.values()) == tokens
        if method == "ib+kd":
            assert len(mine.question_ids) == len(rows) and len(answer.questions) == len(full.questions)
            torch.testing.assert_close(answer.questions, full.questions, rtol=1e-4, atol=1e-5)
        else:
            assert len(mine.question_ids) == max(1, own) and mine.streams == everything.streams[-1:]
        start = len(batch.labels[text]) - tokens
        assert len(answer.targets[text].hidden) == tokens
        torch.testing.assert_close(
            answer.targets[text].hidden, full.targets[text].hidden[start:], rtol=1e-4, atol=1e-5
        )
        seen.clear()
        again = job.teacher_answers.of(rows, batch)  # from the cache, where own text lasts for an epoch
        assert torch.equal(again.targets[text].hidden, answer.targets[text].hidden)
        some += own
    assert some == 2
    train.train_step(job)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"on_policy.share": 0.0}, "on_policy.share is 0, so there are none; set on_policy.share"),
        ({"on_policy.top_p": 0.9}, "on_policy.top_p is 0.9; leave it at 1"),
        (
            {"on_policy.temperature": 0.7, "objective.kd_temperature": 2.0},
            "temperature is 0.7 and objective.kd_t",
        ),
        (
            {"objective.method": "dss", "on_policy.share": 0.0},
            "objective.method dss compares no distributions",
        ),
        ({"teacher.cache": "x", "teacher.cache_form": "topk"}, "teacher.cache_form topk does not keep each"),
        (
            {"objective.method": "ib+kd", "objective.mi_pair": "teacher", "objective.estimator": "paper"},
            "k2' and objective.mi_pair is 'teacher'",
        ),
        ({"objective.divergence": "k4"}, "total_variation, top1, k1, k2, k3 or a name added to DIVERGENCES"),
    ],
)
def test_what_cannot_go_with_them_is_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, tiny(tmp_path, **TAUGHT) | {"objective.divergence": "k2"} | more)


def test_defaults_and_credit(tmp_path):
    settings = tiny(tmp_path, **TAUGHT) | {"objective.divergence": "k1", "teacher.cache": "x"}
    config = load_settings(None, settings)
    assert config.teacher.cache_form == "states"
    assert any("Thinking Machines" in paper for paper in model_card.papers(config.objective))
