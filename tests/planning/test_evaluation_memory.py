"""Bytes of merging against those that are really allocated, and where the planner counts them."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from plan import summary
from plan.accelerators import ACCELERATORS
from plan.planner import Planner
from tiny_models import save
from transformers import LlamaForCausalLM

from ibdistill.config.load import load_settings
from ibdistill.models import families, merging
from ibdistill.models.families import load_config
from ibdistill.models.student import with_lora
from ibdistill.planning import evaluation_memory, footprint, memory_check
from ibdistill.planning.dryrun import DTYPES, Tracker
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
    tracker = Tracker([*model.parameters(), *model.buffers()])
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


ON_POLICY = {"objective.method": "kd", "teacher.placement": "replica", "on_policy.share": 1.0}


@pytest.mark.parametrize("kind", ["t5", "llama", "gemma2", "gpt2", "qwen2"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_keys_and_values_of_sampled_text_are_those_of_decoding(tmp_path, kind, lora_rank):
    """Real decoding of 3 texts behind 7 tokens. A text's last token is never read, so a decoder-only model
    decodes one more here; T5 reads a start token."""
    name = save(tmp_path, kind)
    given = ON_POLICY | {
        "student.model": name,
        "teacher.model": name,
        "run.dir": "x",
        "run.eval_batch_size": 3,
    }
    given |= {"on_policy.max_tokens": 5, "student.lora_rank": lora_rank, "student.precision": "bf16"}
    given["student.gradient_checkpointing"] = True
    config = load_settings(None, given)
    found = evaluation_memory.sampling(footprint.student_skeleton(config), config, question=7)
    assert (found.texts, found.tokens) == (3, 5) and found.kernels > 20
    model = families.from_config(load_config(name, "student.model"), 0.0).bfloat16().eval()
    output = model.generate(
        input_ids=torch.full((3, 7), 4),
        min_new_tokens=5 if kind == "t5" else 6,
        max_new_tokens=5 if kind == "t5" else 6,
        do_sample=False,
        return_dict_in_generate=True,
    )
    kept = output.past_key_values
    parts = (kept.self_attention_cache, kept.cross_attention_cache) if kind == "t5" else (kept,)
    expected = sum(x.keys.nbytes + x.values.nbytes for part in parts for x in part.layers)
    assert found.cache == expected


def test_planner_and_refusal_count_sampled_text(asked, monkeypatch):
    given = asked | ON_POLICY | {"teacher.model": asked["student.model"], "on_policy.max_tokens": 4}
    config = load_settings(None, given | {"student.precision": "bf16"})
    h100 = ACCELERATORS["h100-80g"]
    planner = Planner(config, h100, 1, 1, question=8, label=2, rationale=4)
    own, choice = planner.traces.sampled, planner.choice("replica", "zero0", False, 4)
    assert own.cache == 64 * 12 * 2 * 2 * 128 * 2 and choice.activations["sampling"] == own.cache
    weights = sum(n for n, _ in planner.student.sizes())
    memory, products = h100.bandwidth_gbs * 1e9, 2 * weights * 64 / h100.products("bf16")
    token = max((2 * weights + own.cache / 2) / memory, products, own.kernels * h100.launch_us / 1e6)
    assert choice.seconds["sampling"] == pytest.approx(4 / 64 * (8 * products + 4 * token))
    config.on_policy.every = 1e-9  # four texts before every step
    online = planner.choice("replica", "zero0", False, 4).seconds["sampling"]
    assert 10 < online / choice.seconds["sampling"] < 16.1
    (line,) = summary.sampled(choice, planner)
    assert "4 texts of up to 4 tokens" in line and "for 64 at once" in line
    config.on_policy.share = 0.0
    assert "sampling" not in Planner(config, h100, 1, 1, 8, 2, 4).choice("replica", "zero0", False, 4).seconds


def test_keys_and_values_that_do_not_fit_are_refused(asked, monkeypatch):
    given = asked | ON_POLICY | {"teacher.model": asked["student.model"]}
    given |= {"run.eval_batch_size": 1 << 20, "student.precision": "fp32", "deepspeed.config": "zero0"}
    world = types.SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
    monkeypatch.setattr(memory_check.distributed, "gather_objects", lambda value: [value])
    words = "keys and values of sampled text [0-9.]+.*lower run.eval_batch_size or on_policy.max_tokens"
    with pytest.raises(ValueError, match=words):
        memory_check.check(load_settings(None, given), world)
    memory_check.check(load_settings(None, given | {"on_policy.share": 0.0}), world)
