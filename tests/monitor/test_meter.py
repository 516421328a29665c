"""What a run shows: an interval's sums, gradients of terms, events, the progress bar, the hardware."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from harness import TRAIN, alone, as_arguments, steps, tiny

from ibdistill import train
from ibdistill.config.fields import to_flat
from ibdistill.config.load import load_settings
from ibdistill.config.sections import Config, DataConfig
from ibdistill.data.records import Record
from ibdistill.evaluation import faithfulness, report
from ibdistill.monitor import board as board_module
from ibdistill.monitor import log
from ibdistill.monitor.board import Board, hyperparameters
from ibdistill.monitor.meter import Interval, Meter
from ibdistill.objectives import distillation, question_terms
from ibdistill.ops.head_loss.api import MISettings, Stream, Weights, head_loss
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.runtime import hardware
from ibdistill.training import prepare


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    found.Reload()
    return found


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
    """Of 4 questions, one of which has no rationale, in one part or several; a bound would depend on it."""
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


def test_a_board_that_continues_leaves_no_gap_and_no_double(world, tmp_path):
    for first in (0, 4):  # the first start was killed at step 7, after its checkpoint of step 4
        board = Board(tmp_path, world, first)
        for step in range(first + 1, 8 if first == 0 else 11):
            board.scalars({"loss/total": 10.0 * first + step}, step)
        board.close()
    found = [(event.step, event.value) for event in events(tmp_path).Scalars("loss/total")]
    assert found == [(s, s) for s in range(1, 5)] + [(s, 40 + s) for s in range(5, 11)]


def test_a_board_keeps_layout_figures_texts_and_hyperparameters(world, tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    from ibdistill.evaluation import plots

    board = Board(tmp_path / "on", world, 0)
    board.text("config", "a: 1\n  b: 2", 0)
    board.figures({"reliability": plots.reliability([0.5], [1], "t")}, 3)
    flat = {"run.dir": "x", "run.seed": 3, "optim.lr": 0.1, "data.path": None, "student.lora_targets": ["q"]}
    flat |= {"objective.method": "ib", "objective.alpha": 0.5, "objective.beta": 0.1}
    defaults = flat | {
        "run.dir": "",
        "optim.lr": 0.2,
        "data.path": "y",
        "run.seed": 0,
        "objective.beta": None,
    }
    scores = {"valid_demo_accuracy": 0.4, "valid_demo_brier": 0.2, "test_demo_accuracy": 0.5}
    scores |= {"test_demo_rationale_accuracy": 0.6, "test_demo_ece": 0.1, "test_demo_first_token_ece": 0.1}
    board.hparams(hyperparameters(flat, defaults), {f"eval/{name}": value for name, value in scores.items()})
    board.close()
    found = events(tmp_path / "on")
    assert {"config/text_summary", "custom_scalars__config__"} <= set(found.Tags()["tensors"])
    assert found.Images("reliability")[0].step == 3
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    written = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    changed = ["objective.method", "run.seed", "optim.lr", "data.path", "objective.beta"]
    assert set(written) == {"test_demo_accuracy", "valid_demo_accuracy", *changed}
    assert written["data.path"].string_value == "None" and written["optim.lr"].number_value == 0.1
    content = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    columns = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    names = [column.name for column in columns.hparam_infos]
    assert names == ["test_demo_accuracy", "valid_demo_accuracy", *changed]
    assert {column.name.tag for column in columns.metric_infos} == {
        "eval/valid_demo_accuracy",
        "eval/test_demo_accuracy",
        "eval/test_demo_rationale_accuracy",
        "eval/test_demo_ece",
    }

    board = Board(tmp_path / "off", world, 0, off=True)
    board.scalars({"loss": 1.0}, 1)
    board.text("t", "t", 1)
    board.figures({}, 1)
    board.hparams({}, {})
    board.close()
    assert not (tmp_path / "off").exists()


def test_the_settings_of_a_term_that_the_method_lacks_are_not_shown():
    defaults = to_flat(Config())
    for method, shown in (("dss", set()), ("ib", {"objective.beta", "objective.estimator"})):
        settings = to_flat(load_settings(None, {"objective.method": method}))
        assert set(hyperparameters(settings, defaults)) == {"objective.method", "run.seed"} | shown
    recipe = hyperparameters(to_flat(load_settings("demo", {})), defaults)
    assert list(recipe)[:2] == ["objective.method", "run.seed"] and recipe["optim.lr"] == 2e-3
    assert not {"objective.gamma", "run.dir", "run.eval_every"} & set(recipe)


def charted(group: str, chart: str, tags: Iterable[str]) -> set[str]:
    """The tags that a chart of the CUSTOM SCALARS tab shows."""
    _, patterns = board_module._LAYOUT[group][chart]
    return {tag for tag in tags if any(re.search(pattern, tag) for pattern in patterns)}


@pytest.mark.parametrize(
    ("term", "tag"), [("vid", "loss/vid"), ("vib", "loss/vib"), ("mi", "loss/mi"), ("mi_bound", "mi/bound")]
)
def test_every_estimator_is_in_the_chart_of_mutual_information(term, tag):
    tags = [log.tag(name) for name in ("ce_predict", "kd_explain", term)]
    assert charted("training", "mutual information", tags) == {tag}
    assert charted("training", "mutual information", ["mi/kl", "mi/constant_share"]) == {"mi/kl"}


def test_every_task_is_in_the_chart_of_faithfulness():
    """Text labels have no rule for what a rationale implies."""
    for task, label, rationale, implied in (
        ("jsonl", "no", "Whales breathe air.", set()),
        ("esnli", "neutral", "It is neutral.", {"faithful", "implies", "agreement"}),
    ):
        record = Record("0", task, "?", label, rationale, label)
        scores = faithfulness.faithfulness([label], [rationale], [record])
        tags = [f"eval/test_{task}_{name}" for name in report.curves(scores)]
        expected = {f"eval/test_{task}_{name}" for name in {"leakage"} | implied}
        assert charted("evaluation", "faithfulness", tags) == expected


def test_a_run_s_events_hold_every_group(make_job):
    overrides = {"run.eval_every": 6, "run.eval_limit": 9, "run.test_limit": 9, "objective.method": "ib"}
    made = make_job(**overrides, **{"run.term_gradients_every": 4})
    train.train(made)
    train.close(made)
    made.board.close()
    found = events(made.folder / "tensorboard")
    scalars = found.Tags()["scalars"]
    expected = """loss/total loss/predict loss/explain loss/mi mi/constant mi/constant_share mi/entropy
        grad/norm grad/clipped_share grad/share_mi grad/norm_predict optim/lr optim/skipped_steps speed/mfu
        speed/step_s speed/data_wait_s speed/student_s speed/tokens_per_s memory/peak_gib
        memory/model_states_gib data/epoch data/padded_share data/truncated_share_labels
        eval/valid_demo_ece eval/test_demo_faithful accuracy/predict_tokens""".split()
    assert set(expected) <= set(scalars)
    assert [e.step for e in found.Scalars("loss/total")] == list(range(1, 13))
    assert [e.step for e in found.Scalars("grad/share_mi")] == [1, 5, 9]
    assert 0 < found.Scalars("speed/mfu")[-1].value < 1.5
    assert {"valid_demo/accuracy_by_length", "test_demo/reliability"} <= set(found.Tags()["images"])
    evaluated = [tag for tag in scalars if tag.startswith("eval/")]
    assert len(evaluated) <= 30 and not any("first_token" in tag for tag in evaluated)
    assert "first_token_ece" in made.results["test"]["demo"]
    text = found.Tensors("test_demo/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert made.records.test["demo"][0].question in text and "predicted label" in text


def test_without_tensorboard_nothing_is_written_or_measured(make_job):
    made = make_job(**{"run.tensorboard": False, "optim.max_steps": 2, "run.term_gradients_every": 1})
    train.train(made)
    assert not (made.folder / "tensorboard").exists() and not made.measures_gradients()


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
    features = make_job().features
    lengths = features.targets["explain"].lengths
    limit = sorted(lengths)[len(lengths) // 2]
    scalars = prepare.data_scalars(features, DataConfig(max_rationale_tokens=int(limit)))
    assert scalars["data/truncated_share_rationales"] == pytest.approx((lengths >= limit).mean())
    assert scalars["data/truncated_share_questions"] == 0.0


def test_a_terminal_gets_a_progress_bar_and_a_file_plain_lines(tmp_path):
    env = alone()
    command = [sys.executable, TRAIN, *as_arguments(tiny(tmp_path / "run", **{"run.test_limit": 2}))]
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        shown += chunk
    assert process.wait(60) == 0, shown[-3000:]
    text = shown.decode()
    assert re.search(r"12/12 \[\d\d:\d\d<\d\d:\d\d", text) and re.search(r"step 12/12 .* eta 0:00:00", text)
    again = subprocess.run(
        [*command[:2], *as_arguments(tiny(tmp_path / "run2", **{"run.test_limit": 2}))],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert "step 12/12" in again.stderr and "12/12 [" not in again.stderr and "\r" not in again.stderr
