"""The target `pmi`: its formula from three readings, its cache, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import aligned_tokenizers
import pytest
import tiny_models
import torch
from chat_tokenizers import CHATML, data_rows, save_chat_model
from harness import FORKED, as_arguments, launch, steps, tiny
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ibdistill.config.load import load_settings
from ibdistill.config.sections import Config
from ibdistill.models.model_card import papers
from ibdistill.teacher.cache_shard import record_key
from ibdistill.teacher.teacher import Teacher
from ibdistill.training import on_policy
from ibdistill.training.prepare import prepare

PMI = {
    "objective.method": "kd",
    "objective.kd_target": "pmi",
    "teacher.placement": "replica",
    "teacher.precision": "fp32",
    "student.dropout": 0.0,
    "data.subsample": 16,
    "run.term_gradients_every": 0,
}
SAMPLED = {"on_policy.share": 0.5, "on_policy.max_tokens": 6}
REFERENCE = "\n\nReference solution:\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Kind -> a folder: an encoder-decoder and a decoder-only model of one tokenizer, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    own, other = aligned_tokenizers.byte_level(words=400), aligned_tokenizers.fallback(bos=True)
    return {
        "t5": aligned_tokenizers.save_teacher(folder / "t5", own, "t5"),
        "llama": aligned_tokenizers.save_teacher(folder / "llama", own),
        "other": aligned_tokenizers.save_teacher(folder / "other", other),
    }


def log_probabilities(model, tokenizer, text: str, target: list[int]) -> torch.Tensor:
    """Of every token at a target's places, in fp64, by one unpadded row of this prompt."""
    asked = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if model.config.is_encoder_decoder:
        read = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        logits = model(input_ids=torch.tensor([asked]), decoder_input_ids=read).logits[0]
        return torch.log_softmax(logits, -1)
    newline = next(iter(tokenizer("\n", add_special_tokens=False).input_ids[-1:]))
    lead = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    row = [*lead, *asked[:-1], newline, *target[:-1]]
    return torch.log_softmax(model(input_ids=torch.tensor([row])).logits[0], -1)[-len(target) :]


@pytest.mark.parametrize(
    ("student", "teacher", "more"),
    [
        ("llama", "t5", SAMPLED),
        ("t5", "llama", SAMPLED | {"data.packing": "on"}),
        ("t5", "other", SAMPLED | {"objective.alignment": "text"}),
        ("llama", "llama", {}),
    ],
)
@torch.no_grad()
def test_the_target_is_the_formula_of_three_readings_in_fp64(make_job, folders, student, teacher, more):
    models = {"student.model": folders[student], "teacher.model": folders[teacher]}
    job = make_job(**PMI | models | more)
    if "on_policy.share" in more:
        on_policy.refresh(job)
    auto = AutoModelForSeq2SeqLM if teacher == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(folders[teacher], dtype=torch.float64).eval()
    ((rows, batch),) = job.micro_batches()
    answer, aligned = job.teacher_answers.of(rows, batch), job.teacher_answers.alignment
    tokenizer, own, differs = aligned.tokenizer if aligned else job.tokenizer, 0, 0.0
    records = {record.id: record for record in job.records.train}
    for number, row in enumerate(rows):
        record = records[job.features.ids[row]]
        reference = f"{record.rationale}\n{record.label}"
        own += row >= len(job.gold)
        for segment, stream in answer.targets.items():
            labels, cu = (stream.labels, stream.cu) if aligned else (batch.labels[segment], batch.cu[segment])
            a, b = cu[number : number + 2].tolist()
            said = labels[a:b].tolist()
            if not said:
                continue
            asked, seen, alone = (
                log_probabilities(model, tokenizer, f"{segment}: {text}", said)
                for text in (
                    record.question,
                    f"{record.question}{REFERENCE}{reference}",
                    f"{REFERENCE.lstrip()}{reference}",
                )
            )
            expected = torch.softmax(asked + seen - alone, -1)
            found = torch.softmax(stream.hidden[a:b].double() @ answer.weight.double().T, -1)
            torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-3, atol=1e-5)
            differs = max(differs, float((expected - asked.exp()).abs().max()))
    assert own == (4 if "on_policy.share" in more else 0) and differs > 1e-3


