"""Whole runs of a decoder-only student: ZeRO, the launcher, export."""

from __future__ import annotations

import json

import pytest
import torch
from harness import FORKED, as_arguments, launch, steps, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from ibdistill.config.sections import DataConfig
from ibdistill.data import tokenizers
from ibdistill.data.loading import load
from ibdistill.models import decoding, families, forward

MODEL = {"student.model": "demo-student-decoder"}


def rotary(model) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_under_zero3_the_trace_completes_and_the_whole_model_is_the_students(make_job, precision):
    """Rotary frequencies stay fp32 in both: rounded to bf16, angles at position 500 are off by up to 1."""
    job = make_job(**MODEL, **{"deepspeed.config": "zero3", "student.precision": precision})
    exact = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    steps(job, 3)
    assert job.engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    torch.testing.assert_close(rotary(job.engine.module.model), exact, rtol=1e-6, atol=0)
    batch = job.micro_batches()[0][1]
    with job.whole() as model, torch.no_grad():
        torch.testing.assert_close(rotary(model), exact, rtol=1e-6, atol=0)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        collected = forward.states(model, batch).targets["explain"]
    job.engine.module.model.eval()
    with torch.no_grad():
        own = forward.states(job.engine.module.model, batch).targets["explain"]
    torch.testing.assert_close(collected, own)
    assert own.std() > 0.1


def test_questions_and_rationales_that_do_not_fit_are_refused_before_training(make_job):
    with pytest.raises(ValueError, match="has 2048 positions, but data.max_question_tokens 2016"):
        make_job(**MODEL, **{"data.max_question_tokens": 2016})


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_evaluate_and_export_a_student_that_says_the_same(tmp_path, stage):
    """11 test records: uneven shares. transformers alone loads the export and decodes the run's texts."""
    settings = MODEL | {
        "deepspeed.config": f"zero{stage}",
        "optim.max_steps": 40,
        "optim.warmup_steps": 5,
        "run.test_limit": 11,
        "run.eval_every": 20,
        "run.eval_limit": 5,
    }
    log = tmp_path / "log"
    code = launch([FORKED, "2", "demo", *as_arguments(tiny(tmp_path / "run", **settings))], log=log)
    assert code == 0, log.read_text()[-4000:]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["ranks"], result["method"]) == (40, 2, "dss")

    rows = [json.loads(line) for line in (tmp_path / "run/predictions/step-00000040/test_demo.jsonl").open()]
    records = load(DataConfig(), needs_rationale=True).test["demo"][:11]
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert len({row["label"] for row in rows}) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/student")
    for row in rows:
        for prefix, said, limit in (("predict: ", row["label"], 16), ("explain: ", row["rationale"], 32)):
            # as the model card says: the ids of the text, then the separator
            ids = tokenizer(prefix + row["question"], add_special_tokens=False).input_ids
            prompt = torch.tensor([[*ids, tokenizers.separator_of(tokenizer)]])
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit)
            assert tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True) == said
    assert families.family(model) == families.DECODER_ONLY
    whole = decoding.decode(
        model,
        tokenizer,
        [f"predict: {row['question']}" for row in rows],
        max_question_tokens=1024,
        max_new_tokens=16,
        device=torch.device("cpu"),
    )
    assert [answer.text for answer in whole] == [row["label"] for row in rows]
