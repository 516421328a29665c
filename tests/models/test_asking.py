"""An exported student is asked in the ids of its training, and answers as it was evaluated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from chat_tokenizers import chatml
from tiny_models import byte_tokenizer, save, tiny

from ibdistill.config.sections import Config, DataConfig, ObjectiveConfig
from ibdistill.data import batches, reasoning, tokenizers
from ibdistill.data.chat import adopt_turn_end
from ibdistill.data.records import Record, map_numbers
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizing import tokenize
from ibdistill.evaluation import predictions
from ibdistill.models import asking, export, families
from ibdistill.models.asking import Student
from ibdistill.models.prompt import FILE, Prompt

CPU = torch.device("cpu")
QUESTIONS = ["how many ?", "", 'she said "yes."', "so</s>is it", "long " * 40, "7", "two\nlines"]
PREFIXES = {"svamp": TASKS["svamp"].prefixes}


def records(questions=QUESTIONS):
    return [Record(f"r{i}", "svamp", text, "1", "so", gold="1") for i, text in enumerate(questions)]


@pytest.mark.parametrize("demo", [False, True])
@pytest.mark.parametrize(("model_type", "bos"), [("llama", False), ("llama", True), ("t5", False)])
def test_the_stored_prompt_gives_the_rows_of_training(tmp_path, model_type, bos, demo):
    tokenizer = tokenizers.demo_tokenizer() if demo else byte_tokenizer(bos=bos)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = Config(
        data=DataConfig(task="svamp", max_question_tokens=32, answer_marker="means"),
        objective=ObjectiveConfig(method="dss+cot"),
    )
    model = tiny(model_type)
    Prompt.of(model, tokenizer, config).write(tmp_path)
    prompt = Prompt.read(tmp_path)
    assert prompt == Prompt.of(model, tokenizer, config)
    streams = ("predict", "explain", "reason")
    features = tokenize(records(), PREFIXES, tokenizer, config.data, streams=streams)
    batch = batches.collate(features, range(len(QUESTIONS)), streams, **families.layout(model, tokenizer))
    rows = iter(zip(batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist(), strict=True))
    for stream in streams:
        for ids in prompt.ids(stream, QUESTIONS, tokenizer):
            row, length = next(rows)
            if model_type == "t5":
                assert ids == row[:length]
            else:
                assert ids == row[: len(ids)] and len(ids) < length
                assert ids[-1] == tokenizers.separator_of(tokenizer)


def test_the_stored_prompt_of_a_chat_gives_the_rows_of_training(tmp_path):
    tokenizer = chatml()
    data = DataConfig(task="svamp", format="chat", system="answer .", max_question_tokens=32)
    config = Config(data=data, objective=ObjectiveConfig(method="dss+cot"))
    adopt_turn_end(tokenizer, data, ("predict", "explain", "reason"))
    Prompt.of(tiny("llama"), tokenizer, config).write(tmp_path)
    prompt, asked = Prompt.read(tmp_path), [text for text in QUESTIONS if text]
    features = tokenize(records(asked), PREFIXES, tokenizer, data, streams=tuple(prompt.prefixes))
    for stream in ("predict", "explain", "reason"):
        expected = [list(features.questions[stream][i]) for i in range(len(asked))]
        assert prompt.ids(stream, asked, tokenizer) == expected


@pytest.mark.parametrize("model_type", ["t5", "llama"])
@pytest.mark.parametrize("method", ["finetune", "dss", "cot", "dss+cot"])
def test_answers_are_those_of_the_evaluation(tmp_path, world, model_type, method):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    data = DataConfig(task="svamp", max_label_tokens=4, max_rationale_tokens=6)
    config = Config(data=data, objective=ObjectiveConfig(method=method))
    export.write(tiny(model_type), tokenizer, tmp_path, config)
    student = asking.load(tmp_path, CPU)
    streams = tuple(student.prompt.prefixes)
    given = predictions.evaluate(student.model, student.tokenizer, records(), streams, data, world)
    said = asking.ask(student, QUESTIONS, batch_size=3)
    assert any(p.label or p.rationale for p in given)
    for own, p in zip(said, given, strict=True):
        reasoned = own.get("reasoned", own if method == "cot" else None)
        if reasoned:
            assert reasoned["rationale"] == p.reasoned.rationale and reasoned["label"] is None
        if method != "cot":
            assert (own["label"], own.get("rationale")) == (p.label, p.rationale)


def test_numbers_are_mapped_and_come_back(monkeypatch):
    question = "Ann has 1,200 pens and gives 5.0 away"
    prompt = Prompt(True, None, 0, {"predict": ""}, {"predict": 4}, "", 64, map_numbers=True)
    asked = []

    def texts(student, stream, questions, batch_size):
        asked.extend(questions)
        return ["n0 - n1 + n2 n"]

    monkeypatch.setattr(asking, "_texts", texts)
    [said] = asking.ask(Student(None, None, prompt, CPU), [question])
    assert asked == [map_numbers(records([question])[0]).question] == ["Ann has n0 pens and gives n1 away"]
    assert said == {"label": "1200 - 5 + n2 n"}


@pytest.mark.parametrize("task, label", [("jsonl", "22"), ("", None)])
def test_an_answer_that_is_not_marked_is_the_one_that_is_evaluated(monkeypatch, task, label):
    text = "We count the pens. The answer is 22."
    monkeypatch.setattr(asking, "_texts", lambda *_: [text])
    prompt = Prompt(True, None, 0, {"reason": ""}, {"reason": 9}, "</think>", 64, ("<think>", "</think>"))
    [said] = asking.ask(Student(None, None, replace(prompt, task=task), CPU), ["How many?"])
    assert said == {"label": label, "rationale": "We count the pens." if label else text}
    assert reasoning.take_apart(text, task, "</think>")[1] == label


def test_folders_that_cannot_be_asked(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no {FILE}, which says how the student is asked"):
        asking.load(tmp_path, CPU)
    path = tmp_path / FILE
    for content in ("", "[]", "{}", json.dumps({"prefixes": {"predict": ""}, "more": 1}), '{"prefixes": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path} is damaged .*; export the student again"):
            Prompt.read(tmp_path)
    path.write_text(json.dumps({"prefixes": {"predict": ""}, "tags": ["a"]}))
    with pytest.raises(ValueError, match="is damaged"):
        Prompt.read(tmp_path)
    save(tmp_path / "model", "llama")
    with pytest.raises(ValueError, match=f"has no {FILE}"):
        asking.load(tmp_path / "model", CPU)
