"""The supported model types: their family, and what they do to their logits besides the head's product.

A model type is in `FAMILIES` if its base model's forward gives the states that its head takes, and if what
comes between head and logits is a constant factor or a soft cap: `forward.states` applies the factor to the
states, the head loss the cap. So neither needs to know anything else about a type; the tests hold every type
to that, on its own logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

ENCODER_DECODER, DECODER_ONLY = "encoder-decoder", "decoder-only"


@dataclass(frozen=True)
class Architecture:
    """What a model type is. The fields besides `family` name settings of its configuration."""

    family: str = DECODER_ONLY
    multiplier: str | None = None
    """The logits are multiplied by it."""
    divisor: str | None = None
    """The logits are divided by it."""
    softcap: str | None = None
    """The cap of the logits (`ops.head_loss.softcap`); a setting of None: no cap."""


_ON_QUESTION = (".EncDecAttention.k", ".EncDecAttention.v", ".encoder_attn.k_proj", ".encoder_attn.v_proj")
"""Parts of the names of a decoder's matrices that read the encoder's states: T5's, then BART's."""
FAMILIES = {
    "t5": Architecture(ENCODER_DECODER),
    "mt5": Architecture(ENCODER_DECODER),
    "umt5": Architecture(ENCODER_DECODER),
    "bart": Architecture(ENCODER_DECODER),
    "mbart": Architecture(ENCODER_DECODER),
    "plbart": Architecture(ENCODER_DECODER),
    "cohere": Architecture(multiplier="logit_scale"),
    "cohere2": Architecture(multiplier="logit_scale"),
    "gemma": Architecture(),
    "gemma2": Architecture(softcap="final_logit_softcapping"),
    "gemma3_text": Architecture(softcap="final_logit_softcapping"),
    "glm4": Architecture(),
    "gpt2": Architecture(),
    "gpt_neox": Architecture(),
    "granite": Architecture(divisor="logits_scaling"),
    "granitemoe": Architecture(divisor="logits_scaling"),
    "llama": Architecture(),
    "ministral3": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(),
    "olmo": Architecture(),
    "olmo2": Architecture(),
    "olmo3": Architecture(),
    "olmoe": Architecture(),
    "opt": Architecture(),
    "phi": Architecture(),
    "phi3": Architecture(),
    "qwen2": Architecture(),
    "qwen2_moe": Architecture(),
    "qwen3": Architecture(),
    "qwen3_moe": Architecture(),
    "smollm3": Architecture(),
    "starcoder2": Architecture(),
}
"""Model type -> what it is, of all supported types."""


def architecture(model: nn.Module | PreTrainedConfig) -> Architecture:
    """What a supported model, or the model of a configuration, is."""
    return FAMILIES[getattr(model, "config", model).model_type]


def family(model: nn.Module | PreTrainedConfig) -> str:
    """`encoder-decoder` or `decoder-only`: the family of a supported model or of its configuration."""
    return architecture(model).family


def state_factor(config: PreTrainedConfig) -> float:
    """What the states are multiplied with before the head, so that the head's product is the logits."""
    kind = architecture(config)
    umt5 = config.model_type == "umt5" and config.tie_word_embeddings
    if umt5 or getattr(config, "scale_decoder_outputs", False):  # T5 with tied embeddings
        return config.d_model**-0.5
    if kind.multiplier is not None:
        return getattr(config, kind.multiplier)
    return 1.0 if kind.divisor is None else 1 / getattr(config, kind.divisor)


def softcap(config: PreTrainedConfig) -> float | None:
    """The cap of the model's logits; None: they are not capped."""
    field = architecture(config).softcap
    return None if field is None else getattr(config, field)


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions a row may have; None: any number, because they are relative (T5)."""
    return getattr(config, "max_position_embeddings", None)


def layers_of_pair(config: PreTrainedConfig) -> tuple[int, int, int]:
    """The layers of an encoder-decoder model's encoder and of its decoder, and the width of their attention,
    all heads together."""
    if hasattr(config, "d_kv"):
        return config.num_layers, config.num_decoder_layers, config.num_heads * config.d_kv
    return config.encoder_layers, config.decoder_layers, config.d_model


def in_decoder(name: str) -> bool:
    """Whether a module or weight of this name is in an encoder-decoder model's decoder and meets the target's
    tokens. The matrices that make the keys and values of cross-attention do not: they meet the question's."""
    own = name.removeprefix("model.").startswith("decoder.")
    return own and not any(part in name for part in _ON_QUESTION)


def active_experts(config: PreTrainedConfig) -> float:
    """The share of a mixture's experts that one token meets; 1 for a model without experts."""
    names = ("num_experts", "num_local_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    return 1.0 if experts is None else config.num_experts_per_tok / experts


def check_logits(config: PreTrainedConfig, what: str) -> None:
    """Raise ValueError, naming the model by `what`, if a scale or cap of its logits is no positive number."""
    kind = architecture(config)
    for field in filter(None, (kind.multiplier, kind.divisor, kind.softcap)):
        value = getattr(config, field, None)
        if value is None and field == kind.softcap:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and 0 < value < math.inf):
            raise ValueError(
                f"{what} has {field} {str(value)[:40]!r} in its config.json, which its logits are scaled or "
                "capped with; it must be a positive number: take it from the published model"
            )
