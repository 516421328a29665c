"""Students: loading one as the settings describe it, adapting it, and checking what it goes with.

`families` loads the models themselves, and `forward` runs them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig, StudentConfig
from ibdistill.data.records import STREAMS
from ibdistill.models import depth, presets
from ibdistill.models.architectures import positions
from ibdistill.models.families import ENCODER_DECODER, base_of, family, load_model, load_preset
from ibdistill.models.fused import packs
from ibdistill.runtime.hardware import DTYPES

ALL_LINEAR = "all-linear"
"""peft's name for all linear layers but the head."""


def load_student(config: StudentConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The student as `config` describes it, whole and in fp32, on the CPU.

    With `config.load_in_4bit` its linear layers are in 4 bits and on the GPU instead.

    Raises ValueError if there is no such model, if its family is not supported, or if the
    tokenizer does not fit it.
    """
    in_4bit = {}
    if config.load_in_4bit:
        check_4bit(config)
        in_4bit = {"quantization_config": quantization(config), "dtype": DTYPES[config.precision]}
    if config.model in presets.PRESETS:
        depth.check_preset(config)
        model = load_preset(config.model, tokenizer, seed, config.dropout)
    else:
        model = load_model(
            config.model,
            tokenizer,
            setting="student.model",
            dropout=config.dropout,
            random_seed=seed if config.init == "random" else None,
            layers=config.layers,
            **in_4bit,
        )
    check_fit(model, tokenizer)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if config.lora_rank:
        model = with_lora(model, config)
    if config.load_in_4bit:
        save_adapters_alone(model)
    if config.compile:
        if family(model) == ENCODER_DECODER:
            model.get_encoder().compile(dynamic=True)
        model.get_decoder().compile(dynamic=True)
    return model.train()  # from_pretrained leaves it in evaluation mode, without dropout


def check_4bit(config: StudentConfig) -> None:
    """Raise ValueError where a student in 4 bits cannot work."""
    if config.model in presets.PRESETS:
        raise ValueError(
            "student.load_in_4bit is for pretrained weights, and student.model is the preset "
            f"{config.model!r}; name a model of the hub or a folder"
        )
    check_bitsandbytes("student.load_in_4bit")


def check_bitsandbytes(setting: str, or_else: str = "") -> None:
    """Raise ValueError where weights in few bits cannot work. `or_else`: another way out for the message."""
    has_gpu, has_package = torch.cuda.is_available(), importlib.util.find_spec("bitsandbytes") is not None
    if not (has_gpu and has_package):
        raise ValueError(
            f"{setting} needs a CUDA device and the package bitsandbytes (GPU: {'yes' if has_gpu else 'no'}, "
            f"bitsandbytes: {'installed' if has_package else 'not installed'}); set {setting} false{or_else}"
        )


def quantization(config: StudentConfig) -> BitsAndBytesConfig:
    """NF4 with quantised scales, as QLoRA (arXiv 2305.14314, section 3) has it. The head stays as it is."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.precision],
    )


def save_adapters_alone(model: nn.Module) -> None:
    """Leave frozen weights out of the state that checkpoints hold; a resumed run loads them from the model.

    Weights in 4 bits come with further tensors (their scales), which `load_state_dict` does not take.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = tuple(name for name, _ in model.named_parameters() if name not in trained)

    def drop(module: nn.Module, state: dict, prefix: str, _: dict) -> None:
        for name in [n for n in state if n.startswith(prefix) and n.removeprefix(prefix) not in trained]:
            del state[name]

    def expect_less(module: nn.Module, found: Any) -> None:
        found.missing_keys[:] = [name for name in found.missing_keys if not name.endswith(frozen)]

    model.register_state_dict_post_hook(drop)
    model.register_load_state_dict_post_hook(expect_less)


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token id has an embedding and the special tokens are the same.

    A decoder-only model may end with another token than it was pretrained with: base models
    are trained with the tokenizers of their instructed versions.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"student.tokenizer has {len(tokenizer)} tokens but student.model only {vocabulary} embedding "
            "rows; take the model's own tokenizer (leave student.tokenizer empty) or a model of that "
            "vocabulary"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("student.tokenizer has no end-of-sequence token, with which every target ends")
    for name in ("pad_token_id", "eos_token_id") if family(model) == ENCODER_DECODER else ():
        theirs, ours = getattr(model.config, name), getattr(tokenizer, name)
        if theirs != ours:
            raise ValueError(
                f"student.tokenizer has {name} {ours} but student.model has {theirs}; "
                "they were not made for each other"
            )


def check_context(
    model: PreTrainedModel, config: DataConfig, streams: Sequence[str] = STREAMS, overhead: int = 0
) -> None:
    """Raise ValueError if the longest question and target do not fit the model's positions, with `overhead`
    tokens of a chat template around the question, or if the model's family has no such format.

    Question and target share a decoder-only model's positions; encoder and decoder each have their own.
    """
    have = positions(model.config)
    target = max(config.answer_limits()[stream] for stream in streams)
    if family(model) == ENCODER_DECODER:
        if config.format == "chat":
            raise ValueError(
                "data.format is 'chat', which is for decoder-only models, and student.model is an "
                "encoder-decoder model; take data.format plain"
            )
        if have is not None and max(config.max_question_tokens + 1, target) > have:
            raise ValueError(
                f"student.model has {have} positions in encoder and decoder, but data.max_question_tokens "
                f"{config.max_question_tokens} with BOS and targets of up to {target} tokens need "
                f"{max(config.max_question_tokens + 1, target)}; lower data.max_question_tokens to "
                f"{have - 1}, or data.max_rationale_tokens to {have}"
            )
        return
    around = overhead or 1
    need = around + config.max_question_tokens + target
    if need > have:
        frame = f"{overhead} of the template" if overhead else "BOS"
        room = have - around - target
        question = f"data.max_question_tokens to {room}, or " if room > 0 else ""
        raise ValueError(
            f"student.model has {have} positions, but data.max_question_tokens {config.max_question_tokens} "
            f"with up to {target} target tokens and {frame} need {need}; lower "
            f"{question}data.max_rationale_tokens or data.max_label_tokens"
        )


def check_packing(model: PreTrainedModel, config: DataConfig) -> None:
    """Raise ValueError if rows are to be packed for a model whose attention cannot keep them apart."""
    if config.packing == "on" and not packs(base_of(model)):
        kind = model.config.model_type
        raise ValueError(
            f"data.packing is 'on', and student.model is a {kind!r} model with the attention "
            f"{model.config._attn_implementation!r}, which would read the sequences of a row as one; leave "
            "data.packing off"
        )


def with_lora(model: PreTrainedModel, config: StudentConfig) -> nn.Module:
    """The model with adapters as `config` describes them; everything else of it is frozen.

    Raises ValueError if the model has no such layers, or if one of them is the head or an embedding.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    targets = config.lora_targets or DEFAULTS.get(model.config.model_type, ALL_LINEAR)
    settings = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if family(model) == ENCODER_DECODER else "CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        lora_dropout=0.0,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its layers keep their weights transposed
    )
    vocabulary = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    try:
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ValueError(f"student.lora_targets is {config.lora_targets}: {error}") from error
    for name, module in adapted.base_model.model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        # experts have several weights, of other names
        if id(getattr(module.get_base_layer(), "weight", None)) in vocabulary:
            raise ValueError(
                f"student.lora_targets is {config.lora_targets}, and {name} is the model's head or embedding "
                "table. The loss reads the head's weight itself, so an adapter there would not be trained; "
                "leave it out, or train all weights with student.lora_rank 0"
            )
    return adapted
