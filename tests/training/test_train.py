"""The loop: it learns, skips what is not finite, gives up with names; the command line says what is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import tiny_models
import torch
from harness import TRAIN, alone, as_arguments, launch, same, steps, tiny, weights

from ibdistill import train
from ibdistill.config import zero_file
from ibdistill.config.load import load_settings
from ibdistill.objectives import distillation
from ibdistill.objectives.weights import means
from ibdistill.runtime import deepspeed_fixes, distributed, version
from ibdistill.runtime.distributed import EXIT_DIVERGED


def test_the_student_learns_a_few_records_by_heart(make_job):
    overrides = {"data.subsample": 16, "optim.max_steps": 120, "optim.relative_bias_lr_scale": 10.0}
    job = make_job(**overrides, **{"student.dropout": 0.0, "optim.lr": 4e-3})
    steps(job, 120)
    interval = job.meter.close_interval()
    start = means(interval.terms, interval.counts)
    steps(job, 2)
    interval = job.meter.close_interval()
    end = means(interval.terms, interval.counts)
    assert end["ce_predict"] < 0.35 * start["ce_predict"] and end["ce_explain"] < 0.5 * start["ce_explain"]


@pytest.mark.parametrize(
    ("config", "precision"),
    [(f"zero{stage}", precision) for stage in range(4) for precision in ("fp32", "bf16")],
)
def test_a_non_finite_step_is_skipped_and_counted(make_job, monkeypatch, config, precision):
    job = make_job(**{"deepspeed.config": config, "student.precision": precision})
    whole = job.whole
    steps(job, 1)
    with whole() as model:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lr = job.engine.get_lr()
    honest = distillation.head_loss

    def poisoned(*args, **kwargs):
        total, terms = honest(*args, **kwargs)
        return total * math.nan, terms

    monkeypatch.setattr(distillation, "head_loss", poisoned)
    steps(job, 2)
    with whole() as model:
        assert same({name: p.detach().clone() for name, p in model.named_parameters()}, before)
    assert (job.state.step, job.state.skipped, job.state.skipped_in_row) == (3, 2, 2)
    assert job.engine.get_lr() == lr
    monkeypatch.undo()
    steps(job, 1)
    with whole() as model:
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not same(after, before) and all(bool(p.isfinite().all()) for p in after.values())
    assert (job.state.skipped, job.state.skipped_in_row) == (2, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sparse_gradients": True}, "Sparse compression .* has been removed"),
        ({"checkpoint": {"tag_validation": "Maybe"}}, "invalid tag_validation value"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "Hybrid"),
    ],
)
def test_a_file_that_deepspeed_refuses_late_is_named(make_job, tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"mine.json: DeepSpeed refuses the file: .*{message}"):
        make_job(**{"deepspeed.config": str(path)})


def test_zero_is_left_out_where_there_is_nothing_to_divide(make_job, tmp_path):
    job = make_job()
    assert job.engine.zero_optimization_stage() == 0
    assert "config: zero0" in (job.folder / "config.yaml").read_text()
    asked_for = make_job(tmp_path / "other", **{"deepspeed.config": "zero2"})
    assert asked_for.engine.zero_optimization_stage() == 2
    settings = load_settings(None, tiny(tmp_path))
    zero_file.settle_ds_config(settings, 2)
    assert settings.deepspeed.config == "zero2"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_late_rank_waits_for_the_tokenizer_even_if_it_is_there_by_then(
    make_job, tmp_path, monkeypatch, is_there
):
    """A rank that looks for itself may find what rank 0 has just written, and skip what rank 0 waits in."""
    if is_there:
        make_job(**{"student.tokenizer": "train", "student.vocab_size": 200})
    together, honest = [], distributed.run_on_rank_0
    monkeypatch.setattr(
        distributed, "run_on_rank_0", lambda act: together.append(act.__name__) or honest(act)
    )
    make_job(**{"student.tokenizer": "train", "student.vocab_size": 200})
    assert "make" in together


def test_after_too_many_skipped_steps_the_run_ends_and_names_the_questions(make_job, monkeypatch, caplog):
    job = make_job(**{"run.max_skipped_steps": 3, "run.save_every": 2, "run.term_gradients_every": 0})
    honest = distillation.head_loss
    calls = []

    def poisoned_from_the_fourth_on(*args, **kwargs):
        total, terms = honest(*args, **kwargs)
        calls.append(1)
        return (total * math.nan if len(calls) > 3 else total), terms

    monkeypatch.setattr(distillation, "head_loss", poisoned_from_the_fourth_on)
    with pytest.raises(SystemExit) as exit_:
        train.train(job)
    assert exit_.value.code == EXIT_DIVERGED
    assert job.state.skipped_in_row == 3
    message = next(r.getMessage() for r in caplog.records if "3 steps in a row" in r.getMessage())
    ids = [job.features.ids[i] for i in job.sampler.step(5)]
    assert all(name in message for name in ids)
    assert sorted(path.name for path in job.checkpoints.folder.iterdir())[0] == "step-00000002"


@pytest.mark.parametrize("config", ["zero0", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reported_gradient_norm_is_unclipped(make_job, config, precision):
    """Clipping is on, and the reported norm is the one before it."""
    job = make_job(**{"deepspeed.config": config, "student.precision": precision, "optim.clip_norm": 1e-3})
    steps(job, 1)
    assert float(job.engine.get_global_grad_norm()) > 0.5


def step_states(optimizer) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """(fp32 weights, moments and step counts, bf16 weights) of DeepSpeed's bf16 optimizer without ZeRO."""
    wide = [p for group in optimizer.fp32_groups for p in group]
    moments = [state for p in wide for _, state in sorted(optimizer.optimizer.state[p].items())]
    return wide, moments, [p for group in optimizer.fp16_groups for p in group]


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_a_step_in_parts_is_deepspeeds_own(make_job, tmp_path, monkeypatch, clip_norm):
    """In bf16 without ZeRO; parts of several parameters, and the norm's pieces within one.

    Each of three steps starts from the same state for both: rounding that differs in one step would move some
    bf16 weights to the other neighbour, and the next step's gradients with them. The two norms are
    fp32 sums of the same squares in another order, and differ by a few units of 2^-24. With clipping they
    scale the gradients, so the moments differ as much; Adam divides most of that out of the update, which is
    at most about the learning rate. Without clipping the update does not use the norm, and is the same to
    the last bit.
    """
    monkeypatch.setattr(deepspeed_fixes, "STEP_ELEMENTS", 7000)
    given = {"student.precision": "bf16", "optim.clip_norm": clip_norm, "optim.weight_decay": 0.1}
    given |= {"deepspeed.config": "zero0", "student.dropout": 0.0, "optim.warmup_steps": 0}
    own, ours = (make_job(tmp_path / name, **given) for name in ("own", "ours"))
    del own.engine.optimizer.step
    for _ in range(3):
        before = [p.detach().clone() for p in step_states(own.engine.optimizer)[0]]
        steps(own, 1)
        steps(ours, 1)
        norms = [job.engine.get_global_grad_norm() for job in (own, ours)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-6) and norms[0] > 0.5
        states = [step_states(job.engine.optimizer) for job in (own, ours)]
        (masters, *_), (_, moments, narrow) = states
        assert max(p.numel() for p in masters) > 7000 > min(p.numel() for p in masters)
        assert all(p.grad is None for wide, *_ in states for p in wide)
        assert not any(torch.equal(old, new) for old, new in zip(before, masters, strict=True))
        for expected, found in zip(masters, states[1][0], strict=True):
            # the last bit of a weight, and a millionth of the learning rate
            close = {"rtol": 2**-23, "atol": 1e-6 * 2e-3} if clip_norm else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(found, expected, **close)
        for expected, found in zip(states[0][1], moments, strict=True):
            allowed = 1e-6 * expected.abs().max() if clip_norm else 0
            torch.testing.assert_close(found, expected, rtol=0, atol=float(allowed))
        assert all(torch.equal(p, wide.bfloat16()) for p, wide in zip(narrow, states[1][0], strict=True))
        with torch.no_grad():
            for expected, found in zip(*states, strict=True):
                torch._foreach_copy_(found, expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_follows_its_schedule(make_job, schedule):
    job = make_job(**{"optim.schedule": schedule, "optim.warmup_steps": 4, "optim.max_steps": 12})
    rates = []
    for _ in range(12):
        rates.append(job.engine.get_lr()[0])
        steps(job, 1)
    warm = [2e-3 * k / 4 for k in range(4)]
    progress = [k / 8 for k in range(8)]
    decay = {
        "linear": [2e-3 * (1 - p) for p in progress],
        "cosine": [1e-3 * (1 + math.cos(math.pi * p)) for p in progress],
        "constant": [2e-3] * 8,
    }[schedule]
    assert rates == pytest.approx(warm + decay, abs=1e-9)


@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload"])
def test_offload_configurations_train(make_job, config):
    job = make_job(**{"deepspeed.config": config})
    before = weights(job)
    steps(job, 2)
    assert not same(weights(job), before) and job.state.skipped == 0


def test_compiled_students_train_like_eager_ones(make_job, tmp_path, monkeypatch):
    """Through dynamo and AOT autograd; inductor's C++ would take minutes to build on two cores.

    Floats are constants at once: by default dynamo compiles each graph a second time when it has found that.
    """
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend="aot_eager", **kw)
    )
    model, losses = tiny_models.save(tmp_path / "t5", "t5", num_decoder_layers=1), []
    for compiled in (False, True):
        given = {"student.model": model, "student.compile": compiled, "student.dropout": 0.0}
        job = make_job(tmp_path / str(compiled), **given, **{"data.max_question_tokens": 128})
        with torch._dynamo.config.patch(specialize_float=True):
            steps(job, 2)
        losses.append(job.meter.close_interval().terms["ce_explain"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, TRAIN, *arguments], capture_output=True, text=True, timeout=120, env=alone()
    )


