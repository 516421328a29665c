"""Runs whose student writes rationale and answer in one text: whole ones, ranks, teachers, resuming, LoRA."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from card_lines import answers_by_card
from chat_tokenizers import save_chat_model, talks_folder
from harness import FORKED, TRAIN, WORKERS, as_arguments, launch, same, steps, weights
from tiny_models import byte_tokenizer, config_of
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from workers.one_step import gradients_of_step

from ibdistill import evaluate_student, train
from ibdistill.config import fields
from ibdistill.config.evaluation_sections import StudentEvaluation
from ibdistill.config.load import load_settings
from ibdistill.training import evaluation, results
from ibdistill.training.prepare import prepare

ROWS = [
    {"question": f"{a} + {b} ?", "rationale": f"start {a} . found means + {b} .", "label": str(a + b)}
    for a, b in ((3, 4), (1, 1), (5, 4), (2, 6))
]
COT = {"objective.method": "cot", "student.dropout": 0.0}
TAUGHT = COT | {
    "objective.method": "cot+ib+kd",
    "teacher.placement": "replica",
    "teacher.model": "demo-teacher",
    "teacher.precision": "fp32",
    "data.subsample": 64,  # 8 steps per epoch, no record left over
    "optim.max_steps": 24,
}


def model_folder(folder, kind: str) -> str:
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    size = {"d_model": 64, "d_ff": 128} if kind == "t5" else {"hidden_size": 64, "intermediate_size": 128}
    auto.from_config(config_of(kind, **size)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def data_folder(folder) -> str:
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder)


@pytest.mark.parametrize(("kind", "method", "ranks"), [("llama", "cot", 2), ("t5", "cot", 1)])
def test_a_run_memorises_and_its_export_answers_the_same(world, tmp_path, kind, method, ranks):
    settings = {
        **{"data.task": "jsonl", "data.path": data_folder(tmp_path / "data")},
        **{"student.model": model_folder(tmp_path / "model", kind), "objective.method": method},
        **{"run.dir": str(tmp_path / "run"), "optim.batch_size": 4, "optim.lr": 5e-3},
        **{"optim.warmup_steps": 10, "optim.max_steps": 100 if kind == "llama" else 250},
        **{"data.max_question_tokens": 64, "data.max_rationale_tokens": 48, "data.max_label_tokens": 16},
    }
    if kind == "t5":
        settings |= {"optim.relative_bias_lr_scale": 10, "student.dropout": 0.0}
    log = tmp_path / "log"
    if ranks > 1:
        code = launch([TRAIN, *as_arguments(settings)], ranks=ranks, log=log)
    else:
        code = launch([FORKED, "1", *as_arguments(settings)], log=log)
    assert code == 0, log.read_text()[-3000:]
    result = json.loads((tmp_path / "run/result.json").read_text())
    scores = result["test"]["jsonl"]
    assert result["method"] == method and scores["accuracy"] == scores["reason_accuracy"] == 1
    assert scores["reason_cut_off"] == scores["reason_unanswered"] == 0 and scores["rationale_bleu"] > 99.99
    assert scores["reason_confidence"] == scores["confidence"] > 0.7
    assert "reason_accuracy 1  reason_cut_off 0  reason_tokens " in log.read_text()
    assert "answer 0." in log.read_text() and "rationale 0." in log.read_text()
    path = next((tmp_path / "run/predictions").glob("*/test_jsonl.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, given in zip(rows, ROWS, strict=True):
        assert (row["label"], row["rationale"]) == (given["label"], given["rationale"])
        own = row["reasoned"]
        assert own["answered"] and own["ended"] and own["confidence"] == row["confidence"]
        ids = byte_tokenizer()(f"{given['rationale']}\nThe answer is: {given['label']}").input_ids
        assert abs(own["tokens"] - len(ids) - 1) <= 1  # of which one may join the parts
    given = evaluate_student.with_run(str(tmp_path / "run"), {"eval.dir": str(tmp_path / "again")})
    asked = fields.from_flat(StudentEvaluation, given)
    assert asked.eval.reason == "only"
    again = evaluate_student.prepare(str(tmp_path / "run"), asked, world)()["scores"]
    assert again == pytest.approx(scores, rel=1e-4)
    card = answers_by_card(tmp_path / "run/student", [row["question"] for row in ROWS])
    assert card == [(row["label"], row["rationale"]) for row in ROWS]


def test_gradients_do_not_depend_on_ranks_micro_batches_and_stage(tmp_path):
    save_chat_model(tmp_path / "student", hidden_size=32)
    save_chat_model(tmp_path / "teacher", hidden_size=48)
    talks_folder(tmp_path / "talks")
    log = tmp_path / "log"
    assert launch([str(WORKERS / "reasoners.py"), str(tmp_path)], log=log) == 0, log.read_text()[-4000:]
    cases = {"streams": (40, 3), "teacher": (28, 3), "infonce": (25, 2), "chat": (20, 4)}
    for case, (parameters, others) in cases.items():
        reference = torch.load(tmp_path / f"{case}_zero0_1ranks.pt")
        assert len(reference) > parameters
        paths = set(tmp_path.glob(f"{case}_*.pt")) - {tmp_path / f"{case}_zero0_1ranks.pt"}
        assert len(paths) == others
        for path in sorted(paths):
            ours = torch.load(path)
            assert ours.keys() == reference.keys()
            for name, gradient in reference.items():
                error = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
                assert error < 1e-5, f"{path.stem} {name}: {error}"


@pytest.mark.parametrize("form", ["states", "topk"])
def test_a_cached_answer_is_the_one_that_was_asked_for(make_job, tmp_path, form):
    cached = TAUGHT | {"teacher.cache": str(tmp_path / "cache"), "teacher.cache_form": form}
    job = make_job(tmp_path / "a", **cached)
    first = gradients_of_step(job)
    steps(job, 7)
    job.teacher_answers.flush()
    again = make_job(tmp_path / "b", **cached | {"teacher.placement": "cache"})
    assert again.teacher_answers.teacher is None
    assert same(gradients_of_step(again), first)
    steps(again, 7)
    assert same(weights(again), weights(job))
    if form == "states":
        plain = make_job(tmp_path / "c", **TAUGHT)
        assert same(gradients_of_step(plain), first)
        terms = plain.meter.close_interval().terms
        assert {
            "ce_answer",
            "ce_rationale",
            "kd_answer",
            "kd_rationale",
            "vid",
            "correct_answer",
        } <= terms.keys()


@pytest.mark.parametrize(
    ("model", "packing"),
    [("demo-student", "off"), ("demo-student", "on"), ("demo-student-decoder", "off")],
)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(make_job, tmp_path, model, packing):
    settings = {"objective.method": "dss+cot", "student.model": model, "data.packing": packing}
    whole = make_job(tmp_path / "whole", **settings)
    steps(whole, 6)
    part = make_job(tmp_path / "part", **settings)
    steps(part, 3)
    part.checkpoints.save(part.engine, part.state)
    resumed = make_job(tmp_path / "part", **settings)
    assert resumed.state.step == 3
    steps(resumed, 3)
    assert same(weights(resumed), weights(whole))


def test_all_three_streams_are_decoded_scored_and_evaluated_again(make_job, tmp_path, monkeypatch):
    """The predict stream gives the label, the reason stream scores of its own; the file is read back."""
    job = make_job(**{"objective.method": "dss+cot", "optim.max_steps": 1, "run.test_limit": 3})
    job.config.run.log_every = 1
    train.train(job)
    evaluation.evaluate(job, "test", 3)
    results.export_student(job)
    scores = job.results["test"]["demo"]
    assert {"accuracy", "rationale_bleu", "reason_accuracy", "reason_ece", "reason_tokens"} <= scores.keys()
    path = next((job.folder / "predictions").glob("*/test_demo.jsonl"))
    settings = evaluate_student.with_run(str(job.folder), {"eval.dir": str(tmp_path / "again")})
    assert settings["eval.reason"] == "also"
    card = (job.folder / "student/README.md").read_text()
    assert 'reasoning, _, reasoned = map(str.strip, text.rpartition("predict:"))' in card
    assert "with `explain=True`, for the reasoning with the answer with `reason=True`" in card
    rows = path.read_text().splitlines()
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text(json.dumps(json.loads(rows[0]) | {"reasoned": {"label": 3}}) + "\n")
    records = job.records.test["demo"][:3]
    again = evaluation.evaluation_predictions.read_predictions(path, records)
    assert evaluation.evaluation_predictions.scores(again) == scores
    with pytest.raises(ValueError, match=r"damaged.jsonl:1: reasoned is .*, which is not what an evaluation"):
        evaluation.evaluation_predictions.read_predictions(damaged, records)


def test_dropped_records_leave_the_run_and_are_counted(make_job, caplog):
    caplog.set_level(logging.WARNING)
    job = make_job(**COT, **{"data.max_rationale_tokens": 24})
    kept = len(job.features)
    assert 8 <= kept < 100 and job.records.report["train/long_reasoning"] == 100 - kept
    assert [record.id for record in job.records.train] == list(job.features.ids)
    assert f"train: {100 - kept} of 100 rationales of the reason stream are longer than 24" in caplog.text
    steps(job, 2)
    cut = make_job(
        job.folder.parent / "cut", **COT, **{"data.max_rationale_tokens": 24, "data.long_reasoning": "cut"}
    )
    assert len(cut.features) == 100 and cut.features.targets["rationale"].lengths.max() == 24


def test_adapters_and_vib_learn_it_too(make_job, tmp_path):
    lora = make_job(
        tmp_path / "lora", **COT, **{"student.model": "demo-student-decoder", "student.lora_rank": 2}
    )
    before = weights(lora)
    steps(lora, 2)
    changed = [name for name, value in weights(lora).items() if not torch.equal(value, before[name])]
    assert changed and all("lora_" in name for name in changed)
    vib = make_job(tmp_path / "vib", **COT | {"objective.method": "cot+ib", "objective.estimator": "vib"})
    steps(vib, 2)
    assert vib.meter.close_interval().terms["vib"] > 0


def test_a_prompt_and_reasoning_beyond_the_positions_are_refused(world, tmp_path):
    settings = COT | {"student.model": "demo-student-decoder", "run.dir": str(tmp_path / "run")}
    settings |= {"data.max_question_tokens": 1500, "data.max_rationale_tokens": 500}
    with pytest.raises(ValueError, match="with up to 564 target tokens and BOS need 2065"):
        prepare(load_settings(None, settings), world)
