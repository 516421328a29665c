"""A teacher of another vocabulary: what it reads, where its answers go, its cache, and whole runs with it."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import aligned_tokenizers
import numpy as np
import pytest
import torch
from chat_tokenizers import CHATML, data_rows, save_chat_model
from harness import FORKED, TRAIN, as_arguments, kill_session, launch, start, steps, tiny
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.data import token_ids
from ibdistill.data.alignment import END
from ibdistill.data.ragged import Ragged
from ibdistill.ops.head_loss.aligned import OWN
from ibdistill.teacher import alignment
from ibdistill.teacher.teacher import Teacher
from ibdistill.training import on_policy
from ibdistill.training.prepare import prepare

ALIGNED = {
    "objective.method": "ib+kd",
    "objective.alignment": "text",
    "teacher.placement": "replica",
    "teacher.precision": "fp32",
    "student.dropout": 0.0,
    "data.subsample": 64,
    "data.max_rationale_tokens": 20,  # some are cut
    "run.term_gradients_every": 0,
    "run.save_every": 100,
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    """Kind -> a folder: `fallback` is decoder-only with a BOS, `bytes` an encoder-decoder."""
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "fallback": aligned_tokenizers.save_teacher(folder / "f", aligned_tokenizers.fallback(bos=True)),
        "bytes": aligned_tokenizers.save_teacher(folder / "b", aligned_tokenizers.byte_level(), "t5"),
        "student": aligned_tokenizers.save_teacher(folder / "s", aligned_tokenizers.byte_level(words=400)),
    }


def terms(job) -> dict[str, float]:
    return job.meter.close_interval().terms


def alone(model, tokenizer, prompt: list[int], target: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's logits at a target's tokens and its states of the question's, of this one row."""
    if model.config.is_encoder_decoder:
        read = [model.config.decoder_start_token_id, *target[:-1]]
        found = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([read]))
        return found.logits[0, : len(target)], found.encoder_last_hidden_state[0]
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")  # the separator; the question ends with the end token
    row = [tokenizer.bos_token_id, *prompt[:-1], newline, *target[:-1]]
    found = model(input_ids=torch.tensor([row]), output_hidden_states=True)
    first = len(prompt)
    return found.logits[0, first : first + len(target)], found.hidden_states[-1][0, 1 : 1 + len(prompt)]


@pytest.mark.parametrize(
    ("student", "teacher", "packing"),
    [
        ("demo-student", "fallback", "off"),
        ("demo-student", "bytes", "off"),
        ("student", "fallback", "on"),
        ("student", "bytes", "off"),
    ],
)
@torch.no_grad()
def test_the_teacher_reads_the_same_text_and_its_answers_lie_at_the_student_s_tokens(
    make_job, teachers, student, teacher, packing
):
    more = {"student.model": teachers.get(student, student), "teacher.model": teachers[teacher]}
    job = make_job(**ALIGNED | more | {"data.packing": packing})
    ((rows, batch),) = job.micro_batches()
    answer, aligned = job.teacher_answers.of(rows, batch), job.teacher_answers.alignment
    theirs = aligned.tokenizer
    auto = AutoModelForSeq2SeqLM if teacher == "bytes" else AutoModelForCausalLM
    model = auto.from_pretrained(teachers[teacher]).eval()
    mine, yours = aligned._student, aligned._teacher
    place, single = 0, 0
    for number, row in enumerate(rows):
        record = job.records.train[row]
        asked = theirs("predict: " + record.question, add_special_tokens=False).input_ids
        asked.append(theirs.eos_token_id)
        for segment, prefix in (("predict", "predict: "), ("explain", "explain: ")):
            target, ids = answer.targets[segment], job.features.targets[segment][row].tolist()
            text = job.tokenizer.decode(ids[:-1], skip_special_tokens=True)
            said = [*theirs(text, add_special_tokens=False).input_ids, theirs.eos_token_id]
            a, b = target.cu[number : number + 2].tolist()
            assert target.labels[a:b].tolist() == said
            prompt = theirs(prefix + record.question, add_special_tokens=False).input_ids
            logits, states = alone(model, theirs, [*prompt, theirs.eos_token_id], said)
            found = target.hidden[a:b] @ answer.weight.T
            torch.testing.assert_close(found, logits[:, : found.shape[1]], rtol=1e-4, atol=1e-4)
            if segment == "predict":
                asked_states = states
            first = int(batch.cu[segment][number])
            own = target.spans[(target.spans[:, 0] >= first) & (target.spans[:, 0] < first + len(ids))]
            assert own[:, 0].tolist() == [first, *own[:-1, 1].tolist()] and own[-1, 1] == first + len(ids)
            assert own[:, 2].tolist() == [a, *own[:-1, 3].tolist()] and own[-1, 3] == b
            for i, j, k, m, bucket, kind in (own - torch.tensor([first, first, a, a, 0, 0])).tolist():
                left, right = b"".join(mine.of(ids[i:j])), b"".join(yours.of(said[k:m]))
                assert left.strip() == right.strip()  # the first has a space on one side
                assert kind == (0 if i or mine.spaced == yours.spaced else 1 if mine.spaced else 2)
                if j - i == m - k == 1 and bucket != OWN:
                    side = answer.vocabularies[kind]
                    assert side[0].shared[bucket] == ids[i] and side[1].shared[bucket] == said[k]
                    single += 1
        # vid: a token's teacher state is the mean over the aligned span
        ids = job.features.first_questions[row].tolist()
        pooled = answer.questions[place : place + len(ids)]
        place += len(ids)
        assert len(asked_states) == len(asked)
        for i, token in enumerate(ids):
            if mine.of([token]) == [END] or (token in mine.special and token != job.tokenizer.eos_token_id):
                continue
            before, after = (len(b"".join(mine.of(ids[:n])).strip()) for n in (i, i + 1))
            ends = [len(b"".join(yours.of(asked[:n])).strip()) for n in range(len(asked) + 1)]
            own_ends = {len(b"".join(mine.of(ids[:n])).strip()) for n in range(len(ids) + 1)}
            shared = sorted(own_ends & set(ends))
            if before in shared and after in shared and ends.count(before) == ends.count(after) == 1:
                members = slice(ends.index(before), ends.index(after))
                torch.testing.assert_close(pooled[i], asked_states[members].mean(0), rtol=1e-4, atol=1e-4)
    assert single > len(rows)
    assert place == len(answer.questions) == len(batch.question_positions)


