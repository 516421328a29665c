"""Ranks that share sequences: a step is that of one rank; what they cannot share is refused."""

from __future__ import annotations

import json

import pytest
import torch
from aligned_tokenizers import fallback, save_teacher
from harness import FORKED, WORKERS, as_arguments, launch, tiny
from plan import costs
from safetensors.torch import load_file
from tiny_models import save

from ibdistill.config.load import load_settings
from ibdistill.config.zero_file import readers
from ibdistill.models import sequence_parallel
from ibdistill.objectives import weights
from ibdistill.planning.dryrun import Lengths, Skeleton
from ibdistill.training import device

SHARED = {
    "cot": ["cot_zero0_2x2", "cot_zero3_4x2"],
    "own": ["own_zero1_2x2"],
    "ib+kd": ["ib+kd_zero2_2x2", "ib+kd_zero3_2x2", "ib+kd_zero2_4x4"],
    "paper": ["paper_zero1_2x2", "paper_zero3_4x4"],
    "normalized": ["normalized_zero3_2x2"],
    "infonce": ["infonce_zero2_4x2"],
    "k2": ["k2_zero2_2x2"],
    "text": ["text_zero0_2x2"],
    "cache": ["cache_zero1_2x2"],
}
RUNS = [(case, run) for case, runs in SHARED.items() for run in runs]


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory) -> dict[str, dict]:
    """CASE_zeroS_RANKSxSHARED -> gradients, terms and tokens of a step; two ranks through the launcher.

    In the case `own` half of the texts are the student's own. The model has 4 heads and 2 of keys
    and values, so that 4 ranks have to share these.
    """
    folder = tmp_path_factory.mktemp("shared")
    settings = tiny(folder) | {
        "student.model": save(folder / "student", "qwen2", max_position_embeddings=512),
        "data.packing": "on",
        "data.max_question_tokens": 128,
        "optim.batch_size": 6,
        "optim.micro_batch_size": 2,
        "optim.clip_norm": 0.0,
        "student.gradient_checkpointing": True,
        "run.term_gradients_every": 1,
    }
    save(folder / "teacher", "qwen2", hidden_size=48, max_position_embeddings=512)
    save_teacher(folder / "other", fallback())
    (folder / "settings.json").write_text(json.dumps(settings))
    worker = [str(WORKERS / "shared_sequences.py"), str(folder)]
    for ranks in (None, 2):
        log = folder / f"log{ranks}"
        assert launch(worker, ranks=ranks, log=log) == 0, log.read_text()[-4000:]
    found = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
    return found | {"models": {name: str(folder / name) for name in ("student", "teacher")}}


