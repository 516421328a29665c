"""Runs in format chat: through train.py, evaluated, exported, and asked by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from card_lines import answers_by_card
from chat_tokenizers import ALWAYS_THINKING, CHATML, THINKING, chatml, qwen, save_chat_model, talks_folder
from harness import TRAIN, as_arguments, launch, same, steps, weights
from tiny_models import tiny
from transformers import AutoTokenizer, GenerationConfig, pipeline

from ibdistill import evaluate_student
from ibdistill.config.load import load_settings
from ibdistill.config.methods import METHODS
from ibdistill.config.sections import DataConfig
from ibdistill.data import chat_features
from ibdistill.data.chat import adopt_turn_end
from ibdistill.data.chat_start import settle
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.models import asking, chat_template
from ibdistill.models.prompt import Prompt
from ibdistill.training import run_folder

PAIRS = ((3, 4), (1, 1), (5, 4), (2, 6))
ROWS = [
    {"question": f"{a} + {b} ?", "rationale": f"start {a} . found means + {b} .", "label": str(a + b)}
    for a, b in PAIRS
]
EMPTY_IN_TARGET = CHATML.replace(
    "'\n' + m['content']",
    "'\n' + ('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '') + m['content']",
)


def data_folder(folder) -> str:
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder)


@pytest.mark.parametrize(
    ("method", "template"), [("cot", CHATML), ("dss+cot", CHATML), ("dss", EMPTY_IN_TARGET)]
)
def test_a_run_memorises_and_its_export_answers_the_same(tmp_path, world, method, template):
    settings = {
        **{"data.task": "jsonl", "data.path": data_folder(tmp_path / "data"), "data.format": "chat"},
        **{"student.model": save_chat_model(tmp_path / "model", template=template)},
        **{"objective.method": method, "data.system": "answer ."},
        **{"run.dir": str(tmp_path / "run"), "optim.batch_size": 4, "optim.lr": 5e-3},
        **{"optim.warmup_steps": 10, "optim.max_steps": 120},
        **{"data.max_question_tokens": 64, "data.max_rationale_tokens": 64, "data.max_label_tokens": 24},
    }
    log = tmp_path / "log"
    assert launch([TRAIN, *as_arguments(settings)], log=log) == 0, log.read_text()[-3000:]
    scores = json.loads((tmp_path / "run/result.json").read_text())["test"]["jsonl"]
    assert scores["accuracy"] == 1 and scores["rationale_bleu"] > 99.99
    assert "chat: student, " in log.read_text() and "a turn ends with '<|im_end|>'" in log.read_text()
    path = next((tmp_path / "run/predictions").glob("*/test_jsonl.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, given in zip(rows, ROWS, strict=True):
        assert (row["label"], row["rationale"]) == (given["label"], given["rationale"])
        assert method == "dss" or row["reasoned"]["rationale"] == given["rationale"]
    student = tmp_path / "run/student"
    tokenizer = AutoTokenizer.from_pretrained(student)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == end == GenerationConfig.from_pretrained(student).eos_token_id
    asked = [row["question"] for row in ROWS]
    assert answers_by_card(student, asked) == [(row["label"], row["rationale"]) for row in rows]
    chosen = asking.load(Path(run_folder.student_folder(str(tmp_path / "run"))), torch.device("cpu"))
    said = asking.ask(chosen, asked)
    assert [(a["label"], a["rationale"]) for a in said] == [(r["label"], r["rationale"]) for r in rows]
    assert method != "dss+cot" or said[0]["reasoned"]["rationale"] == ROWS[0]["rationale"]
    say = pipeline("text-generation", str(student))
    [told] = say([[{"role": "user", "content": asked[0]}]], return_full_text=False)
    [told] = told if isinstance(told, list) else [told]
    first = {"cot": f"<think>\n{ROWS[0]['rationale']}\n</think>\n\n7", "dss+cot": "7"}
    assert told["generated_text"] == first.get(method, "<think>\n\n</think>\n\n7")
    again = evaluate_student.with_run(str(student), {"eval.dir": str(tmp_path / "again")})
    again = evaluate_student.fields.from_flat(evaluate_student.StudentEvaluation, again)
    result = evaluate_student.prepare(str(student), again, world)()
    assert {k: v for k, v in result["scores"].items() if "accuracy" in k} == {
        k: v for k, v in scores.items() if "accuracy" in k
    }


def test_two_ranks_with_a_sharded_teacher_learn_conversations_of_several_turns(tmp_path):
    """Student and teacher in ZeRO-3 through the launcher; what is asked last is scored and exported."""
    settings = {
        **{"data.task": "jsonl", "data.path": talks_folder(tmp_path / "data"), "data.format": "chat"},
        **{"student.model": save_chat_model(tmp_path / "model", hidden_size=32)},
        **{"teacher.placement": "zero3", "teacher.model": save_chat_model(tmp_path / "teacher")},
        **{"objective.method": "cot+ib+kd", "deepspeed.config": "zero3", "run.dir": str(tmp_path / "run")},
        **{"optim.batch_size": 4, "optim.max_steps": 3},
        **{"data.max_question_tokens": 64, "data.max_rationale_tokens": 64, "data.max_label_tokens": 24},
    }
    log = tmp_path / "log"
    assert launch([TRAIN, *as_arguments(settings)], ranks=2, log=log) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert "chat: teacher, reason" in said and "renders the reason stream" not in said
    assert "vid " in said and "3/3" in said
    rows = next((tmp_path / "run/predictions").glob("*/test_jsonl.jsonl")).read_text().splitlines()
    assert [json.loads(row)["question"] for row in rows[:2]] == ["1 + 2 ?", "+ 1 ?"] and len(rows) == 12
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/student")
    assert tokenizer.eos_token == "<|im_end|>"


def test_cached_and_resumed_equals_uninterrupted_bit_for_bit(make_job, tmp_path):
    """Two epochs with a teacher that fills a cache, against its cache alone, interrupted in the second."""
    settings = {
        **{"data.task": "jsonl", "data.path": talks_folder(tmp_path / "data"), "data.format": "chat"},
        **{"data.subsample": 1.0, "student.model": save_chat_model(tmp_path / "model", hidden_size=32)},
        **{"teacher.placement": "replica", "teacher.model": save_chat_model(tmp_path / "teacher")},
        **{"teacher.cache": str(tmp_path / "cache"), "objective.method": "cot+ib+kd"},
        **{"optim.batch_size": 6, "data.max_question_tokens": 64},
        **{"data.max_rationale_tokens": 64, "data.max_label_tokens": 24},
    }
    whole = make_job(tmp_path / "whole", **settings)
    steps(whole, 5)
    whole.teacher_answers.flush()
    settings["teacher.placement"] = "cache"
    part = make_job(tmp_path / "part", **settings)
    assert part.teacher_answers.teacher is None
    steps(part, 4)
    part.checkpoints.save(part.engine, part.state)
    resumed = make_job(tmp_path / "part", **settings)
    assert resumed.state.step == 4
    steps(resumed, 1)
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("own", [CHATML, THINKING, "{{ strftime_now('%f') }}" + CHATML])
@pytest.mark.parametrize("method", ["finetune", "cot", "dss+cot"])
def test_the_exported_template_makes_the_training_prompts(method, own):
    """With system message and prefixes, for templates with thoughts or a date, and after a second export."""
    tokenizer = chatml(own)
    settings = {"objective.method": method, "data.task": "jsonl", "data.path": "x", "data.format": "chat"}
    config = load_settings(None, settings | {"data.system": 'Be "brief" \\ \N{SNOWMAN}\n.'})
    adopt_turn_end(tokenizer, config.data, METHODS[method].streams)
    prompt = Prompt.of(tiny("llama"), tokenizer, config)
    record = Record("x", "jsonl", "3 + 4 ?", "7", "so", gold="7")
    prefixes = {"jsonl": TASKS["jsonl"].prefixes}
    expected = {
        stream: chat_features.prompts([record], stream, prefixes, tokenizer, config.data)[0]
        for stream in prompt.prefixes
    }
    for _ in range(2):
        tokenizer.chat_template = chat_template.template(tokenizer, config.data, prompt)
        for stream, ids in expected.items():
            talk = [{"role": "user", "content": record.question}]
            given = {"add_generation_prompt": True, "return_dict": False, stream: True}
            assert tokenizer.apply_chat_template(talk, **given) == ids
            assert chat_features.prompts([record], stream, prefixes, tokenizer, config.data)[0] == ids
    plain = DataConfig(format="chat")
    tokenizer.chat_template = CHATML
    config.data = plain
    alone = chat_template.template(tokenizer, plain, Prompt.of(tiny("llama"), tokenizer, config))
    assert (alone == CHATML) == (method == "cot")


def test_a_model_that_always_thinks_is_asked_in_its_own_format():
    """The template opens the thoughts in the prompt; the vocabulary joins the line breaks of empty ones."""
    tokenizer = qwen()
    tokenizer.chat_template = ALWAYS_THINKING
    settings = {"objective.method": "cot", "data.task": "jsonl", "data.path": "x", "data.format": "chat"}
    config = load_settings(None, settings)
    asked = Record("x", "jsonl", "What is 3 + 4?", "7", "3 + 4 = 7.", gold="7")
    settle(tokenizer, config.data, ("reason",), "", asked)
    prefixes = {"jsonl": TASKS["jsonl"].prefixes}
    made = chat_features.tables([asked], prefixes, tokenizer, config.data, ("reason",))
    [prompt], [rationale] = made.prompts["reason"], made.targets["rationale"]
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(rationale) == "3 + 4 = 7.\n</think>\n\n"
    stored = Prompt.of(tiny("qwen2"), tokenizer, config)
    assert not stored.empty_thoughts and stored.ids("reason", [asked.question], tokenizer) == [prompt]
    tokenizer.chat_template = chat_template.template(tokenizer, config.data, stored)
    talk = [{"role": "user", "content": asked.question}]
    assert tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) == prompt
    with pytest.raises(ValueError, match="from token [0-9]+ on the prompt goes"):
        settle(tokenizer, config.data, ("predict", "reason"), "", asked)


def test_an_encoder_decoder_model_is_refused(tmp_path):
    from ibdistill.models.student import check_context

    with pytest.raises(ValueError, match="data.format is 'chat', which is for decoder-only models"):
        check_context(tiny("t5"), DataConfig(format="chat"))
