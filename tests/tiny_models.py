"""Tiny models of every supported type, and a tokenizer for them: what a folder of `save_pretrained` holds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as bpe
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

SHAPE = dict(
    vocab_size=420,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
)
GROUPED = SHAPE | {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS |= {"shared_expert_intermediate_size": 32, "experts_implementation": "eager"}  # others have no fp64
SHAPES = {
    "cohere": GROUPED,
    "cohere2": GROUPED | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma": GROUPED | {"head_dim": 8},
    # their embeddings reach logits of some 10; with a cap of 5 many of them are near it
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": GROUPED | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "glm4": GROUPED | {"head_dim": 8},
    "gpt2": dict(vocab_size=420, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "gpt_neox": SHAPE,
    "granite": GROUPED | {"logits_scaling": 3.0},
    "granitemoe": GROUPED | EXPERTS | {"logits_scaling": 3.0},
    "llama": GROUPED,
    "ministral3": GROUPED | {"head_dim": 8},
    "mistral": GROUPED | {"sliding_window": 8},
    "mixtral": GROUPED | EXPERTS,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"sliding_window": 8},
    "olmoe": GROUPED | EXPERTS,
    "opt": SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "phi": GROUPED,
    "phi3": GROUPED,
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen2_moe": GROUPED | EXPERTS,
    "qwen3": GROUPED | {"head_dim": 16},
    "qwen3_moe": GROUPED | EXPERTS | {"head_dim": 16},
    "smollm3": GROUPED,
    "starcoder2": GROUPED,
}
T5 = dict(vocab_size=420, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
T5 |= dict(pad_token_id=0, eos_token_id=0, decoder_start_token_id=0)  # of the tokenizer below
BART = dict(vocab_size=420, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_layers=2)
BART |= dict(decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, bos_token_id=1)
BART |= dict(max_position_embeddings=256, pad_token_id=0, eos_token_id=0, decoder_start_token_id=0)
ENCODER_DECODER_SHAPES = {
    "t5": T5,
    "mt5": T5 | {"feed_forward_proj": "gated-gelu"},
    "umt5": T5,
    "bart": BART | {"encoder_layerdrop": 0.3},
    "mbart": BART | {"scale_embedding": True},
    "plbart": BART | {"scale_embedding": True},
}
QUESTION = "predict: tom had 3 apples and found 4 . how many ?"
TEXTS = [QUESTION, "explain: start 3 . found means + 4 .\n", "( 3 + 4 )"] * 3


def config_of(model_type: str, **overrides):
    return AutoConfig.for_model(model_type, **(SHAPES | ENCODER_DECODER_SHAPES)[model_type] | overrides)


def tiny(model_type: str, seed: int = 0, **overrides):
    """A small model of the type, its matrices large enough that its states differ and its words vary."""
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if model_type in ENCODER_DECODER_SHAPES else AutoModelForCausalLM
    model = auto.from_config(config_of(model_type, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE like GPT-2's or Llama 3's: no padding token; with `bos`, one in front of every text."""
    core = Tokenizer(bpe.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|end|>", "<|begin|>"], pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", bos_token="<|begin|>" if bos else None
    )
    assert tokenizer.pad_token is None and tokenizer("a").input_ids[0] != 1 - bos
    return tokenizer


def save(folder: Path, model_type: str, *, bos: bool = False, **overrides) -> str:
    """Save a tiny model with its tokenizer for `from_pretrained`; the folder's name."""
    tiny(model_type, **overrides).save_pretrained(folder)
    byte_tokenizer(bos=bos).save_pretrained(folder)
    return str(folder)
