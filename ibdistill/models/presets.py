"""Shapes of models that start from random weights, and how those weights are drawn.

T5's own initialisation is made for long training of large models. For tiny ones, these
changes decided whether the demo task was learned (measured there, so no more than that):

- relative position biases N(0, 1.5) instead of near 0: AdamW at 2e-3 moves them by about 1
  in 700 steps, too little to bind a word to the number beside it (59 -> 82 %; such a model
  also wants `optim.relative_bias_lr_scale` 10);
- embeddings with standard deviation 0.1 instead of 1, and no `d_model ** -0.5` in front of
  the head;
- a head tied to the embeddings (+13 points, s.e. 5, over four pretraining runs each way). Why
  is not known; it is not that the student copies words better, it hardly does in either case.

`t5-v1_1-small` keeps the true shape, with a head of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, T5ForConditionalGeneration

# Keyword arguments of T5Config, or of LlamaConfig. One without `vocab_size` takes the tokenizer's.
PRESETS: dict[str, dict[str, Any]] = {
    "demo-student": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "relative_attention_max_distance": 64,
    },
    "demo-teacher": {
        "d_model": 96,
        "d_kv": 24,
        "d_ff": 256,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "relative_attention_max_distance": 64,
    },
    "demo-student-decoder": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
    },
    "demo-teacher-decoder": {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
    },
    "t5-mini": {
        "d_model": 192,
        "d_kv": 32,
        "d_ff": 512,
        "num_heads": 6,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "feed_forward_proj": "gated-gelu",
    },
    "t5-v1_1-small": {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_heads": 6,
        "num_layers": 8,
        "num_decoder_layers": 8,
        "feed_forward_proj": "gated-gelu",
    },
}
SEPARATE_HEAD = ("t5-v1_1-small",)
"""Presets whose head is a tensor of its own; in the others the head is the embeddings' tensor."""
_HEAD = "lm_head.weight"


def is_decoder_only(name: str) -> bool:
    """Whether a preset has Llama's shape; else it has T5's."""
    return PRESETS[name].get("model_type") == "llama"


def dropout_field(name: str) -> str:
    """The name of the dropout rate in the preset's configuration class. Llama has one for attention alone."""
    return "attention_dropout" if is_decoder_only(name) else "dropout_rate"


def build(name: str, vocab_size: int, seed: int, **overrides: Any) -> PreTrainedModel:
    """A preset with random weights that depend on `seed` alone.

    `vocab_size` is the tokenizer's length; a preset with a fixed vocabulary keeps its own.
    `overrides` are further arguments of T5Config or LlamaConfig, such as `dropout_rate`.

    Raises:
        ValueError: unknown preset, or a tokenizer larger than the preset's vocabulary.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    if name not in PRESETS:
        raise ValueError(f"student.model {name!r} is not a preset; choose from {', '.join(PRESETS)}")
    shape = {"vocab_size": vocab_size, **PRESETS[name], **overrides}
    if is_decoder_only(name):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        # Despite its name, `tie_word_embeddings=False` only switches the output scaling off.
        config = T5Config(**shape, decoder_start_token_id=0, tie_word_embeddings=False)
        model = T5ForConditionalGeneration(config)
        if name in SEPARATE_HEAD:
            untie_head(model)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (name not in SEPARATE_HEAD)
    initialise(model, seed)
    return model


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Draw every weight of a preset anew, as the module docstring says.

    T5's matrices keep T5's scales. Whether the head is tied stays as it is. Independent of
    torch's global generator. Weights on the meta device have no values, so nothing is drawn for them.
    """
    import torch

    if model.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module = name.split(".")[-2]
            if "norm" in module:
                weight.fill_(1.0)
            else:
                std = _std(model, module, weight)
                weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)


def _std(model: PreTrainedModel, module: str, weight: Tensor) -> float:
    if module in ("shared", "embed_tokens", "lm_head"):
        return 0.1
    if module == "relative_attention_bias":
        return 1.5
    if module == "q":  # T5's attention does not divide by sqrt(d_kv)
        return (model.config.d_model * model.config.d_kv) ** -0.5
    return weight.shape[1] ** -0.5


def untie_head(model: T5ForConditionalGeneration) -> None:
    """Make the output head a tensor of its own that stays one through saving, loading and resizing.

    The loader keeps two different tensors apart by itself, but the next `tie_weights()` would tie them
    again, so the entry is also removed from the model's list of tied weights. The model must have
    `scale_decoder_outputs` False, which is what an untied head means elsewhere in the T5 family.

    Raises ValueError if it has not.
    """
    import torch

    if model.config.scale_decoder_outputs:
        raise ValueError(
            "this T5 ties its head (it scales the decoder's output); it cannot be untied as it is"
        )
    if model.lm_head.weight is model.shared.weight:
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    model._tied_weights_keys = {k: v for k, v in model._tied_weights_keys.items() if k != _HEAD}
    model.all_tied_weights_keys.pop(_HEAD, None)