@pytest.mark.parametrize(("case", "run"), RUNS)
def test_a_step_of_ranks_that_share_sequences_is_that_of_one_rank(first_steps, case, run):
    alone, shared = first_steps[f"{case}_zero0_1x1"], first_steps[run]
    assert shared["tokens"] == alone["tokens"] and shared["terms"].keys() <= alone["terms"].keys()
    # it says how the questions of one call of the head loss differ, with and without groups
    measured = {name for name in shared["terms"] if case != "normalized" or name != "mi_bound"}
    assert {"ce_answer", "ce_predict"} & measured
    for name in measured:
        value = shared["terms"][name]
        assert value == pytest.approx(alone["terms"][name], rel=2e-6), name
    for name, value in shared["gradient norms"].items():
        assert value == pytest.approx(alone["gradient norms"][name], rel=1e-5), name
    assert shared["gradients"].keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        error = (shared["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < 1e-5, f"{name}: {error}"


def test_a_run_goes_on_with_ranks_that_share_nothing(tmp_path):
    """Two steps and a test of two ranks that share sequences, and two more of one rank, against one rank."""
    model = save(tmp_path / "model", "llama", max_position_embeddings=512)
    more = {"student.model": model, "objective.method": "cot", "data.packing": "on", "optim.lr": 1e-3}
    more |= {
        "data.max_question_tokens": 128,
        "optim.schedule": "constant",
        "optim.adam_eps": 1e-3,
        "run.test_limit": 3,
    }

    def run(folder: str, steps: int, **settings) -> dict[str, torch.Tensor]:
        given = tiny(tmp_path / folder) | more | {"optim.max_steps": steps} | settings
        log = tmp_path / "log"
        ranks = str(settings.get("optim.sequence_parallel", 1))
        assert launch([FORKED, ranks, *as_arguments(given)], log=log) == 0, log.read_text()[-4000:]
        return load_file(tmp_path / folder / "student" / "model.safetensors")

    alone = run("alone", 4)
    run("shared", 2, **{"optim.sequence_parallel": 2})
    shared = run("shared", 4, **{"run.allow_config_change": True})
    assert json.loads((tmp_path / "shared/result.json").read_text())["ranks"] == 1
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("run", "shared"), [("own_zero1_2x2", 2), ("ib+kd_zero2_4x4", 4)])
def test_the_planner_knows_the_bytes_that_attention_exchanges(first_steps, run, shared):
    """Of the step above: forward twice, because of checkpointing, and backward; the teacher forward."""
    tokens = first_steps[run]["positions"]  # of a rank, all micro-batches together
    lengths = Lengths(1, tokens - 1, label=1, rationale=0)  # BOS, and a target of 1 is not read
    student, teacher = (
        costs.exchanged(Skeleton(name, role, None, "fp32"), lengths, ("predict",), "fp32", shared)
        for role, name in first_steps["models"].items()
    )
    assert first_steps[run]["exchanged"] == 3 * student + teacher > 0


SHARING = {"optim.sequence_parallel": 2, "data.packing": "on", "student.model": "demo-student-decoder"}
TEACHER = {"objective.method": "cot+kd", "teacher.model": "demo-teacher-decoder"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.packing": "off"}, "which cuts packed rows, and data.packing is 'off'"),
        (TEACHER | {"teacher.placement": "zero3"}, "teacher.placement is 'zero3': the teacher has to answer"),
    ],
)
def test_settings_that_ranks_with_parts_of_sequences_cannot_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"optim.sequence_parallel is 2, .*{message}"):
        load_settings(None, SHARING | settings)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({}, False),
        ({"objective.method": "ib+kd", "objective.estimator": "vid"}, False),
        ({"objective.method": "ib", "objective.estimator": "paper", "teacher.placement": "none"}, True),
        ({"objective.kd_first": 8.0}, True),
        ({"objective.kd_entropy": "teacher"}, True),
        ({"objective.kd_target": "pmi"}, True),
        ({"objective.alignment": "text"}, True),
        ({"teacher.cache": "/tmp/answers"}, True),
        ({"objective.divergence": "k1", "on_policy.share": 0.5}, True),
    ],
)
def test_questions_come_together_only_where_something_needs_them_whole(settings, whole):
    """Else every rank has its part of the head loss."""
    given = SHARING | TEACHER | {"teacher.placement": "replica"} | settings
    if given["teacher.placement"] == "none":
        del given["teacher.model"]
    assert weights.whole_questions(load_settings(None, given)) is whole


def test_a_teacher_that_reads_other_tokens_is_refused_where_each_rank_scores_its_part(monkeypatch):
    mine, theirs = {"start": None, "separator": 1}, {"start": 5, "separator": 1}
    monkeypatch.setattr(sequence_parallel, "_group", object())
    monkeypatch.setattr(sequence_parallel, "_whole", False)  # whatever an earlier run in this process was
    sequence_parallel.check_layouts("teacher", mine, dict(mine))
    with pytest.raises(ValueError, match="'teacher' puts {'start': 5, .* not be cut at the same places"):
        sequence_parallel.check_layouts("teacher", mine, theirs)
    monkeypatch.setattr(sequence_parallel, "_whole", True)
    sequence_parallel.check_layouts("teacher", mine, theirs)


def test_models_and_ranks_that_cannot_share_sequences_are_refused(tmp_path, make_job):
    with pytest.raises(ValueError, match="sequence_parallel is 2, which does not divide the 1 ranks"):
        make_job(**SHARING)
    assert readers(load_settings(None, SHARING).optim, 6) == 3

    def refusal(ranks: int, **settings) -> str:
        config = load_settings(None, SHARING | {"optim.sequence_parallel": ranks} | settings)
        with pytest.raises(ValueError) as caught:
            device.start_sequence_parallel(config)
        return str(caught.value)

    grouped = {"student.model": save(tmp_path, "qwen2", num_attention_heads=6, num_key_value_heads=2)}
    assert "'demo-student-decoder' has 4 attention heads" in refusal(3)
    assert "has 2 key and value heads" in refusal(3, **grouped)
    assert "student.model 'demo-student' is an encoder-decoder" in refusal(
        2, **{"student.model": "demo-student"}
    )
    replica = TEACHER | {"teacher.placement": "replica", "teacher.model": "demo-teacher"}
    assert "teacher.model 'demo-teacher' is an encoder-decoder" in refusal(2, **replica)
