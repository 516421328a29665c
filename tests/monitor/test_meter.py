"""What a run measures between two logging steps: sums, gradients of terms, rates, the hardware."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from harness import steps

from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig
from ibdistill.data.text_checks import check_texts, truncated_shares
from ibdistill.monitor import log
from ibdistill.monitor.meter import Interval, Meter
from ibdistill.objectives import distillation, question_terms
from ibdistill.ops.head_loss.api import MISettings, Stream, Weights, head_loss
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.runtime import hardware


@pytest.mark.parametrize(
    ("term", "tag"),
    [
        ("ce_predict", "loss/predict"),
        ("kd_explain", "loss/kd_explain"),
        ("mi", "loss/mi"),
        ("mi_bound", "mi/bound"),
        ("vid", "loss/vid"),
        ("mi_constant", "mi/constant"),
        ("correct_explain", "accuracy/explain_tokens"),
    ],
)
def test_every_term_has_a_tag(term, tag):
    assert log.tag(term) == tag


def random_streams(seed: int, lengths=((2, 3, 1), (4, 0, 2))):
    generator = torch.Generator().manual_seed(seed)
    streams = []
    for own in lengths:
        n = sum(own)
        hidden = torch.randn(n, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 11, (n,), generator=generator)
        cu = torch.tensor([0, *torch.tensor(own).cumsum(0).tolist()], dtype=torch.int32)
        streams.append(Stream(hidden, labels, cu))
    return streams, torch.randn(11, 8, generator=generator, dtype=torch.float64)


def test_gradients_of_terms_are_those_of_autograd_and_add_up_over_micro_batches():
    weights = Weights(ce_predict=0.3, ce_explain=0.2, mi=0.7)
    mi = MISettings(estimator="normalized", gradient="both")
    total: dict[str, float] = {}
    expected: dict[str, float] = {}
    for seed in (0, 1):  # two micro-batches with different questions
        streams, head = random_streams(seed)
        ours = distillation.term_gradients(*streams, head, None, weights, mi=mi)
        assert ours.keys() == {"gradient_ce_predict", "gradient_ce_explain", "gradient_mi"}
        for name, square in ours.items():
            leaves = [s._replace(hidden=s.hidden.clone().requires_grad_()) for s in streams]
            term = name.removeprefix("gradient_")
            only = replace(Weights(0.0), **{term: getattr(weights, term)})
            scaled, _ = head_loss_reference(*leaves, head, None, weights=only, mi=mi)
            grads = torch.autograd.grad(scaled, [s.hidden for s in leaves], allow_unused=True)
            truth = sum(float(g.square().sum()) for g in grads if g is not None)
            assert float(square) == pytest.approx(truth, rel=1e-6)
            expected[name] = expected.get(name, 0.0) + truth
            total[name] = total.get(name, 0.0) + float(square)
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("estimator", ["paper", "normalized"])
def test_the_logged_terms_of_a_step_do_not_depend_on_its_split(estimator):
    """The step has 4 questions, one without a rationale, in one part or several; bounds would differ."""
    config = load_settings(None, {"objective.method": "ib", "objective.estimator": estimator})
    (predict, explain), head = random_streams(0, ((2, 3, 1, 2), (4, 0, 2, 3)))
    counts = {"predict": 8, "explain": 9, "questions": 4, "explained": 3}
    mi = MISettings(estimator=estimator)
    logged = []
    for bounds in ((0, 4), (0, 2, 4), (0, 1, 2, 3, 4)):
        sums: dict[str, float] = {}
        for first, last in pairwise(bounds):
            parts = []
            for hidden, labels, cu in (predict, explain):
                rows = slice(int(cu[first]), int(cu[last]))
                parts.append(Stream(hidden[rows], labels[rows], cu[first : last + 1] - cu[first]))
            _, terms = head_loss(*parts, head, weights=Weights(1.0, 1.0, 1.0), mi=mi)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        logged.append(log.losses(Interval(sums, counts, 1, 1, 1, 1, 1.0, {}, []), config))
    assert logged[1] == pytest.approx(logged[0], rel=1e-9) and logged[2] == pytest.approx(logged[0], rel=1e-9)
    assert "mi/bound" not in logged[0] and ("mi/kl" in logged[0]) == (estimator == "normalized")
    if estimator == "normalized":
        pooled = [torch.softmax(states @ head.T, -1) for states, _, _ in (predict, explain)]
        kl = 0.0
        for q in (0, 2, 3):
            p, e = (
                rows[cu[q] : cu[q + 1]].amax(0)
                for rows, cu in zip(pooled, (predict.cu, explain.cu), strict=True)
            )
            p, e = p / p.sum(), e / e.sum()
            kl += float((p * (p / e).log()).sum()) / 3
        assert logged[0]["mi/kl"] == pytest.approx(kl, rel=1e-9)


def test_the_gradient_of_vid_is_that_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, width, generator=generator) for width in (8, 6))
    vid = question_terms.VidMap(8, 6, seed=1)
    torch.nn.init.normal_(vid.log_variance)
    total, terms = vid(student.requires_grad_(), teacher, 0.3, measures=True)
    residual = teacher - student @ vid.weight.T - vid.bias
    gradient = -0.3 * (residual * torch.exp(-vid.log_variance)) @ vid.weight / 6
    assert float(terms["gradient_vid"]) == pytest.approx(float(gradient.detach().square().sum()), rel=1e-5)
    assert float(total) == pytest.approx(0.3 * float(terms["vid"]), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(total, student)[0], gradient)
    assert "gradient_vid" not in vid(student, teacher, 0.3, measures=False)[1]


@pytest.mark.parametrize("stage", [0, 3])
def test_vid_is_measured_under_zero_and_has_no_share(make_job, stage):
    settings = {"objective.method": "ib+kd", "teacher.placement": "replica", "teacher.model": "demo-teacher"}
    made = make_job(**settings, **{"deepspeed.config": f"zero{stage}"})
    steps(made, 1)
    scalars = log.gradients(made.meter.close_interval(), 0.0)
    assert scalars["grad/norm_vid"] > 0
    shares = {name: value for name, value in scalars.items() if "share" in name}
    names = ("predict", "explain", "kd_predict", "kd_explain")
    assert shares.keys() == {f"grad/share_{name}" for name in names}
    assert sum(shares.values()) == pytest.approx(1.0)


def test_the_measurement_leaves_the_step_alone_and_does_not_depend_on_micro_batches(make_job, tmp_path):
    """The same weights with and without it; the same norms for one micro-batch of 8 and for four of 2."""
    after, norms = [], []
    for name, every, micro in (("off", 0, 0), ("on", 1, 0), ("split", 1, 2)):
        settings = {
            "run.term_gradients_every": every,
            "optim.micro_batch_size": micro,
            "student.dropout": 0.0,
        }
        made = make_job(tmp_path / name, **settings, **{"objective.method": "ib"})
        steps(made, 2)
        after.append({n: p.detach().clone() for n, p in made.engine.module.named_parameters()})
        norms.append(made.meter.close_interval().gradients)
    assert all(torch.equal(after[0][n], after[1][n]) for n in after[0])
    assert norms[0] == {} and norms[1].keys() == {"ce_predict", "ce_explain", "mi"}
    assert norms[1] == pytest.approx(norms[2], rel=1e-3)


def test_gradients_are_measured_when_due_and_averaged_over_those_steps(make_job):
    made = make_job(**{"run.term_gradients_every": 3, "optim.lr": 1e-9, "student.dropout": 0.0})
    measured = []
    for step in range(5):
        steps(made, 1)
        measured.append(made.meter.close_interval().gradients)
        assert bool(measured[-1]) == (step % 3 == 0)
    made.state.step = 0  # the same batches again, with weights that hardly moved
    steps(made, 5)
    both = made.meter.close_interval().gradients
    for name in ("ce_predict", "ce_explain"):
        mean_square = (measured[0][name] ** 2 + measured[3][name] ** 2) / 2
        assert both[name] == pytest.approx(mean_square**0.5, rel=1e-3)


def test_an_interval_s_scalars(make_job):
    made = make_job(**{"optim.clip_norm": 1.0})
    meter, world = Meter(), made.world
    batch = next(batch for _, batch in made.micro_batches())
    for norm in (0.5, torch.tensor(2.0), 3.0):
        meter.add(batch, {"ce_predict": torch.tensor(2.0)})
        meter.end_step({"predict": 4}, 0.1, norm=norm, teacher=0.2, stall=0.05)
    meter._start -= 6.0
    meter.exclude(3.0)
    interval = meter.close_interval()
    assert interval.terms == {"ce_predict": 6.0} and interval.counts == {"predict": 12}
    speed = log.speed(interval, world)
    assert speed["speed/step_s"] == pytest.approx(1.0, abs=0.1)
    timed = ("data_wait", "teacher", "stall", "student")
    assert [speed[f"speed/{name}_s"] for name in timed] == pytest.approx([0.1, 0.2, 0.05, 0.65], abs=0.1)
    assert sum(speed[f"speed/{name}_s"] for name in timed) == pytest.approx(speed["speed/step_s"])
    tokens = int(batch.attention_mask.sum()) + sum(len(part) for part in batch.labels.values())
    assert interval.tokens == 3 * tokens
    assert speed["speed/tokens_per_s"] == pytest.approx(3 * tokens / interval.seconds)
    assert log.gradients(interval, 1.0) == {"grad/norm": 3.0, "grad/clipped_share": pytest.approx(2 / 3)}
    targets = interval.targets
    used = log.utilization(interval, (10, 20), 1e6, world)
    assert used == pytest.approx((10 * (3 * tokens - targets) + 20 * targets) / interval.seconds / 1e6)


def test_shares_of_the_gradient():
    interval = Interval({}, {}, 1, 1, 1, 1, 1.0, {}, [1.0], {"ce_predict": 3.0, "mi": 1.0})
    scalars = log.gradients(interval, 0.0)
    assert scalars["grad/share_predict"] == 0.75 and scalars["grad/share_mi"] == 0.25
    assert scalars["grad/norm_mi"] == 1.0 and "grad/clipped_share" not in scalars
    alone = Interval({}, {}, 1, 1, 1, 1, 1.0, {}, [1.0], {"ce_predict": 3.0})
    assert "grad/share_predict" not in log.gradients(alone, 0.0)
    assert log.constant_share(39.707, 39.706) == pytest.approx(1 - 0.001 / 39.707)
    assert log.constant_share(9.0, 10.0) == pytest.approx(0.9) and log.constant_share(2.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("config", "precision", "bytes_"), [("zero0", "fp32", 4 + 8), ("zero2", "bf16", 2 + 4 + 8)]
)
def test_model_states_are_weights_master_weights_and_moments(make_job, config, precision, bytes_):
    made = make_job(**{"deepspeed.config": config, "student.precision": precision})
    steps(made, 1)
    n = sum(p.numel() for p in made.engine.module.parameters())
    assert hardware.model_states(made.engine) == pytest.approx(bytes_ * n, rel=0.01)


def test_the_measured_peak_is_a_rate_this_machine_could_have():
    peak = hardware.measured_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e14 and hardware.measured_peak(torch.device("cpu"), torch.float32) == peak


def test_truncated_shares(make_job):
    """Of the training texts from their lengths, and of the other splits from texts made to be too long."""
    made = make_job()
    features, records, (task,) = made.features, made.records, made.records.test
    lengths = features.targets["explain"].lengths
    limit = sorted(lengths)[len(lengths) // 2]
    shares = truncated_shares(records, features, DataConfig(max_rationale_tokens=int(limit)))
    assert shares["data/truncated_share_rationales"] == pytest.approx((lengths >= limit).mean())
    assert shares["data/truncated_share_questions"] == 0.0

    limits = DataConfig(max_question_tokens=40, max_label_tokens=12)
    short = sorted(records.valid[task], key=lambda record: len(record.question))[:9]
    longer = [replace(r, question=r.question * 9) for r in short[:2]]
    longer.append(replace(short[2], label="12 " * 30, gold="12"))
    cut = replace(records, valid={task: short + longer}, test={task: short}, report={})
    cut.report.update(check_texts(cut, features, made.tokenizer, limits))
    shares = truncated_shares(cut, features, limits)
    ours = {name.removeprefix("data/truncated_share_"): share for name, share in shares.items()}
    assert ours["valid_questions"] == pytest.approx(2 / 12) and ours["valid_labels"] == pytest.approx(1 / 12)
    assert ours["test_questions"] == ours["test_labels"] == 0.0
    none = truncated_shares(replace(cut, test={task: []}), features, limits)  # as demo_pretrain has it
    assert none["data/truncated_share_test_questions"] == 0.0
