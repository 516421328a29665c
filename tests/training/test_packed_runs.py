"""Runs with packed rows and steps of so many tokens: the same losses, teacher and cache; ZeRO-3; resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from chat_tokenizers import save_chat_model
from harness import FORKED, as_arguments, launch, same, steps, tiny, weights
from tiny_models import save

from ibdistill.objectives.weights import step_weights

DEMO = {"student.model": "demo-student-decoder", "student.dropout": 0.0}
ENCODER_DECODER = {"student.model": "demo-student", "student.dropout": 0.0}
TEACHER = {
    "teacher.placement": "replica",
    "teacher.model": "demo-teacher-decoder",
    "teacher.precision": "fp32",
    "teacher.cache_form": "states",
    "objective.method": "ib+kd",
    "objective.estimator": "vid",
}


def terms_of(job, indices: np.ndarray) -> dict[str, torch.Tensor]:
    """All terms of a micro-batch, and what the teacher says about it."""
    batch = job.collate(indices)
    answer = job.teacher_answers.of(indices, batch)
    counts = job.sampler.counts(0)
    _, terms = job.engine(
        batch, step_weights(job.config.objective, counts), answer, counts["question_tokens"]
    )
    found = {f"teacher {s}": stream.hidden for s, stream in answer.targets.items()}
    return terms | found | {"teacher questions": answer.questions}


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(DEMO, "demo-teacher-decoder"), (DEMO, "demo-teacher"), (ENCODER_DECODER, "demo-teacher")],
    ids=["decoder-only", "mixed", "encoder-decoder"],
)
def test_teacher_cache_and_every_term_are_those_of_padded_rows(make_job, tmp_path, student, teacher):
    """A packed run reads the cache that a padded one filled, since its keys are token ids."""
    pair = student | TEACHER | {"teacher.model": teacher}
    packed = make_job(**pair, **{"data.packing": "on"})
    padded = make_job(**pair)
    indices = packed.sampler.step(0)
    assert packed.collate(indices).row_lengths is not None and padded.collate(indices).row_lengths is None
    ours, theirs = terms_of(packed, indices), terms_of(padded, indices)
    assert ours.keys() == theirs.keys() and "vid" in ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-4, atol=2e-4, msg=name)
    cached = {"teacher.cache": str(tmp_path / "cache"), "data.subsample": 16}
    filling = make_job(**pair, **cached)
    steps(filling, 2)
    filling.teacher_answers.end_epoch()
    cached["teacher.placement"] = "cache"
    reading = make_job(**pair | cached, **{"data.packing": "on"})
    steps(reading, 1)


def chat(folder) -> dict[str, object]:
    """A run in format chat that trains all three streams, with adapters, from a folder."""
    folder.mkdir()
    for split, numbers in (("train", range(120)), ("valid", range(5)), ("test", range(5))):
        rows = [
            {"question": f"{i} + {i % 7} ?", "label": f"n{i}", "rationale": f"start {i} . " * (1 + i % 7)}
            for i in numbers
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **{"data.task": "jsonl", "data.path": str(folder), "data.format": "chat"},
        **{"student.model": save_chat_model(folder / "model"), "student.lora_rank": 4},
        **{"objective.method": "dss+cot", "data.max_question_tokens": 64, "data.max_rationale_tokens": 96},
    }


def qwen2(folder) -> dict[str, object]:
    return {
        "student.model": save(folder, "qwen2", max_position_embeddings=512),
        "data.max_question_tokens": 128,
    }


def t5(folder) -> dict[str, object]:
    return {"student.model": save(folder, "t5", dropout_rate=0.0)}


@pytest.mark.parametrize("case", [qwen2, chat, t5])
def test_a_step_is_that_of_padded_rows(make_job, tmp_path, case):
    """Steps of tokens, recomputed activations, adapters; and the next steps go on from a checkpoint."""
    more = case(tmp_path / "model") | {"optim.batch_size": 64, "optim.lr": 1e-2}
    more["optim.tokens_per_batch"] = 3000
    more["optim.adam_eps"] = 0.1  # else Adam makes a whole step of a gradient that is nothing but rounding
    packing = {"data.packing": "on", "student.gradient_checkpointing": True}
    jobs = []
    for settings in (more, more | packing):
        torch.manual_seed(0)  # from which adapters are drawn
        jobs.append(make_job(**settings))
    padded, packed = jobs
    assert (padded.sampler.step(3) == packed.sampler.step(3)).all()
    assert [job.micro_batches()[0][1].row_lengths is None for job in jobs] == [True, False]
    for job in (padded, packed):
        steps(job, 2)
    for name, weight in weights(packed).items():
        torch.testing.assert_close(weight, weights(padded)[name], rtol=1e-3, atol=2e-4, msg=name)
    assert packed.meter.close_interval().tokens > 0
    assert packed.checkpoints.save(packed.engine, packed.state)
    steps(packed, 2)
    again = make_job(**more, **packing, **{"run.dir": packed.config.run.dir})
    assert again.state.step == 2
    steps(again, 2)
    assert same(weights(again), weights(packed))


def t5_and_teacher(folder) -> dict[str, object]:
    """From a folder, beside a larger teacher in shares that fills a cache."""
    return {
        **{"student.model": save(folder / "student", "t5"), "objective.method": "ib+kd"},
        **{"teacher.model": save(folder / "teacher", "t5", d_model=48, num_heads=6)},
        **{"teacher.placement": "zero3", "teacher.precision": "fp32", "teacher.cache_form": "states"},
        **{"teacher.cache": str(folder / "cache")},
    }


@pytest.mark.parametrize("case", [chat, t5_and_teacher])
def test_two_ranks_of_zero3_train_on_packed_rows_of_tokens(tmp_path, case):
    """Two forward passes per rank and step; evaluation and export do not know of packing."""
    settings = case(tmp_path / "given") | {
        "deepspeed.config": "zero3",
        "data.packing": "on",
        "optim.tokens_per_batch": 4000,
        "optim.tokens_per_forward": 1000,
        "run.test_limit": 5,
    }
    arguments = tiny(tmp_path / "run", **settings) | {"optim.batch_size": 64}  # its default: as if not given
    log = tmp_path / "log"
    assert launch([FORKED, "2", "demo", *as_arguments(arguments)], log=log) == 0, log.read_text()[-4000:]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["ranks"]) == (12, 2)
    assert (tmp_path / "run/student/config.json").is_file()


def test_a_model_that_cannot_be_packed_is_refused_before_training(make_job, tmp_path):
    folder = save(tmp_path / "gemma2", "gemma2", final_logit_softcapping=None)
    with pytest.raises(ValueError, match="data.packing is 'on', and student.model is a 'gemma2' model"):
        make_job(**{"student.model": folder, "data.max_question_tokens": 128, "data.packing": "on"})


def test_an_estimator_that_compares_questions_needs_them_in_one_forward_pass(make_job, world):
    settings = {"optim.batch_size": 64, "optim.tokens_per_batch": 4000, "optim.tokens_per_forward": 2000}
    compares = {"objective.method": "ib", "objective.estimator": "infonce"}
    with pytest.raises(
        ValueError, match="optim.tokens_per_forward splits the 4000 of optim.tokens_per_batch"
    ):
        make_job(**DEMO, **settings, **compares)
