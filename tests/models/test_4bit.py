"""Students in 4 bits: what is refused, what is asked of transformers, what checkpoints and exports hold.

bitsandbytes and a GPU are not at hand, so the layers in 4 bits themselves are not run here.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TEXTS, save, tiny

from ibdistill.config.load import load_settings
from ibdistill.config.sections import StudentConfig
from ibdistill.data import tokenizers
from ibdistill.models import decoding, export, families, merging, student
from ibdistill.models.whole_model import WholeModel
from ibdistill.planning import footprint

LIMITS = dict(max_question_tokens=64, max_new_tokens=9, device=torch.device("cpu"))


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize(("gpu", "package"), [(False, False), (False, True), (True, False)])
def test_it_needs_a_gpu_and_bitsandbytes(monkeypatch, tmp_path, gpu, package):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if package else None)
    config = StudentConfig(model=str(tmp_path), lora_rank=4, load_in_4bit=True)
    there = f"GPU: {'yes' if gpu else 'no'}, bitsandbytes: {'installed' if package else 'not installed'}"
    with pytest.raises(ValueError, match=rf"student.load_in_4bit needs .*\({there}\); set .* false"):
        student.load_student(config, None, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student.lora_rank": 0}, "student.lora_rank is 0, so nothing would be trained; set"),
        ({"student.init": "random"}, "student.init is 'random'; take pretrained"),
        ({"deepspeed.config": "zero3"}, "deepspeed.config is 'zero3', of stage 3: .* take zero2"),
    ],
)
def test_settings_that_contradict_it_are_refused(settings, message):
    asked = {"student.load_in_4bit": True, "student.lora_rank": 4, "run.dir": "x"}
    with pytest.raises(ValueError, match=message):
        load_settings("demo", asked | settings)
    load_settings("demo", asked | {"deepspeed.config": "zero2"})


def test_a_preset_has_no_weights_to_keep():
    with pytest.raises(ValueError, match="student.model is the preset 'demo-student'; name a model"):
        student.check_4bit(StudentConfig(lora_rank=4, load_in_4bit=True))


def test_weights_are_asked_for_as_qlora_has_them(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(student, "check_4bit", lambda config: None)
    monkeypatch.setattr(student, "BitsAndBytesConfig", lambda **settings: settings)
    load_model = families.load_model

    def loads(*args, quantization_config, dtype, **kwargs):
        asked.update(quantization_config, dtype=dtype)
        return load_model(*args, **kwargs)

    monkeypatch.setattr(student, "load_model", loads)
    name = save(tmp_path, "llama")
    tokenizer = tokenizers.load_tokenizer(name, "student.tokenizer")
    config = StudentConfig(model=name, lora_rank=4, load_in_4bit=True, precision="bf16")
    model = student.load_student(config, tokenizer, 0)
    assert asked.pop("dtype") == asked.pop("bnb_4bit_compute_dtype") == torch.bfloat16
    assert asked == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

    trained = {n: p.detach().clone() for n, p in noisy(model).named_parameters() if p.requires_grad}
    outer = torch.nn.ModuleDict({"model": model, "vid": torch.nn.Linear(2, 2)})
    state = {name: value.clone() for name, value in outer.state_dict().items()}
    assert state.keys() == {f"model.{name}" for name in trained} | {"vid.weight", "vid.bias"}
    with torch.no_grad():
        for parameter in outer.parameters():
            parameter.mul_(1.0 if not parameter.requires_grad else 0.0)
    outer.load_state_dict(state)
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match="Missing key.*vid.bias"):
        outer.load_state_dict({name: value for name, value in state.items() if name != "vid.bias"})


def test_the_export_adds_adapters_to_weights_that_are_whole_again(monkeypatch, tmp_path):
    """`dequantize` here takes the place of transformers' own, on weights that were never in 4 bits."""
    name = save(tmp_path, "llama")
    tokenizer = tokenizers.load_tokenizer(name, "student.tokenizer")
    model = noisy(student.load_student(StudentConfig(model=name, lora_rank=4), tokenizer, 0))
    said = [answer.text for answer in decoding.decode(model, tokenizer, TEXTS, **LIMITS)]
    calls = []
    base = type(model.get_base_model())
    monkeypatch.setattr(base, "dequantize", lambda self: calls.append(self) or self)
    model.get_base_model().is_loaded_in_4bit = True
    merged = merging.merged(model)
    assert len(calls) == 1 and not [n for n, _ in merged.named_parameters() if "lora" in n]
    assert [answer.text for answer in decoding.decode(merged, tokenizer, TEXTS, **LIMITS)] == said
    assert [n for n, _ in model.named_parameters() if "lora" in n]  # the student itself is as it was


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_evaluated_is_what_is_exported(monkeypatch, tmp_path, precision):
    """In bf16 a student whose adapters stayed apart would round, and answer, differently."""
    name = save(tmp_path, "llama")
    tokenizer = tokenizers.load_tokenizer(name, "student.tokenizer")
    model = student.load_student(StudentConfig(model=name, lora_rank=4), tokenizer, 0)
    model = noisy(model.to(student.DTYPES[precision]))
    monkeypatch.setattr(type(model.get_base_model()), "dequantize", lambda self: self)
    model.get_base_model().is_loaded_in_4bit = True
    config = load_settings("demo", {"student.precision": precision, "student.model": name, "run.dir": "x"})
    with WholeModel(model, sharded=False)() as evaluated:
        export.write(evaluated, tokenizer, tmp_path / "evaluated", config)
    export.write(model, tokenizer, tmp_path / "exported", config)
    for folder in ("evaluated", "exported"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert weights and all(torch.equal(evaluated.state_dict()[key], w) for key, w in weights.items())
    assert model.training and [n for n, _ in model.named_parameters() if "lora" in n]


def test_the_planner_counts_what_4_bits_save(tmp_path):
    name = save(tmp_path, "llama")
    asked = {"student.model": name, "student.lora_rank": 4, "student.precision": "bf16", "run.dir": "x"}
    skeleton = footprint.student_skeleton(load_settings("demo", asked))
    layers = [m for n, m in tiny("llama").named_modules() if n.endswith("_proj")]
    linear = sum(layer.weight.numel() for layer in layers)
    assert skeleton.frozen_linear == linear
    zero = footprint.Zero(2, reduce_bucket=0)
    whole, quantized = (
        footprint.student_states(skeleton.sizes(), "bf16", zero, 1, in_4bit=n)[0] for n in (0, linear)
    )
    assert whole["parameters"] - quantized["parameters"] == 2 * linear - round(linear * 0.515869140625)
    assert whole["optimizer"] == quantized["optimizer"]
