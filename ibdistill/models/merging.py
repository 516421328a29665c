"""A student with adapters as one model without them, which is what is evaluated and exported.

The sums are computed in fp32 and rounded once to the weights' own dtype. In bf16 a model whose adapters are
added to its activations and one whose adapters are added to its weights round differently, and decode
different texts where two tokens are nearly as probable. So a run evaluates the weights that it exports.
"""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from ibdistill.models.families import base_of


def merged(model: nn.Module, *, in_place: bool = False) -> PreTrainedModel:
    """The model itself if it has no adapters, or a copy of it with its adapters added to the weights.

    The copy shares the weights that have no adapter. `in_place`: `model` is a copy already and may change.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    if in_4bit(model):
        model, in_place = dequantized(model), True
    if not in_place:
        own = {id(p) for layer in adapted_layers(model) for p in layer.parameters()}
        model = copy.deepcopy(model, memo={id(p): p for p in model.parameters() if id(p) not in own})
    for layer in adapted_layers(model):
        dtype = layer.get_base_layer().weight.dtype
        layer.float()
        layer.merge()
        layer.get_base_layer().to(dtype)
    return model.unload()  # which leaves what is merged


def in_4bit(model: nn.Module) -> bool:
    """Whether the weights below the adapters are in 4 bits."""
    return bool(getattr(base_of(model), "is_loaded_in_4bit", False))


def dequantized(model: nn.Module) -> nn.Module:
    """A copy whose weights below the adapters are no longer in 4 bits, so that adding an adapter is exact.

    Merged as they are, the sums would be rounded to 4 bits again, and the student would answer differently.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapters = get_peft_model_state_dict(model)
    base = copy.deepcopy(model).unload().dequantize()
    whole = get_peft_model(base, copy.deepcopy(model.peft_config["default"]), autocast_adapter_dtype=False)
    set_peft_model_state_dict(whole, adapters)
    return whole


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The layers with adapters; empty for a model without any."""
    if not hasattr(model, "merge_and_unload"):
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]
