"""Shapes of published models, so that planning for them needs neither their files nor the network.

From the `config.json` of each model's page at huggingface.co, as keyword arguments of its configuration
class; what a class has as its default is left out. Papers with the same figures: T5, arXiv 1910.10683,
section 3.7; Qwen2.5, arXiv 2412.15115, table 1; Llama 3, arXiv 2407.21783, table 3. Vocabularies count the
rows of the embeddings, padding included.
"""

from __future__ import annotations

from typing import Any

_T5 = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64}
_T5_V1_1 = _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "attention_dropout": 0.0}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_LLAMA |= {"num_key_value_heads": 8, "tie_word_embeddings": False}


def _t5(base: dict[str, Any], d_model: int, d_ff: int, heads: int, layers: int) -> dict[str, Any]:
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_heads": heads, "num_layers": layers}
    return base | sizes | {"num_decoder_layers": layers}


def _decoder(base: dict[str, Any], hidden: int, feed: int, heads: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": feed, "num_attention_heads": heads}
    return base | sizes | {"num_hidden_layers": layers}


PUBLISHED: dict[str, dict[str, Any]] = {
    "google/t5-v1_1-small": _t5(_T5_V1_1, 512, 1024, 6, 8),
    "google/t5-v1_1-base": _t5(_T5_V1_1, 768, 2048, 12, 12),
    "google/t5-v1_1-xxl": _t5(_T5_V1_1, 4096, 10240, 64, 24),
    "google-t5/t5-base": _t5(_T5, 768, 3072, 12, 12),
    "google-t5/t5-11b": _t5(_T5 | {"d_kv": 128}, 1024, 65536, 128, 24),
    "Qwen/Qwen2.5-0.5B": _decoder(
        _QWEN | {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True},
        *(896, 4864, 14, 24),
    ),
    "Qwen/Qwen2.5-72B": _decoder(
        _QWEN | {"vocab_size": 152064, "num_key_value_heads": 8, "tie_word_embeddings": False},
        *(8192, 29568, 64, 80),
    ),
    "meta-llama/Llama-3.1-8B": _decoder(_LLAMA, 4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-405B": _decoder(_LLAMA, 16384, 53248, 128, 126),
}
SEPARATE_HEAD = ("google/t5-v1_1-small", "google/t5-v1_1-base", "google/t5-v1_1-xxl")
"""T5 models whose checkpoints keep the head apart from the embeddings; their configuration doesn't tell."""
