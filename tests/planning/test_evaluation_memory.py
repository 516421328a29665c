"""Bytes of merging against those that are really allocated, and where the planner counts them."""

from __future__ import annotations

import dataclasses

import pytest
from plan.accelerators import ACCELERATORS
from plan.planner import Planner
from tiny_models import save
from transformers import LlamaForCausalLM

from ibdistill.config.load import load_settings
from ibdistill.models import merging
from ibdistill.models.families import load_config
from ibdistill.models.student import with_lora
from ibdistill.planning import footprint, memory_check
from ibdistill.planning.dryrun import DTYPES, _Tracker
from ibdistill.planning.evaluation_memory import copied_bytes

WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture
def asked(tmp_path):
    name = save(tmp_path, "llama", **WIDE)
    return {"student.model": name, "run.dir": "x", "objective.method": "dss", "optim.batch_size": 4}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj"]])
def test_it_bounds_what_merging_allocates(asked, precision, targets):
    given = asked | {"student.lora_rank": 4, "student.precision": precision, "student.lora_targets": targets}
    config = load_settings(None, given)
    predicted = copied_bytes(footprint.student_skeleton(config), precision, 0)
    model = LlamaForCausalLM(load_config(config.student.model, "student.model"))
    model = with_lora(model, config.student).to(DTYPES[precision])
    tracker = _Tracker([*model.parameters(), *model.buffers()])
    with tracker:
        merging.merged(model)
    assert 0.8 * predicted < tracker.peak <= predicted


def test_what_is_copied_follows_the_stage_and_the_adapters(asked):
    asked |= {"student.precision": "bf16"}

    def of(stage=0, in_4bit=False, **more):
        return copied_bytes(
            footprint.student_skeleton(load_settings(None, asked | more)), "bf16", stage, in_4bit=in_4bit
        )

    rank = {"student.lora_rank": 4, "student.lora_targets": ["q_proj"]}
    skeleton = footprint.student_skeleton(load_settings(None, asked | rank))
    total, layer, layers = sum(n for n, _ in skeleton.sizes()), 128 * 128, 2
    adapters = layers * 2 * 4 * 128
    assert of() == 0
    assert of(3) == 2 * (total - adapters)
    assert of(**rank) == 2 * (layers * layer + adapters) + 12 * layer
    assert of(3, **rank) == of(2, in_4bit=True, **rank) == 2 * total + 12 * layer


def test_planner_and_refusal_count_it(asked):
    config = load_settings(None, asked | {"student.lora_rank": 4, "student.precision": "bf16"})
    planner = Planner(config, ACCELERATORS["h100-80g"], 1, 1, question=8, label=2, rationale=4)
    for file, stage in (("zero0", 0), ("zero2", 2), ("zero3", 3)):
        expected = copied_bytes(planner.student, "bf16", stage)
        assert planner.choice("none", file, False, 4).activations["evaluation"] == expected > 0
        settings = dataclasses.replace(config, deepspeed=dataclasses.replace(config.deepspeed, config=file))
        parts, _ = memory_check.certain_bytes(settings, planner.student, None, 1, 1, "cuda")
        assert parts["evaluation"] == expected
