"""Layers that compute the same as transformers' and keep less for the backward pass."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.models.mt5.modeling_mt5 import (
    MT5Attention,
    MT5DenseActDense,
    MT5DenseGatedActDense,
    MT5LayerNorm,
)
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerNorm,
)

from ibdistill.models import sequence_parallel
from ibdistill.models.architectures import DECODER_ONLY, family
from ibdistill.ops import implementation, layers, packed_attention
from ibdistill.ops.biased_attention import biased_attention
from ibdistill.ops.cpu import attention
from ibdistill.ops.gates import activate

ATTENTION = "ibdistill"
"""The name in transformers of SDPA, with our own on a CPU where there is dropout, for T5 on a GPU, and for
packed rows."""


class _Norm(T5LayerNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return layers.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _GatedFeedForward(T5DenseGatedActDense):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rate = self.dropout.p if self.training else 0.0
        inner = layers.gated_gelu(self.wi_0(hidden_states), self.wi_1(hidden_states), rate)
        dtype = self.wo.weight.dtype  # kept in fp32 beside fp16 weights; an 8-bit layer casts by itself
        return self.wo(inner.to(dtype) if dtype.is_floating_point else inner)


class _FeedForward(T5DenseActDense):
    """ReLU and dropout as one operation on a GPU, which keeps its result alone."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not implementation.on_gpu(hidden_states):
            return super().forward(hidden_states)
        rate = self.dropout.p if self.training else 0.0
        inner = activate(self.wi(hidden_states), activation="relu", rate=rate)
        dtype = self.wo.weight.dtype
        return self.wo(inner.to(dtype) if dtype.is_floating_point else inner)


class _DecoderNorm(nn.Module):
    """Mixed into the norms of decoder-only models, whose own operations stay on a CPU."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if implementation.on_gpu(hidden_states):
            return layers.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class _SwiGLU(nn.Module):
    """Mixed into the feed-forward layers of decoder-only models, whose own operations stay on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not implementation.on_gpu(x):
            return super().forward(x)
        return self.down_proj(activate(self.gate_proj(x), self.up_proj(x), activation="silu"))


_MIXINS = {"RMSNorm": _DecoderNorm, "MLP": _SwiGLU}
_DECODERS = ("Llama", "Mistral", "Olmo2", "Phi3", "Qwen2", "Qwen3", "SmolLM3")
"""Families whose norm is weight x / sqrt(mean(x^2) + epsilon), and all but Phi3 have SwiGLU as their MLP."""


@cache
def _with_gpu_form(layer: type[nn.Module]) -> type[nn.Module] | None:
    """A layer of a decoder-only model that has a form for a GPU too, None where we have none or it is one."""
    for part, mixin in _MIXINS.items():
        if not issubclass(layer, mixin) and layer.__name__ in {family + part for family in _DECODERS} - {
            "Phi3MLP"
        }:
            return type(layer.__name__, (mixin, layer), {})
    return None


