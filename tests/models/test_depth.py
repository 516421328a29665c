"""Cut students: which layers stay, whether logits are those of transformers without the others, and a run."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from card_lines import answers_by_card
from harness import FORKED, as_arguments, launch, same, steps, tiny, weights
from tiny_models import TEXTS, byte_tokenizer, save
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ibdistill.config.load import load_settings
from ibdistill.config.sections import StudentConfig
from ibdistill.models import depth
from ibdistill.models.student import load_student
from ibdistill.planning import footprint

DEEP = {"num_hidden_layers": 6}
MIXED = {"sliding_window": 4}
FOLDERS = {
    "t5": {"num_layers": 6, "num_decoder_layers": 5},
    "umt5": {"num_layers": 6, "num_decoder_layers": 6},
    "bart": {"encoder_layers": 6, "decoder_layers": 6},
    "llama": DEEP,
    "qwen2": DEEP | MIXED | {"use_sliding_window": True, "max_window_layers": 3},
    "gpt2": {"n_layer": 6, "scale_attn_by_inverse_layer_idx": False},
    "gemma2": DEEP | MIXED,
    "gemma3_text": DEEP | MIXED,
    "cohere2": DEEP | MIXED | {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "olmo3": DEEP | MIXED,
    "gpt_neox": DEEP,
    "opt": DEEP,
    "smollm3": DEEP | {"no_rope_layer_interval": 2},
    "qwen3_moe": DEEP | {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
}
"""Model type -> what its six layers differ in."""
PAIRS = ("t5", "umt5", "bart")
LAYERS = {6: [0, 3, 5], 5: [0, 2, 4]}
"""Layers in all -> those that three keep: of 6, number 2.5 is rounded up."""


@pytest.mark.parametrize("of", [1, 2, 6, 7, 30])
def test_kept_layers_are_evenly_spaced(of):
    assert depth.kept(of, of) == list(range(of)) and depth.kept(of, 1) == [0]
    for n in range(2, of + 1):
        ours = depth.kept(of, n)
        places = [Fraction(i * (of - 1), n - 1) for i in range(n)]
        assert ours == [math.floor(place + Fraction(1, 2)) for place in places]
        assert (ours[0], ours[-1]) == (0, of - 1) and len(set(ours)) == n


def by_hand(folder: str, model_type: str):
    """The model of plain transformers, whose other layers are deleted here."""
    auto = AutoModelForSeq2SeqLM if model_type in PAIRS else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    base = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}.get(
        model_type, "model.layers"
    )
    names = [base]
    if model_type in PAIRS:
        inner, blocks = ("model.", "layers") if model_type == "bart" else ("", "block")
        names = [f"{inner}{side}.{blocks}" for side in ("encoder", "decoder")]
    for name in names:
        layers = model.get_submodule(name)
        stay = LAYERS[len(layers)]
        for i in [i for i in reversed(range(len(layers))) if i not in stay]:
            del layers[i]
    config = model.config
    if model_type not in PAIRS:
        kinds = getattr(config, "layer_types", None)  # the forward pass asks the configuration of each layer
        if kinds:
            config.layer_types = [kinds[i] for i in LAYERS[6]]
        config.num_hidden_layers = 3
    return model, auto


@pytest.mark.parametrize("model_type", FOLDERS)
def test_logits_are_those_of_the_model_without_the_other_layers(tmp_path, model_type):
    folder = save(tmp_path / "whole", model_type, **FOLDERS[model_type])
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = load_student(StudentConfig(model=folder, layers=3), tokenizer, 0).eval()
    plain, auto = by_hand(folder, model_type)
    batch = tokenizer([TEXTS[0], TEXTS[1] * 2], return_tensors="pt", padding=True)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model_type in PAIRS:
        inputs["decoder_input_ids"] = batch.input_ids[:, :9]
    model.save_pretrained(tmp_path / "cut")
    exported = auto.from_pretrained(tmp_path / "cut").eval()
    with torch.no_grad():
        ours = model(**inputs).logits
        torch.testing.assert_close(ours, plain(**inputs, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, exported(**inputs).logits, rtol=1e-4, atol=1e-4)
        whole = auto.from_pretrained(folder).eval()(**inputs).logits
        assert (ours - whole).abs().max() > 1e-2
        limits = {"max_new_tokens": 6, "do_sample": False}  # with keys and values of three layers
        asked = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
        assert torch.equal(model.generate(**asked, **limits), exported.generate(**asked, **limits))
    said = json.loads((tmp_path / "cut/config.json").read_text())
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "decoder_layers"):
        assert said.get(name, 3) == 3
    assert len(said.get("layer_types") or [0] * 3) == 3 and said["kept_layers"]["decoder"][0] == 0
    if model_type == "qwen2":
        assert said["max_window_layers"] == 1
        assert said["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    if model_type == "qwen3_moe":  # layers 0, 3 and 5 of which 1, 3 and 5 are sparse, but 1 is dense
        assert (said["mlp_only_layers"], said["decoder_sparse_step"]) == ([0], 1)
    settings = {"student.model": folder, "student.layers": 3, "student.precision": "fp32"}
    skeleton = footprint.student_skeleton(load_settings(None, settings | {"run.dir": "x"}))
    assert sorted(n for n, _ in skeleton.sizes()) == sorted(p.numel() for p in model.parameters())


def test_random_weights_of_a_cut_shape(tmp_path):
    folder, tokenizer = save(tmp_path, "qwen2", **FOLDERS["qwen2"]), byte_tokenizer()
    model = load_student(StudentConfig(model=folder, layers=2, init="random"), tokenizer, 0)
    assert len(model.model.layers) == 2 == model.config.num_hidden_layers
    assert model.config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("check_memory", [True, False])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("t5", "student.layers is 6, and student.model has 6 in its encoder and 5 in its decoder; take as"),
        ("demo-student", "student.layers is 6, .* is the preset 'demo-student', whose weights are random"),
    ],
)
def test_what_cannot_be_cut_is_refused(make_job, tmp_path, model, message, check_memory):
    folder = model if model == "demo-student" else save(tmp_path, model, **FOLDERS[model])
    more = {"student.model": folder, "student.layers": 6, "run.check_memory": check_memory}
    with pytest.raises(ValueError, match=message):
        make_job(**more, **{"objective.method": "finetune", "data.subsample": 8})


@pytest.mark.parametrize("rank", [0, 2])
def test_a_cut_student_resumes(make_job, tmp_path, rank):
    settings = {"student.model": save(tmp_path / "whole", "llama", **DEEP), "student.layers": 2}
    settings |= {"student.lora_rank": rank, "data.max_question_tokens": 128, "student.dropout": 0.0}
    torch.manual_seed(0)  # of the adapters
    one = make_job(tmp_path / "one", **settings)
    steps(one, 4)
    torch.manual_seed(0)
    two = make_job(tmp_path / "two", **settings)
    steps(two, 2)
    two.checkpoints.save(two.engine, two.state)
    again = make_job(tmp_path / "two", **settings)
    assert again.state.step == 2
    steps(again, 2)
    assert same(weights(one), weights(again))
    with pytest.raises(ValueError, match="student.layers was 2 and is 3"):
        make_job(tmp_path / "two", **settings | {"student.layers": 3})


def test_two_ranks_train_a_cut_student_under_zero_3_and_export_it(tmp_path):
    """At the defaults, from a folder; the export says what it kept, and answers as it was evaluated."""
    folder = save(tmp_path / "whole", "gemma2", **FOLDERS["gemma2"])
    settings = {"student.model": folder, "student.layers": 3, "deepspeed.config": "zero3"}
    settings |= {"data.max_question_tokens": 128, "optim.max_steps": 4, "run.test_limit": 3}
    log = tmp_path / "log"
    run = tiny(tmp_path / "run", **settings)
    assert launch([FORKED, "2", *as_arguments(run)], log=log) == 0, log.read_text()[-4000:]
    student = tmp_path / "run/student"
    said = json.loads((student / "config.json").read_text())
    assert said["num_hidden_layers"] == 3 == len(said["layer_types"])
    words = "began with the weights of these layers of its base model, counted from 0: decoder 0, 3, 5."
    assert words in (student / "README.md").read_text()
    assert "layers: 3" in (student / "README.md").read_text()
    rows = [json.loads(x) for x in (tmp_path / "run/predictions/step-00000004/test_demo.jsonl").open()]
    said = answers_by_card(student, [row["question"] for row in rows])
    assert said == [(row["label"], row["rationale"]) for row in rows]
