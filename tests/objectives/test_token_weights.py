"""Weights of tokens in the distillation term: their formulas, and the same gradient from any split."""

from __future__ import annotations

import math

import pytest
import torch
from harness import tiny

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.config.sections import ObjectiveConfig
from ibdistill.models import forward, model_card
from ibdistill.objectives.token_weights import entropies, token_weights, weighed
from ibdistill.ops.head_loss import Stream, TeacherDistributions, TeacherStream

LENGTHS = [5, 0, 1, 8]
TAUGHT = {
    "objective.method": "kd",
    "teacher.placement": "replica",
    "teacher.model": "demo-teacher",
    "teacher.precision": "fp32",
    "student.dropout": 0.0,
}


def stream(lengths=LENGTHS, width=3):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return Stream(hidden, torch.zeros(sum(lengths), dtype=torch.int64), cu)


def by_hand(settings: dict, entropy: list[float], lengths=LENGTHS) -> list[float]:
    """The docstring's formula, text by text."""
    found, start = [], 0
    for L in lengths:
        own, start = entropy[start : start + L], start + L
        first, later = settings.get("kd_first", 0), settings.get("kd_later", 0)
        share = settings.get("kd_entropy_share", 1)
        kept = sorted(range(L), key=lambda t: -own[t])[: math.ceil(share * L)]
        limit = L if not first else first if first >= 1 else math.ceil(first * L)
        v = [float(t < limit) * ((t + 0.5) / L) ** later for t in range(L)]
        if "kd_entropy" in settings:
            v = [x * (own[t] if share == 1 else float(t in kept)) for t, x in enumerate(v)]
        found += [L * x / sum(v) if sum(v) else 0.0 for x in v]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"kd_first": 3},
        {"kd_first": 0.4},
        {"kd_later": 1.5},
        {"kd_entropy": "student"},
        {"kd_entropy": "student", "kd_entropy_share": 0.3},
        {"kd_first": 6, "kd_later": 2.0, "kd_entropy": "student", "kd_entropy_share": 0.5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_weights_are_their_formula(settings):
    text = stream()
    entropy = torch.rand(len(text.labels), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = token_weights(ObjectiveConfig(**settings), text, entropy if "kd_entropy" in settings else None)
    want = torch.tensor(by_hand(settings, entropy.tolist()))
    torch.testing.assert_close(got, want)
    spans = zip(text.cu[:-1], text.cu[1:], strict=True)
    assert all(got[a:b].mean() == pytest.approx(1, abs=1e-6) for a, b in spans if a < b)


def test_a_text_without_entropy_has_no_part():
    text = stream([2, 3])
    weights = token_weights(ObjectiveConfig(kd_entropy="student"), text, torch.tensor([0.0, 0, 1, 2, 3]))
    assert weights.tolist() == [0, 0, 0.5, 1, 1.5]


def test_whose_entropy(monkeypatch):
    """The student's from its head, the teacher's from its states or from the buckets of its top k."""
    monkeypatch.setattr(entropies, "__defaults__", (3 * 7 * 8,))  # three rows at a time
    text, generator = stream(), torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    head, theirs, states = (draw(7, 3), draw(7), 2.0), draw(7, 4), draw(len(text.labels), 4)
    q = torch.softmax(states @ theirs.T, -1)
    top = q.topk(2)
    buckets = torch.cat([top.values, 1 - top.values.sum(-1, keepdim=True)], -1)
    logits = 2.0 * torch.tanh((text.hidden @ head[0].T + head[1]) / 2.0)
    wants = [
        ("student", TeacherStream(states), torch.softmax(logits, -1)),
        ("teacher", TeacherStream(states), q),
        ("teacher", TeacherStream(None, top.indices, top.values), buckets),
    ]
    for whose, target, p in wants:
        objective = ObjectiveConfig(kd_entropy=whose)
        teacher = TeacherDistributions(target, target, theirs)
        got = weighed(objective, teacher, ("predict", "explain"), (text, text), head)
        want = token_weights(objective, text, torch.distributions.Categorical(p).entropy())
        torch.testing.assert_close(got.explain.weights, want, rtol=1e-5, atol=0)
        assert got.predict.weights is None  # a label
    assert weighed(ObjectiveConfig(), teacher, ("sampled", None), (text, None), head) is teacher


@pytest.mark.parametrize("method", ["kd", "cot+kd"])
def test_a_step_is_autograd_of_the_plain_formula(make_job, method):
    """And its gradient is the same in one and in four micro-batches."""
    mine = {"objective.method": method, "objective.kd_later": 1.0, "objective.kd_entropy": "student"}
    job, gradients = make_job(**TAUGHT | mine), []
    counts, model = job.sampler.counts(0), job.engine.module.model
    text, label = ("explain", "predict") if method == "kd" else ("rationale", "answer")
    factors = train.step_weights(job.config.objective, counts)
    for size in (8, 2):
        job.config.optim.micro_batch_size = size
        total, expected = 0.0, 0.0
        for micro, batch in job.micro_batches():
            answer = job.teacher_answers.of(micro, batch)
            total = total + job.engine.module(batch, factors, answer, 1)[0]
            states = forward.states(model, batch).targets
            for segment in (label, text):
                log_p = torch.log_softmax(states[segment] @ model.lm_head.weight.T, -1)
                q = torch.softmax(answer.targets[segment].hidden @ answer.weight.T, -1)
                ce = torch.nn.functional.nll_loss(log_p, batch.labels[segment], reduction="none")
                kd = (q * (q.log() - log_p)).sum(-1)
                lengths = batch.cu[segment].diff().tolist()
                entropy = -(log_p.exp() * log_p).sum(-1)
                if segment == text:
                    given = {"kd_later": 1.0, "kd_entropy": "student"}
                    kd = kd * torch.tensor(by_hand(given, entropy.tolist(), lengths))
                expected = expected + 0.5 / counts[segment] * (ce + kd).sum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
        got = torch.autograd.grad(total, parameters, allow_unused=True)
        want = torch.autograd.grad(expected, parameters, allow_unused=True)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)
        gradients.append(got)
    for one, four in zip(*gradients, strict=True):
        torch.testing.assert_close(one, four, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "settings", [{"kd_first": 3, "kd_later": 8}, {"kd_first": 1, "kd_later": 5}, {"kd_later": 1e300}], ids=str
)
def test_a_texts_weights_have_mean_1_whatever_the_power(settings):
    lengths = [200, 3, 1, 200, 150]
    found = token_weights(ObjectiveConfig(**settings), stream(lengths), None)
    sums = [part.double().sum().item() for part in found.split(lengths)]
    assert sums == pytest.approx(lengths, rel=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"objective.method": "dss", "objective.kd_first": 8},
            "kd_first is 8.*method dss with objective.gamma 1.0 has none",
        ),
        ({"objective.gamma": 0.0, "objective.kd_later": 1}, "objective.gamma 0.0 has none"),
        (
            {"objective.divergence_beta": 0.3},
            "divergence_beta is 0.3, and objective.divergence forward has no",
        ),
        (
            {"objective.divergence": "top1", "objective.divergence_beta": 0.3},
            "divergence top1 has no parameter",
        ),
        ({"objective.kd_entropy_share": 0.2}, "whose entropy chooses the tokens"),
        (
            {"objective.kd_first": 1.5},
            r"kd_first is 1.5; it must be a share in \[0, 1\) or a whole",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, tiny(tmp_path, **TAUGHT) | more)


def test_the_card_names_their_papers():
    plain = ObjectiveConfig(method="kd", estimator="vid", beta=1.0)
    weighted = ObjectiveConfig(
        method="kd", estimator="vid", beta=1.0, kd_first=0.3, kd_later=1.0, kd_entropy="student"
    )
    more = "".join(model_card.papers(weighted)[len(model_card.papers(plain)) :])
    assert all(number in more for number in ("2602.15260", "2605.21606", "2602.01395"))