class _BiasedT5Attention(T5Attention):
    """T5's attention; on a GPU and in packed rows its bias is not a matrix for all pairs of tokens."""

    def forward(
        self,
        hidden_states,
        mask=None,
        key_value_states=None,
        position_bias=None,
        past_key_values=None,
        **kwargs,
    ):
        if position_bias is None and past_key_values is None and self._by_distance(hidden_states, mask):
            # an empty bias stands for none: without one, the layer would make a matrix of zeros
            position_bias = (
                self._bias(hidden_states, mask) if key_value_states is None else hidden_states.new_empty(0)
            )
        return super().forward(
            hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs
        )

    def _by_distance(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether the bias may be a vector: in packed rows, and on a GPU for a mask of keys alone."""
        ours = self.config._attn_implementation == ATTENTION and implementation.on_gpu(hidden_states)
        return packed_attention.is_packed(mask) or (ours and (mask is None or mask.shape[2] == 1))

    def _bias(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[H, 2 T - 1], the bias of key j for query i at j - i + T - 1, in float32 (or float64), where T is
        that of a packed row's longest sequence; on a CPU [H, n] of such a row's `distances`."""
        packed, device = packed_attention.is_packed(mask), hidden_states.device
        if packed and not implementation.on_gpu(hidden_states):
            distances = packed_attention.distances(mask, device)
        else:
            last = (int(mask.max()) if packed else hidden_states.shape[1]) - 1
            distances = torch.arange(-last, last + 1, device=device)
        buckets = self._relative_position_bucket(
            distances,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        return self.relative_attention_bias(buckets).to(_bias_dtype(hidden_states)).T.contiguous()


def _bias_dtype(x: torch.Tensor) -> torch.dtype:
    """Of the bias in `biased_attention`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _attend_by_distance(module: T5Attention, query, key, value, mask, bias, dropout: float):
    """Attention whose bias is a vector by distance or empty, for the mask of `_mask`."""
    if not bias.numel():
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=1.0)
    seen = None if mask is None else mask[:, 0, 0]
    causal = mask is None and module.is_causal
    return biased_attention(query, key, value, bias, mask=seen, causal=causal, rate=dropout), None


def _attend_packed(
    module, query, key, value, lengths, dropout=0.0, scaling=None, position_bias=None, **kwargs
):
    """Attention of the sequences of a packed row; an empty bias stands for none."""

    def block(query, key, value, mask, bias):
        more = kwargs if bias is None else kwargs | {"position_bias": bias}
        return _attend(module, query, key, value, mask, dropout=dropout, scaling=scaling, **more)[0]

    bias = None if position_bias is None or not position_bias.numel() else position_bias
    if implementation.on_gpu(query) and isinstance(module, T5Attention) and (dropout or bias is not None):
        if bias is None:  # flash attention for packed rows has no dropout
            width, dtype = int(lengths.amax(3).sum()) - 1, _bias_dtype(query)
            bias = query.new_zeros(query.shape[1], width, dtype=dtype)
        given = {"lengths": lengths, "causal": module.is_causal, "rate": dropout}
        return biased_attention(query, key, value, bias, **given), None
    out = packed_attention.packed_attention(
        block,
        query,
        key,
        value,
        lengths,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=module.is_causal,
        dropout=dropout,
        window=kwargs.get("sliding_window"),
        bias=None if bias is None else bias.to(query.dtype),
    )
    return out, None


def _attend(module: nn.Module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """`sdpa_attention_forward`, save for packed rows, dropout on a CPU, where it has no kernel, and T5's bias
    on a GPU."""
    if packed_attention.is_packed(attention_mask):
        if packed_attention.is_part(attention_mask):
            settings = kwargs | {"dropout": dropout, "scaling": scaling}
            lengths = attention_mask[:, :, :2]
            return sequence_parallel.attend(_attend_packed, module, query, key, value, lengths, **settings)
        return _attend_packed(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    bias = kwargs.get("position_bias")
    if bias is not None and bias.dim() < 4:
        return _attend_by_distance(module, query, key, value, attention_mask, bias, dropout)
    on_cpu = query.device.type == "cpu" and not implementation.on_gpu(query)
    is_ours = on_cpu and query.dtype != torch.float16 and key.shape[1] == query.shape[1]
    if not (dropout and is_ours):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    is_causal = kwargs.get("is_causal")
    if attention_mask is None and (module.is_causal if is_causal is None else is_causal):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention.attention(query, key, value, bias=bias, mask=attention_mask, rate=dropout, scale=scale)
    return out.transpose(1, 2).contiguous(), None


def _mask(*, mask_function, attention_mask=None, **kwargs) -> torch.Tensor | None:
    """`sdpa_mask`, but on a GPU only the keys' padding [B, 1, 1, S] where all queries see the same keys.

    `sdpa_mask` would spell it out for each query, after waiting for the GPU to learn whether there is any. A
    mask that is one value in memory (`forward.no_padding`) says without such a question that there is none.
    """
    if attention_mask is not None and not any(attention_mask.stride()):
        attention_mask = None
    same = mask_function is bidirectional_mask_function and attention_mask is not None
    if same and implementation.on_gpu(attention_mask) and attention_mask.shape[1] == kwargs["kv_length"]:
        return attention_mask.bool()[:, None, None, :]
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)


def packs(model: PreTrainedModel) -> bool:
    """Whether a model's attention can read packed rows (`ops.packed_attention`).

    Of encoder-decoder models it is that of T5 and mT5 alone: BART's positions would not restart, and umT5's
    bias would count across sequences.
    """
    knows_rows = family(model) == DECODER_ONLY or any(type(m) is _BiasedT5Attention for m in model.modules())
    return knows_rows and model.config._attn_implementation == ATTENTION


def fused(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose layers compute the same and keep less for the backward pass (`ops.layers`).

    `gelu_new` (T5 v1.1, GPT-2) becomes torch's one operation for the same formula instead of transformers'
    eight; dropout, T5's norm and its gated feed-forward become one each, as does attention with dropout on a
    CPU. On a GPU the norms and feed-forward layers of decoder-only models do too, and T5's attention needs no
    matrix of its bias. What the model saves is as before. A second call changes nothing.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
        if type(module) in (T5LayerNorm, MT5LayerNorm):
            module.__class__ = _Norm
        elif type(module) in (T5Attention, MT5Attention):
            module.__class__ = _BiasedT5Attention
        elif type(module) in (T5DenseActDense, MT5DenseActDense) and type(module.act) is nn.ReLU:
            module.__class__ = _FeedForward
        elif type(module) in (T5DenseGatedActDense, MT5DenseGatedActDense) and type(module.act) is nn.GELU:
            module.__class__ = _GatedFeedForward
        elif type(module) is nn.Dropout:
            module.__class__ = layers.Dropout
        elif isinstance(getattr(module, "act_fn", None), (type(None), nn.SiLU, SiLUActivation)):
            module.__class__ = _with_gpu_form(type(module)) or type(module)
    return model
