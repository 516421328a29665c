"""Layers that compute the same as transformers' and keep less for the backward pass."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.mt5.modeling_mt5 import MT5DenseGatedActDense, MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense, T5LayerNorm

from ibdistill.ops import layers, packed_attention
from ibdistill.ops.cpu import attention

ATTENTION = "ibdistill"
"""The name in transformers of SDPA, with our own on a CPU where there is dropout, and for packed rows."""


class _Norm(T5LayerNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return layers.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _GatedFeedForward(T5DenseGatedActDense):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rate = self.dropout.p if self.training else 0.0
        inner = layers.gated_gelu(self.wi_0(hidden_states), self.wi_1(hidden_states), rate)
        dtype = self.wo.weight.dtype  # kept in fp32 beside fp16 weights; an 8-bit layer casts by itself
        return self.wo(inner.to(dtype) if dtype.is_floating_point else inner)


def _attend(module: nn.Module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """`sdpa_attention_forward`, save for packed rows, and for dropout on a CPU, where that has no kernel."""
    if packed_attention.is_packed(attention_mask):

        def block(query, key, value, mask):
            return _attend(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]

        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = kwargs.get("sliding_window")
        out = packed_attention.packed_attention(
            block, query, key, value, attention_mask, scale=scale, dropout=dropout, window=window
        )
        return out, None
    is_ours = query.device.type == "cpu" and query.dtype != torch.float16 and key.shape[1] == query.shape[1]
    if not (dropout and is_ours):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    is_causal = kwargs.get("is_causal")
    if attention_mask is None and (module.is_causal if is_causal is None else is_causal):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = kwargs.get("position_bias")
    out = attention.attention(query, key, value, bias=bias, mask=attention_mask, rate=dropout, scale=scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)


AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packs(model: PreTrainedModel) -> bool:
    """Whether a decoder-only model's attention can read packed rows (`ops.packed_attention`)."""
    return model.config._attn_implementation == ATTENTION and not model.config.is_encoder_decoder


def fused(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose layers compute the same and keep less for the backward pass (`ops.layers`).

    `gelu_new` (T5 v1.1, GPT-2) becomes torch's one operation for the same formula instead of transformers'
    eight; dropout, T5's norm and its gated feed-forward become one each, as does attention with dropout on a
    CPU. What the model saves is as before.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
        if type(module) in (T5LayerNorm, MT5LayerNorm):
            module.__class__ = _Norm
        elif type(module) in (T5DenseGatedActDense, MT5DenseGatedActDense) and type(module.act) is nn.GELU:
            module.__class__ = _GatedFeedForward
        elif type(module) is nn.Dropout:
            module.__class__ = layers.Dropout
    return model
