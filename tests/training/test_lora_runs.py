"""LoRA through whole runs: every family at its defaults, every ZeRO stage, resume, planner, export."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from card_lines import answers_by_card
from harness import FORKED, as_arguments, launch, same, steps, tiny, weights
from safetensors.torch import load_file
from tiny_models import save
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ibdistill import train
from ibdistill.models import forward
from ibdistill.models.families import ENCODER_DECODER, family

LIMITS = {"data.max_question_tokens": 128, "data.max_label_tokens": 16, "data.max_rationale_tokens": 48}
RUNS = [
    ("t5", 0),
    ("t5", 3),
    ("llama", 1),
    ("llama", 3),
    ("qwen2", 2),
    ("qwen2", 3),
    ("gpt2", 0),
    ("gpt2", 3),
]
"""Every family in ZeRO-3, where adapters are gathered and merged in another way, and in one other stage."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny pretrained model, by its type."""
    root = tmp_path_factory.mktemp("pretrained")

    def make(model_type: str) -> str:
        path = root / model_type
        return str(path) if path.is_dir() else save(path, model_type)

    return make


def settings(model: str, **more) -> dict[str, object]:
    return LIMITS | {"student.model": model, "student.lora_rank": 4, "optim.lr": 1e-2, **more}


def trained(job) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(job).items() if "lora_" in name}


@pytest.mark.parametrize(("model_type", "stage"), RUNS)
def test_adapters_alone_learn_resume_and_are_merged_at_export(make_job, folder, tmp_path, model_type, stage):
    """`prepare` plans the run's memory first, so the planner's model without storage is built here too."""
    more = settings(folder(model_type), **{"deepspeed.config": f"zero{stage}"})
    job = make_job(**more)
    before = weights(job)
    steps(job, 3)
    assert job.checkpoints.save(job.engine, job.state)
    after = weights(job)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name, p in job.engine.module.named_parameters() if p.requires_grad}
    assert changed == trained(job).keys() and len(changed) >= 4
    steps(job, 3)
    straight = weights(job)

    again = make_job(**more)
    assert again.state.step == 3 and same(weights(again), after)
    steps(again, 3)
    assert same(weights(again), straight)

    batch = again.micro_batches()[0][1]
    with again.whole() as model, torch.no_grad():
        states = forward.states(model, batch).targets
    train.close(again)
    auto = AutoModelForSeq2SeqLM if family(model) == ENCODER_DECODER else AutoModelForCausalLM
    exported = auto.from_pretrained(again.folder / "student").eval()
    assert not [name for name, _ in exported.named_parameters() if "lora" in name]
    bare = auto.from_pretrained(folder(model_type)).eval()
    for model in (exported, bare):
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head is embedding) == model.config.tie_word_embeddings == (model_type != "llama")
    with torch.no_grad():
        for stream, theirs in forward.states(exported, batch).targets.items():
            torch.testing.assert_close(theirs, states[stream], rtol=1e-4, atol=1e-5)
        assert (forward.states(bare, batch).targets["predict"] - states["predict"]).abs().max() > 1e-3


@pytest.mark.parametrize(("model_type", "stage"), [("t5", 2), ("qwen2", 3)])
def test_two_ranks_resume_to_the_same_run_and_export_what_was_evaluated(folder, tmp_path, model_type, stage):
    more = {
        "deepspeed.config": f"zero{stage}",
        "optim.max_steps": 6,
        "run.save_every": 3,
        "run.test_limit": 5,
    }
    arguments = as_arguments(tiny(tmp_path / "run", **settings(folder(model_type), **more)))

    def run() -> tuple[list[dict], dict[str, torch.Tensor]]:
        log = tmp_path / "log"
        assert launch([FORKED, "2", "demo", *arguments], log=log) == 0, log.read_text()[-4000:]
        lines = (tmp_path / "run/predictions/step-00000006/test_demo.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], load_file(tmp_path / "run/student/model.safetensors")

    rows, student = run()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    (tmp_path / "run/result.json").unlink()
    shutil.rmtree(tmp_path / "run/student")
    again, resumed = run()
    assert "resumed from" in (tmp_path / "log").read_text()
    assert again == rows and same(resumed, student)
    assert not any("lora" in name for name in student)

    said = answers_by_card(tmp_path / "run/student", [row["question"] for row in rows])
    assert said == [(row["label"], row["rationale"]) for row in rows]
    assert all(len(set(texts)) > 1 for texts in zip(*said, strict=True))
    assert "rationale = answer(" in (tmp_path / "log").read_text()  # the end of the run shows the same lines


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_adapters_decay_and_vids_map_does_not(make_job, folder, model_type):
    """Embeddings, norms and relative biases are frozen, so they are in no group of the optimizer."""
    teacher = {"teacher.placement": "replica", "teacher.model": folder(model_type), "objective.method": "ib"}
    job = make_job(**settings(folder(model_type), **teacher, **{"optim.weight_decay": 0.1}))
    names = {id(p): name for name, p in job.engine.module.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in job.engine.optimizer.param_groups
    }
    assert {decay: {name.startswith("vid.") for name in of} for decay, of in groups.items()} == {
        0.1: {False},
        0.0: {True},
    }
    assert all("lora_" in name for name in groups[0.1])
    before = weights(job)
    steps(job, 2)
    changed = {name for name, value in weights(job).items() if not torch.equal(value, before[name])}
    assert changed == groups[0.1] | groups[0.0]


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_bf16_and_recomputed_activations(make_job, folder, model_type):
    more = {"student.gradient_checkpointing": True, "student.precision": "bf16", "deepspeed.config": "zero2"}
    job = make_job(**settings(folder(model_type), **more))
    before = trained(job)
    steps(job, 2)
    after = trained(job)
    assert len(after) >= 4 and not any(torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_evaluated_in_bf16_is_what_is_exported(make_job, folder, stage):
    """The sum of weight and adapter, computed in fp32 and rounded once, bit for bit."""
    more = {"student.precision": "bf16", "deepspeed.config": f"zero{stage}", "run.test_limit": 2}
    job = make_job(**settings(folder("llama"), **more))
    steps(job, 2)
    own = {name.removeprefix("model.base_model.model."): w for name, w in weights(job).items()}
    with job.whole() as model:
        evaluated = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.close(job)
    exported = load_file(job.folder / "student/model.safetensors")
    adapted = [name.removesuffix(".lora_A.default.weight") for name in own if ".lora_A." in name]
    assert len(adapted) >= 4
    for name in adapted:
        a, b = (own[f"{name}.lora_{x}.default.weight"].float() for x in "AB")
        base = own[f"{name}.base_layer.weight"]
        scaling = job.config.student.lora_alpha / job.config.student.lora_rank
        expected = (base.float() + scaling * (b @ a)).to(torch.bfloat16)
        assert torch.equal(evaluated[f"{name}.weight"], expected) and not torch.equal(expected, base)
    assert exported.keys() <= evaluated.keys() and all(
        torch.equal(evaluated[name], weight) for name, weight in exported.items()
    )
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    assert any("lora_" in name for name in weights(job))  # the run's own model is as it was
