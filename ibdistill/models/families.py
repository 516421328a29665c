"""Loading the models of both families (`architectures`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ibdistill.data import tokenizers
from ibdistill.models import depth, presets
from ibdistill.models.architectures import DECODER_ONLY as DECODER_ONLY  # for those who import both families
from ibdistill.models.architectures import ENCODER_DECODER, FAMILIES, check_logits, family
from ibdistill.models.fused import fused
from ibdistill.runtime.files import digest

logger = logging.getLogger("ibdistill")

# T5 has the first, GPT-2 the next three, Starcoder2 the two after these, BART the last three, all others some
# of these
_DROPOUTS = (
    "dropout_rate",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "residual_dropout",
    "embedding_dropout",
)
_DROPOUTS += ("attention_dropout", "dropout", "activation_dropout")


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model below its adapters, if it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layout(
    model: torch.nn.Module | PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int | None]:
    """The keyword arguments of `batches.collate` for a model or its configuration."""
    if family(model) == ENCODER_DECODER:
        config = getattr(model, "config", model)
        bos = tokenizers.bos_of(tokenizer)
        return {"pad": tokenizer.pad_token_id, "start": config.decoder_start_token_id, "bos": bos}
    return {
        "pad": tokenizer.pad_token_id,
        "start": tokenizers.bos_of(tokenizer),
        "separator": tokenizers.separator_of(tokenizer),
    }


def load_config(name: str, setting: str) -> PreTrainedConfig:
    """A model's configuration by hub name or folder.

    Raises ValueError, naming `setting`, if there is none, if the type is not supported, if what the
    logits are scaled or capped with is no positive number, or if an encoder-decoder model does not say
    with which token its decoder starts.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of a damaged file: anything
        known = f"no preset ({', '.join(presets.PRESETS)}), and " if setting == "student.model" else ""
        reason = tokenizers.why_not_loaded(name, error)
        raise ValueError(f"{setting} is {name!r}: {known}no model could be loaded: {reason}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{setting} is {name!r}, a {config.model_type!r} model; supported are {', '.join(FAMILIES)}"
        )
    check_logits(config, f"{setting} is {name!r}, which")
    if family(config) == ENCODER_DECODER and getattr(config, "decoder_start_token_id", None) is None:
        raise ValueError(
            f"{setting} is {name!r}, whose config.json has no decoder_start_token_id, the token with which "
            "the decoder starts; add it there (in T5 models it is pad_token_id, which here is "
            f"{config.pad_token_id})"
        )
    return config