@pytest.mark.parametrize("method", ["ib+kd", "cot+ib+kd"])
def test_a_teacher_of_the_same_vocabulary_says_what_it_says_without_alignment(make_job, tmp_path, method):
    settings = ALIGNED | {"teacher.model": "demo-teacher", "objective.method": method}
    settings |= {"objective.estimator": "vid", "run.term_gradients_every": 1}
    found = {}
    for name in ("none", "text"):
        job = make_job(tmp_path / name, **settings | {"objective.alignment": name})
        steps(job, 2)
        found[name] = terms(job)
    assert found["text"] == pytest.approx(found["none"], rel=1e-5)
    assert found["text"]["teacher_asked"] == found["none"]["teacher_asked"] > 0


def test_the_first_epoch_asks_later_ones_read_and_another_tokenizer_is_refused(
    make_job, world, tmp_path, teachers, monkeypatch
):
    calls, honest = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, batch: calls.append(1) or honest(self, batch))
    cache = {"teacher.cache": str(tmp_path / "cache"), "teacher.model": teachers["fallback"]}
    plain = make_job(tmp_path / "plain", **ALIGNED | cache | {"teacher.cache": ""})
    steps(plain, 9)
    expected, calls[:] = terms(plain), []
    cached = make_job(tmp_path / "cached", **ALIGNED | cache)
    assert cached.config.teacher.cache_form == "states"
    steps(cached, 8)
    assert len(calls) == 8
    steps(cached, 1)
    assert len(calls) == 8 and terms(cached) == pytest.approx(expected, rel=1e-4)
    read = make_job(tmp_path / "read", **ALIGNED | cache | {"teacher.placement": "cache"})
    assert read.teacher_answers.teacher is None
    steps(read, 1)
    fresh = make_job(tmp_path / "fresh", **ALIGNED | cache | {"teacher.cache": ""})
    steps(fresh, 1)
    assert len(calls) == 9 and terms(read) == pytest.approx(terms(fresh), rel=1e-4)
    # the same weights under another tokenizer of as many tokens
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(teachers["fallback"]).save_pretrained(other)
    aligned_tokenizers.fallback("another", bos=True).save_pretrained(other)
    settings = tiny(tmp_path / "refused", **ALIGNED | cache | {"teacher.model": str(other)})
    with pytest.raises(ValueError, match="teacher_tokenizer is .* there and .* here"):
        prepare(load_settings(None, settings), world)


