"""Whole runs, from folders, of families whose logits are scaled or capped, of BART and of experts."""

from __future__ import annotations

import json

import pytest
import torch
from card_lines import answers_by_card
from harness import FORKED, as_arguments, launch, steps, tiny
from tiny_models import save
from transformers import AutoModelForCausalLM

from ibdistill.objectives.weights import step_weights

LIMITS = {"data.max_question_tokens": 128, "data.max_label_tokens": 16, "data.max_rationale_tokens": 48}
LIMITS |= {"data.subsample": 16, "optim.batch_size": 4}
RUNS = {
    "gemma2": {"teacher": "gemma2", "objective.method": "ib+kd", "deepspeed.config": "zero2"},
    "granite": {"teacher": "cohere", "objective.method": "kd", "deepspeed.config": "zero2"},
    "bart": {"teacher": "plbart", "objective.method": "ib+kd", "deepspeed.config": "zero3"},
    "qwen3_moe": {"teacher": "gemma2", "objective.method": "dss", "deepspeed.config": "zero3"},
}


@pytest.mark.parametrize("model_type", RUNS)
def test_two_ranks_train_evaluate_and_export_what_transformers_decodes(tmp_path, model_type):
    """The planner, a sharded or replicated teacher of another family, ZeRO, evaluation and export."""
    more = RUNS[model_type]
    teacher = save(tmp_path / "teacher", more["teacher"], seed=1)
    settings = LIMITS | {k: v for k, v in more.items() if k != "teacher"}
    settings |= {"student.model": save(tmp_path / "student", model_type), "optim.max_steps": 6}
    settings |= {"run.test_limit": 3, "optim.lr": 1e-3}
    if more["objective.method"] != "dss":
        placement = "zero3" if model_type in ("gemma2", "bart") else "replica"
        settings |= {"teacher.model": teacher, "teacher.placement": placement, "objective.estimator": "paper"}
    log = tmp_path / "log"
    run = tiny(tmp_path / "run", **settings)
    assert launch([FORKED, "2", "demo", *as_arguments(run)], log=log) == 0, log.read_text()[-4000:]
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 6
    rows = [json.loads(x) for x in (tmp_path / "run/predictions/step-00000006/test_demo.jsonl").open()]
    assert len(rows) == 3
    said = answers_by_card(tmp_path / "run/student", [row["question"] for row in rows])
    assert said == [(row["label"], row["rationale"]) for row in rows]


@pytest.mark.parametrize("form", ["states", "topk"])
def test_a_capped_teacher_says_the_same_from_its_cache(make_job, tmp_path, form):
    """Against a formula on the teacher's own logits; then from the cache alone, without the teacher."""
    teacher, cache = save(tmp_path / "teacher", "gemma2", seed=1), str(tmp_path / "cache")
    settings = LIMITS | {"student.model": save(tmp_path / "student", "gemma2"), "student.dropout": 0.0}
    settings |= {"teacher.model": teacher, "objective.method": "kd", "teacher.cache": cache}
    settings |= {"teacher.placement": "replica"}
    settings |= {"teacher.cache_form": form, "teacher.cache_top_k": 420}
    job = make_job(tmp_path / "one", **settings)
    (indices, batch), *_ = job.micro_batches()
    rows = batch.input_ids[: len(indices)]
    logits = []
    for folder in (teacher, settings["student.model"]):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            found = model(input_ids=rows, attention_mask=batch.attention_mask[: len(indices)]).logits
        logits.append(torch.log_softmax(found.flatten(0, 1)[batch.positions["predict"]], -1))
    want = torch.nn.functional.kl_div(logits[1], logits[0], reduction="sum", log_target=True)

    def found(job) -> float:
        weights = step_weights(job.config.objective, job.sampler.counts(0))
        answer = job.teacher_answers.of(indices, batch)
        assert answer.softcap == (5.0 if form == "states" else None)
        _, terms = job.engine(batch, weights, answer, 1)
        return float(terms["kd_predict"])

    assert found(job) == pytest.approx(float(want), rel=2e-3)
    steps(job, 4)  # an epoch of 16
    job.teacher_answers.flush()
    again = make_job(tmp_path / "two", **settings | {"teacher.placement": "cache"})
    assert again.teacher_answers.teacher is None
    assert found(again) == pytest.approx(float(want), rel=2e-3)