def load_preset(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dropout: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A preset, with random weights of `dtype`, for a tokenizer."""
    overrides = {} if dropout is None else {presets.dropout_field(name): dropout}
    if presets.is_decoder_only(name):
        overrides |= {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("bos", "eos", "pad")}
    model = presets.build(name, len(tokenizer), seed, **overrides)
    for parameter in model.parameters():  # buffers stay: rotary frequencies in bf16 would move the positions
        parameter.data = parameter.data.to(dtype)
    return fused(decodes_greedily(model, tokenizer))


def empty_model(
    name: str, tokenizer: PreTrainedTokenizerBase, setting: str, dtype: torch.dtype
) -> PreTrainedModel:
    """The modules of a model or preset on the meta device: names, shapes and dtypes, no storage.

    They are built as `load_model` builds them for `dtype`, so that a rank which holds them and a rank which
    has loaded the checkpoint compute the same. A head that the checkpoint keeps apart from the embeddings
    counts as tied here, since T5's configuration does not tell.
    """
    with torch.device("meta"):
        if name in presets.PRESETS:
            return load_preset(name, tokenizer, seed=0, dtype=dtype)
        config = load_config(name, setting)
        return fused(decodes_greedily(_from_config(config, dtype), tokenizer))


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    setting: str,
    dropout: float | None = None,
    random_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    layers: int = 0,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model with its head, by hub name or folder, for a student or a teacher.

    The head is `get_output_embeddings()`. The layers below it are `get_decoder()` and, in the
    encoder-decoder family, `get_encoder()`.

    Args:
        setting: what messages call `name`.
        dropout: replaces the model's own rates.
        layers: of which so many stay (`depth`); 0: all.
        random_seed: if given, only the shape is taken, and new weights are drawn with this seed.
        kwargs: further arguments of `from_pretrained`, such as `quantization_config`.

    Raises:
        ValueError: as `load_config` and `depth.cut_config` do; or the files lack a weight of the model, or
            have it in another shape. Weights in the files for which the model has no place are a warning.
    """
    config = _with_dropout(load_config(name, setting), dropout)
    if random_seed is None:
        model = depth.cut(_pretrained(name, config, setting, dtype=dtype, **kwargs), layers)
    else:
        torch.manual_seed(random_seed)
        model = _from_config(depth.cut_config(config, layers), dtype)
    return fused(decodes_greedily(model, tokenizer))


def _pretrained(name: str, config: PreTrainedConfig, setting: str, **kwargs: Any) -> PreTrainedModel:
    """The model with all its weights from a checkpoint, as `load_model` says."""
    try:
        # mismatched shapes are listed below, where they can be named
        model, report = _auto_class(config).from_pretrained(
            name,
            config=config,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    except Exception as error:  # of a damaged file: anything
        reason = tokenizers.why_not_loaded(name, error)
        raise ValueError(f"{setting} is {name!r}, whose weights cannot be loaded: {reason}") from error
    saved_as = f"It was saved as {', '.join(config.architectures or ['an unknown class'])}"
    way_out = f"choose a folder or hub name of a whole {type(model).__name__}"
    if setting == "student.model":
        way_out += ", or set student.init random to take the shape alone"
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{setting} is {name!r}, whose files lack {_listed(missing)}: these weights would be random. "
            f"{saved_as}; {way_out}"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{key} {tuple(theirs)} instead of {tuple(ours)}" for key, theirs, ours in mismatched]
        raise ValueError(
            f"{setting} is {name!r}, whose files have weights of other shapes than its config.json: "
            f"{_listed(shapes)}. {saved_as}; {way_out}"
        )
    bias = getattr(model, "final_logits_bias", None)  # of BART; the head loss has no place for it
    if bias is not None and bias.count_nonzero():
        raise ValueError(
            f"{setting} is {name!r}, which adds a constant final_logits_bias to its logits, and the loss "
            "does not; take a model where it is zero, as published BART models have it"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning(
            "%s is %r, whose files have weights that the model does not use: %s. %s",
            setting,
            name,
            _listed(unexpected),
            saved_as,
        )
    return model


def _listed(names: list[str]) -> str:
    """At most three of the names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def from_config(config: PreTrainedConfig, dropout: float | None) -> PreTrainedModel:
    """A model of this shape, with weights as its class initialises them. `dropout` as in `load_model`."""
    return fused(_from_config(_with_dropout(config, dropout), None))


def _from_config(config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model with new weights of `dtype`, None: of torch's default. A folder's own code is never run."""
    return _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)


def _with_dropout(config: PreTrainedConfig, dropout: float | None) -> PreTrainedConfig:
    """The configuration with this rate in all its fields, None: with its own rates. BART's skipping of whole
    layers is off, since ranks would skip different ones."""
    for field in {"encoder_layerdrop", "decoder_layerdrop"} & set(config.to_dict()):
        setattr(config, field, 0.0)
    if dropout is not None:
        for field in set(_DROPOUTS) & set(config.to_dict()):
            setattr(config, field, dropout)
    return config


def decodes_greedily(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The same model, whose `generate` is greedy and ends with the tokenizer's end token.

    Published models come with sampling temperatures, beams, least lengths and repetition penalties, most of
    which change greedy decoding too, and with a start token that may be another than config.json's, with
    which the model is trained.
    """
    model.generation_config = greedy(model.config, tokenizer)
    return model


def greedy(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None = None
) -> GenerationConfig:
    """Greedy decoding that starts as the model is trained and ends with the tokenizer's end token."""
    starts = family(config) == ENCODER_DECODER
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id if starts else None,
    )


def _auto_class(config: PreTrainedConfig) -> type:
    return AutoModelForSeq2SeqLM if family(config) == ENCODER_DECODER else AutoModelForCausalLM


def identity(name: str) -> str:
    """What tells one teacher's weights from another's: a digest of its folder, or the hub's commit.

    The digest covers the weight files' names, sizes, first and last 64 KiB, since reading all of them would
    mean reading gigabytes.
    """
    if name in presets.PRESETS:
        return f"preset {name}"
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} at {AutoConfig.from_pretrained(name, trust_remote_code=False)._commit_hash}"
    parts = [(folder / "config.json").read_bytes()]
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        parts += [path.name.encode(), str(path.stat().st_size).encode()]
        with path.open("rb") as file:
            parts.append(file.read(1 << 16))
            file.seek(-min(1 << 16, path.stat().st_size), 2)
            parts.append(file.read())
    return digest(b"\0".join(parts)).hex()