@pytest.mark.parametrize("method", ["kd", "cot+kd"])
def test_text_of_the_student_s_own_is_aligned_too(make_job, teachers, method):
    more = {"on_policy.share": 0.5, "on_policy.max_tokens": 6, "objective.method": method}
    job = make_job(**ALIGNED | {"teacher.model": teachers["fallback"]} | more)
    on_policy.refresh(job)
    train.train_step(job)
    found = terms(job)
    assert np.isfinite(list(found.values())).all() and found["kd_sampled"] > 0
    ((rows, batch),) = job.micro_batches()
    answer, first = job.teacher_answers.of(rows, batch), len(job.gold)
    segment = "explain" if method == "kd" else "rationale"
    target = answer.targets[segment]
    for number, row in enumerate(rows):
        if row >= first:
            a, b = target.cu[number : number + 2].tolist()
            ids = job.features.targets[segment][row].tolist()
            said = job.teacher_answers.alignment.tokenizer.decode(
                target.labels[a:b], skip_special_tokens=True
            )
            assert said.split() == job.tokenizer.decode(ids, skip_special_tokens=True).split()
            assert (target.labels[a:b][-1:] == 2).all() == (ids[-1] == job.tokenizer.eos_token_id)


def test_records_that_join_later_are_read_by_the_teacher_too(make_job, teachers):
    more = {"teacher.model": teachers["bytes"], "data.unlabelled": 40, "data.agree_at": "[0.5]"}
    job = make_job(**ALIGNED | more | {"data.agree_share": 0.5})
    pseudo = [replace(record, id=f"{record.id}/pseudo") for record in job.records.train[:6]]
    job.mix(pseudo)
    steps(job, 1)
    assert len(job.features.teacher_questions["predict"]) == len(job.gold) + 6
    [(rows, batch)] = job.micro_batches()
    assert (rows >= len(job.gold)).sum() == 4
    answer = job.teacher_answers.of(rows, batch)
    assert len(answer.questions) == len(batch.question_positions)


def test_in_format_chat_each_reads_its_own_template(tmp_path, world, make_job):
    tokenizer = aligned_tokenizers.fallback()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|model|>", "<|stop|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|model|>' }}{{ m['content'] }}"
        "{{ '<|stop|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|model|>' }}{% endif %}"
    )
    settings = ALIGNED | {
        **{"data.task": "jsonl", "data.path": data_rows(tmp_path / "data"), "data.format": "chat"},
        **{"data.subsample": 1.0, "optim.batch_size": 4, "objective.method": "dss+cot"},
        **{"data.max_question_tokens": 64, "data.max_rationale_tokens": 64, "data.max_label_tokens": 24},
        **{"student.model": save_chat_model(tmp_path / "student", template=CHATML)},
        **{"teacher.model": aligned_tokenizers.save_teacher(tmp_path / "teacher", tokenizer)},
        **{"objective.method": "cot+ib+kd"},
    }
    job = make_job(**settings)
    ((rows, batch),) = job.micro_batches()
    aligned = job.teacher_answers.alignment
    assert job.tokenizer.eos_token == "<|im_end|>" and aligned.tokenizer.eos_token == "<|stop|>"
    own = aligned.rendered(job.features, rows)
    asked = aligned.tokenizer.decode(own.questions["reason"][0])
    assert asked.startswith("<|user|>") and asked.endswith("<|model|>") and own.whole_prompts
    answer = job.teacher_answers.of(rows, batch)
    assert len(answer.questions) == len(batch.question_positions)
    spans = answer.targets["answer"].spans
    ends = batch.cu["answer"][1:].tolist()
    assert set(ends) <= set(spans[:, 1].tolist())  # the ends of turns are partners
    assert answer.targets["answer"].labels[spans[-1, 3] - 1] == aligned.tokenizer.eos_token_id
    steps(job, 2)
    assert {"kd_rationale", "kd_answer", "vid"} <= terms(job).keys()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher.placement": "none", "objective.method": "dss"}, "so no teacher answers; choose one"),
        (
            {"teacher.cache": "x", "teacher.cache_form": "topk"},
            "'topk', of the student's tokens; take states",
        ),
        (
            {"teacher.cache": "x", "teacher.cache_form": "sampled"},
            "'sampled', of the student's tokens; take states",
        ),
        ({"objective.method": "dss", "teacher.rationales": "all"}, "nothing is compared with a teacher"),
        ({"objective.kd_later": 1}, "kd_later or kd_entropy weighs single tokens"),
        ({"on_policy.share": 0.5, "objective.divergence": "k1"}, "divergence is 'k1'.*take reverse"),
        ({"objective.mi_pair": "teacher", "objective.estimator": "paper"}, "mi_pair is 'teacher'"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, more, message):
    settings = tiny(tmp_path, **ALIGNED | {"teacher.model": "demo-teacher"} | more)
    with pytest.raises(ValueError, match=message):
        load_settings(None, settings)


