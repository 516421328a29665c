"""Shapes of published models, so that planning for them needs neither their files nor the network.

The shapes are those of the `config.json` on each model's page at huggingface.co, as keyword arguments of its
configuration class; what a class has as its default is left out. Papers with the same figures: T5, arXiv
1910.10683, section 3.7; Qwen2.5, arXiv 2412.15115, table 1; Qwen3, arXiv 2505.09388, table 1; Llama 3, arXiv
2407.21783, table 3; SmolLM2, arXiv 2502.02737. Vocabularies count the rows of the embeddings, padding
included.
"""

from __future__ import annotations

from typing import Any

_T5 = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64}
_T5_V1_1 = _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768}
_QWEN2_LONG = _QWEN2 | {"max_position_embeddings": 131072}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192}


def _t5(base: dict[str, Any], d_model: int, d_ff: int, heads: int, layers: int) -> dict[str, Any]:
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_heads": heads, "num_layers": layers}
    return base | sizes | {"num_decoder_layers": layers}


def _decoder(
    base: dict[str, Any],
    hidden: int,
    feed: int,
    heads: tuple[int, int],
    layers: int,
    *,
    tied: bool,
    **more: int,
) -> dict[str, Any]:
    """`heads`: of queries, and of keys and values. `tied`: whether the head is the embeddings."""
    sizes = {"hidden_size": hidden, "intermediate_size": feed, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return base | sizes | {"tie_word_embeddings": tied} | more


PUBLISHED: dict[str, dict[str, Any]] = {
    "google/t5-v1_1-small": _t5(_T5_V1_1, 512, 1024, 6, 8),
    "google/t5-v1_1-base": _t5(_T5_V1_1, 768, 2048, 12, 12),
    "google/t5-v1_1-xxl": _t5(_T5_V1_1, 4096, 10240, 64, 24),
    "google-t5/t5-base": _t5(_T5, 768, 3072, 12, 12),
    "google-t5/t5-11b": _t5(_T5 | {"d_kv": 128}, 1024, 65536, 128, 24),
    "Qwen/Qwen2.5-0.5B": _decoder(_QWEN2, 896, 4864, (14, 2), 24, tied=True),
    "Qwen/Qwen2.5-1.5B": _decoder(_QWEN2_LONG, 1536, 8960, (12, 2), 28, tied=True),
    "Qwen/Qwen2.5-3B": _decoder(_QWEN2, 2048, 11008, (16, 2), 36, tied=True),
    "Qwen/Qwen2.5-7B": _decoder(_QWEN2_LONG, 3584, 18944, (28, 4), 28, tied=False, vocab_size=152064),
    "Qwen/Qwen2.5-72B": _decoder(_QWEN2_LONG, 8192, 29568, (64, 8), 80, tied=False, vocab_size=152064),
    "Qwen/Qwen3-0.6B": _decoder(_QWEN3, 1024, 3072, (16, 8), 28, tied=True),
    "Qwen/Qwen3-1.7B": _decoder(_QWEN3, 2048, 6144, (16, 8), 28, tied=True),
    "Qwen/Qwen3-4B": _decoder(_QWEN3, 2560, 9728, (32, 8), 36, tied=True),
    "Qwen/Qwen3-8B": _decoder(_QWEN3, 4096, 12288, (32, 8), 36, tied=False),
    "meta-llama/Llama-3.2-1B": _decoder(_LLAMA, 2048, 8192, (32, 8), 16, tied=True, head_dim=64),
    "meta-llama/Llama-3.2-3B": _decoder(_LLAMA, 3072, 8192, (24, 8), 28, tied=True, head_dim=128),
    "meta-llama/Llama-3.1-8B": _decoder(_LLAMA, 4096, 14336, (32, 8), 32, tied=False),
    "meta-llama/Llama-3.3-70B-Instruct": _decoder(_LLAMA, 8192, 28672, (64, 8), 80, tied=False),
    "meta-llama/Llama-3.1-405B": _decoder(_LLAMA, 16384, 53248, (128, 8), 126, tied=False),
    "HuggingFaceTB/SmolLM2-135M": _decoder(_SMOLLM2, 576, 1536, (9, 3), 30, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _decoder(_SMOLLM2, 960, 2560, (15, 5), 32, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _decoder(_SMOLLM2, 2048, 8192, (32, 32), 24, tied=True),
}
SEPARATE_HEAD = ("google/t5-v1_1-small", "google/t5-v1_1-base", "google/t5-v1_1-xxl")
"""T5 models whose checkpoints keep the head apart from the embeddings; their configuration does not say
so."""