def test_answers_are_read_again_and_belong_to_one_reference(make_job, world, tmp_path, folders, monkeypatch):
    calls, honest = [], Teacher.states
    monkeypatch.setattr(Teacher, "states", lambda self, batch: calls.append(1) or honest(self, batch))
    models = {"student.model": folders["t5"], "teacher.model": folders["llama"]}
    cache = models | {"teacher.cache": str(tmp_path / "cache"), "teacher.cache_form": "states"}
    job = make_job(tmp_path / "asks", **PMI | cache)
    steps(job, 2)
    assert len(calls) == 6  # three readings of each of two batches
    read = make_job(tmp_path / "reads", **PMI | cache | {"teacher.placement": "cache"})
    fresh = make_job(tmp_path / "fresh", **PMI | models)
    ((rows, batch),) = read.micro_batches()
    cached, now = read.teacher_answers.of(rows, batch), fresh.teacher_answers.of(rows, batch)
    for segment, stream in now.targets.items():
        torch.testing.assert_close(cached.targets[segment].hidden, stream.hidden, rtol=1e-4, atol=1e-4)
    other = replace(job.gold, with_reference={"explain": job.gold.with_reference["predict"]})
    assert record_key(other, 0) != record_key(job.gold, 0) == job.teacher_answers._keys[0]
    settings = tiny(tmp_path / "refused", **PMI | cache | {"objective.kd_target": "teacher"})
    with pytest.raises(ValueError, match='target is "pmi" there and absent here'):
        prepare(load_settings(None, settings), world)


def test_in_format_chat_the_reference_stands_in_the_user_s_turn(make_job, tmp_path):
    folder = save_chat_model(tmp_path / "model", template=CHATML)
    settings = {
        **{"data.task": "jsonl", "data.path": data_rows(tmp_path / "data"), "data.format": "chat"},
        **{"data.subsample": 1.0, "optim.batch_size": 4, "objective.method": "cot+kd"},
        **{"data.max_question_tokens": 64, "data.max_rationale_tokens": 64, "data.max_label_tokens": 24},
        **{"student.model": folder, "teacher.model": folder, "on_policy.share": 0.5},
    }
    job = make_job(**PMI | settings)
    record, turn = job.records.train[0], "<|im_start|>user\n"
    reference = f"Reference solution:\n{record.rationale}\n{record.label}<|im_end|>"
    seen, alone = (
        job.tokenizer.decode(table["reason"][0])
        for table in (job.gold.with_reference, job.gold.reference_alone)
    )
    assert f"{record.question}\n\n{reference}" in seen
    assert f"{turn}reason: {reference}" in alone or f"{turn}{reference}" in alone
    on_policy.refresh(job)
    steps(job, 2)
    assert job.meter.close_interval().terms["kd_sampled"] > 0


def test_records_that_join_later_have_references_too(make_job, folders):
    models = {"student.model": folders["t5"], "teacher.model": folders["llama"]}
    more = {"data.unlabelled": 40, "data.agree_at": "[0.5]", "data.agree_share": 0.5}
    job = make_job(**PMI | models | more)
    job.mix([replace(record, id=f"{record.id}/pseudo") for record in job.records.train[:6]])
    assert len(job.features.with_reference["predict"]) == len(job.gold) + 6
    steps(job, 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective.method": "ib"}, "objective.method ib .*has no distillation term; take kd"),
        ({"objective.method": "ib+kd", "objective.mi_pair": "teacher"}, "mi_pair teacher pools"),
        (
            {"teacher.placement": "server", "teacher.server_urls": "[http://x:1]", "teacher.cache": "y"},
            "teacher.placement server gives the most probable tokens alone",
        ),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=f"objective.kd_target is 'pmi', and .*{message}"):
        load_settings(None, tiny(tmp_path, **PMI | {"teacher.model": "demo-teacher"} | more))


def test_a_teacher_that_caps_its_logits_or_has_too_few_positions_is_refused(make_job, tmp_path):
    capped = tiny_models.save(tmp_path / "gemma2", "gemma2")
    models = {
        "student.model": tiny_models.save(tmp_path / "gpt2", "gpt2", n_positions=160),
        "teacher.model": capped,
    }
    small = {"data.max_question_tokens": 100, "data.max_rationale_tokens": 48}
    with pytest.raises(ValueError, match="'pmi', and teacher.model '.*gemma2' caps its logits"):
        make_job(**PMI | models | small)
    models["teacher.model"] = models["student.model"]
    with pytest.raises(ValueError, match="gpt2' has 160 positions where [0-9]+ are needed; lower"):
        make_job(**PMI | models | small)


def test_a_run_at_the_defaults_from_a_folder(tmp_path, folders):
    """Two ranks, on the student's own text, with a teacher in ZeRO-3."""
    settings = tiny(tmp_path / "run", **{"run.report_to": [], "optim.max_steps": 2, "run.test_limit": 4})
    models = {"student.model": folders["t5"], "teacher.model": folders["llama"]}
    more = {"objective.method": "kd", "objective.kd_target": "pmi", "teacher.placement": "zero3"}
    arguments = as_arguments(settings | models | more | SAMPLED)
    log = tmp_path / "log"
    assert launch([FORKED, "2", *arguments], log=log) == 0, log.read_text()[-4000:]
    assert json.loads((tmp_path / "run/result.json").read_text())["on_policy"]["texts"] > 0
    assert "2607.02234" in (tmp_path / "run/student/README.md").read_text()


def test_the_paper_is_credited():
    objective = Config().objective
    objective.method, objective.kd_target, objective.beta = "kd", "pmi", 0.1
    assert any("2607.02234" in paper for paper in papers(objective))