def test_tokenizers_that_share_next_to_nothing_are_refused_with_figures(
    make_job, tmp_path, teachers, monkeypatch
):
    few = aligned_tokenizers.byte_level(words=1)
    folder = aligned_tokenizers.save_teacher(tmp_path / "few", few)
    with pytest.raises(
        ValueError, match=r"has 260 tokens, the teacher's \d+, and they share \d+, less than 5%"
    ):
        make_job(**ALIGNED | {"teacher.model": folder})
    monkeypatch.setattr(alignment, "LEAST_ALIGNED", 1.1)
    with pytest.raises(
        ValueError, match=r"of the 1521 target tokens of 64 training records .*fewer than 1.1 spans per token"
    ):
        make_job(**ALIGNED | {"teacher.model": teachers["fallback"]})
    with pytest.raises(ValueError, match=r"compare them on the text \(objective\.alignment text\)"):
        make_job(**ALIGNED | {"teacher.model": teachers["fallback"], "objective.alignment": "none"})


def test_how_well_the_text_aligns_is_said_at_the_start(make_job, teachers, caplog):
    with caplog.at_level("INFO", logger="ibdistill"):
        make_job(**ALIGNED | {"teacher.model": teachers["fallback"]})
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("alignment:")]
    line, predict, _ = said
    assert predict.startswith("alignment: teacher, predict: question 'predict: ") and "</s>'" in predict
    assert "they share 252;" in line and "100.0% lie in 1521 aligned spans, and 61.5% of" in line


def test_a_character_that_one_tokenizer_does_not_know_is_left_out(make_job, teachers):
    job = make_job(**ALIGNED | {"teacher.model": teachers["fallback"]})
    aligned = job.teacher_answers.alignment
    [mine] = token_ids.target_ids(["found xylophone ate ."], job.tokenizer)
    features = job.gold.take([0])
    features.targets["explain"] = Ragged([mine])
    yours = aligned.rendered(features, [0]).targets["explain"][0].tolist()
    assert aligned.tokenizer.decode(yours) == "found ate .</s>"
    unknown, found = mine.index(job.tokenizer.unk_token_id), aligned._spans(mine, yours)
    assert all(not a <= unknown < b for a, b, *_ in found) and found[0][:2] == (0, 1)
    assert found[-1][1] == len(mine) and len(found) == 3  # found, the full stop and the end


def test_two_ranks_killed_and_resumed_through_the_launcher(tmp_path, teachers):
    """Both models in ZeRO-3, the student's own text among the data's; killed after step 3 of 4 in an
    epoch."""
    settings = ALIGNED | {
        "teacher.model": teachers["fallback"],
        "teacher.placement": "zero3",
        "teacher.cache": str(tmp_path / "cache"),
        "deepspeed.config": "zero3",
        "data.subsample": 32,
        "on_policy.share": 0.25,
        "on_policy.every": 0.5,
        "on_policy.max_tokens": 6,
        "optim.max_steps": 6,
        "optim.micro_batch_size": 2,
        "run.save_every": 2,
        "run.test_limit": 4,
        "run.report_to": [],
    }
    runs, logs = {}, {name: tmp_path / f"{name}.log" for name in ("whole", "broken", "resumed")}
    for name in ("whole", "broken"):
        own = {"teacher.cache": str(tmp_path / f"{name}-cache")}
        runs[name] = as_arguments(tiny(tmp_path / name, **settings | own))
    assert launch([FORKED, "2", *runs["whole"]], log=logs["whole"]) == 0, logs["whole"].read_text()[-4000:]
    process = start([FORKED, "2", *runs["broken"]], log=logs["broken"])
    until = time.monotonic() + 240
    while "step 3/6" not in logs["broken"].read_text():
        assert time.monotonic() < until, logs["broken"].read_text()[-4000:]
        time.sleep(0.2)
    kill_session(process)
    said = launch([TRAIN, *runs["broken"]], ranks=2, log=logs["resumed"])
    assert said == 0, logs["resumed"].read_text()[-4000:]
    assert "resumed from" in logs["resumed"].read_text()
    students = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in runs]
    assert students[0] == students[1]
    assert json.loads((tmp_path / "whole/result.json").read_text())["on_policy"]["texts"] > 0
