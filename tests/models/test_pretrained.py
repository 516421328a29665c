"""Folders of pretrained models: weights that are missing, generation settings, start tokens, ByT5."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny_models import QUESTION, TEXTS, byte_tokenizer, save, tiny
from transformers import (
    ByT5Tokenizer,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    T5EncoderModel,
)

from ibdistill.config.sections import StudentConfig
from ibdistill.data import tokenizers
from ibdistill.models import decoding, families
from ibdistill.models.student import load_student

LIMITS = dict(max_question_tokens=64, max_new_tokens=24, device=torch.device("cpu"))


def saved_as(folder: Path, kind: type, model_type: str) -> str:
    """The folder of a model of another class, with the weights that `tiny` has where it has such weights."""
    model = kind(tiny(model_type).config)
    source = tiny(model_type)
    model.load_state_dict(source.state_dict() | source.base_model.state_dict(), strict=False)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("kind", "model_type", "lacks"),
    [
        (T5EncoderModel, "t5", r"decoder.block.0.layer.0.SelfAttention.k.weight, .* and 25 more"),
        (LlamaForSequenceClassification, "llama", "lm_head.weight"),
        (LlamaModel, "llama", "lm_head.weight"),
    ],
)
def test_missing_weights_are_refused_by_name(tmp_path, kind, model_type, lacks):
    name = saved_as(tmp_path, kind, model_type)
    message = (
        f"whose files lack {lacks}: these weights would be random. It was saved as {kind.__name__}; choose"
    )
    tokenizer = tokenizers.load_tokenizer(name, "student.tokenizer")
    with pytest.raises(ValueError, match=f"student.model is .*{message}.*, or set student.init random"):
        load_student(StudentConfig(model=name), tokenizer, 0)
    with pytest.raises(ValueError, match=f"teacher.model is .*{message}") as refused:
        families.load_model(name, tokenizer, setting="teacher.model")
    assert "student.init" not in str(refused.value)
    shape = load_student(StudentConfig(model=name, init="random"), tokenizer, 0)
    assert shape.config.model_type == model_type


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        (Qwen2Model, "qwen2"),
        (Qwen2ForSequenceClassification, "qwen2"),
        (GPT2ForSequenceClassification, "gpt2"),
    ],
)
def test_a_tied_head_need_not_be_in_the_file_and_weights_without_a_place_are_a_warning(
    tmp_path, caplog, kind, model_type
):
    name = saved_as(tmp_path, kind, model_type)
    with caplog.at_level(logging.WARNING, "ibdistill"):
        model = load_student(StudentConfig(model=name), byte_tokenizer(), 0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, tiny(model_type).get_input_embeddings().weight)
    warned = "have weights that the model does not use: score.weight. It was saved as"
    assert (warned in caplog.text) == (kind is not Qwen2Model)


def test_other_shapes_missing_files_and_damaged_files_are_refused(tmp_path):
    name = save(tmp_path / "llama", "llama")
    edit(tmp_path / "llama/config.json", intermediate_size=48)
    shapes = r"down_proj.weight \(32, 64\) instead of \(32, 48\), .* and 3 more"
    with pytest.raises(ValueError, match=f"weights of other shapes than its config.json: .*{shapes}"):
        load_student(StudentConfig(model=name), byte_tokenizer(), 0)
    weights = tmp_path / "llama/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="teacher.model is .*, whose weights cannot be loaded"):
        families.load_model(name, byte_tokenizer(), setting="teacher.model")
    weights.unlink()
    with pytest.raises(ValueError, match="student.model is .*, whose weights cannot be loaded"):
        load_student(StudentConfig(model=name), byte_tokenizer(), 0)


SETTINGS = {"min_length": 30, "no_repeat_ngram_size": 1, "repetition_penalty": 5.0, "num_beams": 3}
SETTINGS |= {"do_sample": True, "temperature": 3.0, "eos_token_id": [0, 7, 9], "decoder_start_token_id": 5}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("model_type", ["t5", "qwen2"])
def test_a_models_own_generation_settings_reach_neither_decoding_nor_the_export(tmp_path, model_type, file):
    """Older folders keep such settings in config.json, where transformers still reads them."""
    name = save(tmp_path, model_type)
    tokenizer = tokenizers.load_tokenizer(name, "student.tokenizer")
    plain = decoding.decode(
        families.load_model(name, tokenizer, setting="x").eval(), tokenizer, TEXTS, **LIMITS
    )
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()
    edit(
        tmp_path / file, **{k: v for k, v in SETTINGS.items() if file != "config.json" or "token_id" not in k}
    )
    student = load_student(StudentConfig(model=name), tokenizer, 0).eval()
    assert decoding.decode(student, tokenizer, TEXTS, **LIMITS) == plain
    student.save_pretrained(tmp_path / "again")
    settings = json.loads((tmp_path / "again/generation_config.json").read_text())
    settings.pop("transformers_version")
    start = {"decoder_start_token_id": 0} if model_type == "t5" else {}
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    expected = {"do_sample": False, "num_beams": 1, "eos_token_id": eos, "pad_token_id": pad, **start}
    assert settings == expected


def test_a_t5_that_does_not_say_how_its_decoder_starts_is_refused(tmp_path):
    name = save(tmp_path, "t5")
    edit(tmp_path / "config.json", decoder_start_token_id=None)
    for init in ("pretrained", "random"):
        with pytest.raises(
            ValueError, match="has no decoder_start_token_id, .* is pad_token_id, which here is 0"
        ):
            load_student(StudentConfig(model=name, init=init), byte_tokenizer(), 0)


def test_byt5_has_a_tokenizer_without_a_vocabulary_file(tmp_path):
    """Its ids are those of the bytes behind three special tokens."""
    tokenizer = ByT5Tokenizer()
    assert len(tokenizer) == 384
    shape = {"vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    tiny("t5", **shape).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which holds no tokenizer"):
        tokenizers.load_tokenizer(str(tmp_path), "student.model")
    tokenizer.save_pretrained(tmp_path)
    loaded = tokenizers.load_tokenizer(str(tmp_path), "student.model")
    assert loaded("aé\n", add_special_tokens=False).input_ids == [3 + byte for byte in "aé\n".encode()]
    assert tokenizers.bos_of(loaded) is None
    student = load_student(StudentConfig(model=str(tmp_path)), loaded, 0).eval()
    assert len(decoding.decode(student, loaded, [QUESTION], **LIMITS)) == 1
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="which holds no tokenizer"):
        tokenizers.load_tokenizer(str(tmp_path), "student.model")


def shape_with(**changes) -> bytes:
    return json.dumps(tiny("llama").config.to_dict() | changes).encode()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"[]", "holds no tokenizer: one of its files is damaged"),
        ("tokenizer_config.json", b"[]", "holds no tokenizer: one of its files is damaged"),
        ("config.json", b"null", "one of its files is damaged"),
        ("config.json", shape_with(hidden_size="32"), "one of its files is damaged .*hidden_size"),
        ("config.json", shape_with(dtype="float99"), "one of its files is damaged .*float99"),
        ("config.json", shape_with(num_attention_heads=0), "one of its files is damaged .ZeroDivisionError"),
        ("generation_config.json", b"[]", "weights cannot be loaded: one of its files is damaged"),
        ("model.safetensors", bytes(1000), "weights cannot be loaded: .*header"),
        ("pytorch_model.bin", b"", "weights cannot be loaded: one of its files is damaged .EOFError"),
        (
            "pytorch_model.bin",
            b"\x80\x04cos\nsystem\n",
            "weights cannot be loaded: one of its files is damaged",
        ),
    ],
)
def test_a_damaged_file_of_a_folder_is_a_message(tmp_path, file, content, message):
    name = save(tmp_path, "llama")
    if file == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_student(StudentConfig(model=name), tokenizers.load_tokenizer(name, "student.model"), 0)