def test_the_command_line_refuses_before_it_trains(tmp_path):
    settings, log = as_arguments(tiny(tmp_path / "run")), tmp_path / "log"
    assert launch([TRAIN, "demo", *settings, "--optim.lrr", "1"], log=log) == 2
    said = log.read_text()
    assert not (tmp_path / "run").exists()
    assert "error: unknown setting 'optim.lrr'" in said and "Traceback" not in said
    assert launch([TRAIN, "demo", "stray", *settings], log=log) == 2
    assert "error: unexpected arguments ('stray',)" in log.read_text()


def test_help_lists_recipes_and_settings():
    shown = run_command("--help")
    assert shown.returncode == 0
    assert (
        "cqa, demo" in shown.stdout and "--objective.alpha  (float, in (0, 1]; default 0.5)" in shown.stdout
    )


def test_evaluations_decode_so_many_records_together(make_job, monkeypatch):
    job, sizes = make_job(**{"run.eval_batch_size": 5}), []
    model = type(job.engine.module.model)
    generate = model.generate

    def noted(self, *, input_ids, **settings):
        sizes.append(len(input_ids))
        return generate(self, input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", noted)
    train.evaluate(job, "test", 11)
    assert sizes == [5, 5, 1] * 2  # both streams


def test_a_finished_run_is_not_run_again(make_job, tmp_path):
    job = make_job(**{"optim.max_steps": 2, "run.test_limit": 3, "run.eval_every": 1, "run.eval_limit": 5})
    train.train(job)
    train.close(job)
    result = json.loads((job.folder / "result.json").read_text())
    assert result["steps"] == 2 and result["method"] == "dss"
    assert result.items() >= version.version().items()
    assert 0 <= result["test"]["demo"]["accuracy"] <= 1 and "rationale_bleu" in result["test"]["demo"]
    assert result["best_step"] in (1, 2)
    rows = [json.loads(line) for line in (job.folder / "predictions/step-00000002/test_demo.jsonl").open()]
    assert [row["id"] for row in rows] == [r.id for r in job.records.test["demo"][:3]]
    assert sum(row["correct"] for row in rows) / 3 == result["test"]["demo"]["accuracy"]
    assert len((job.folder / "predictions/step-00000001/valid_demo.jsonl").read_text().splitlines()) == 5
