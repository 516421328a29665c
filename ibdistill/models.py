"""Students: loading, adapting, one forward for both streams, and getting the whole model back.

The head loss works on packed hidden states, so a model's forward here ends before the head:
`target_states` gives the decoder's states at the real target positions of each stream.
Both streams share one encoder call; the decoder runs once a stream, because a label is a few
tokens long and a rationale a hundred, and padding one to the other would cost more than a
second call. All of it happens within one `engine(...)`, so ZeRO-3 sees the same sequence of
modules each step and its prefetch trace completes (a forward of its own for each stream, as
the reference has it, would not).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ibdistill import presets
from ibdistill.config import StudentConfig
from ibdistill.data import Batch

logger = logging.getLogger("ibdistill")

FAMILIES = ("t5", "mt5")
"""Model types whose forward `target_states` knows."""


_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt"),
)


def load_tokenizer(name: str, setting: str) -> PreTrainedTokenizerBase:
    """A tokenizer by hub name or folder. `setting` is named in the ValueError if there is none."""
    # transformers makes an empty tokenizer from a folder that holds a model's config only
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        raise ValueError(
            f"{setting} is {name!r}, which holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)}; "
            "save one there with tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting} is {name!r}, which holds no tokenizer: {error}") from error


def load_student(config: StudentConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The student as `config` describes it, whole and in fp32, on the CPU.

    Raises ValueError if there is no such model, if its family is not supported, or if the
    tokenizer does not fit it.
    """
    if config.model in presets.PRESETS:
        dropout = {} if config.dropout is None else {"dropout_rate": config.dropout}
        model = presets.build(config.model, len(tokenizer), seed, **dropout)
    else:
        model = _load(config, seed)
    check_fit(model, tokenizer)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if config.lora_rank:
        model = _with_lora(model, config)
    if config.compile:
        model.get_encoder().compile(dynamic=True)
        model.get_decoder().compile(dynamic=True)
    return model.train()  # from_pretrained leaves it in evaluation mode, without dropout


def _load(config: StudentConfig, seed: int) -> PreTrainedModel:
    try:
        model_config = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        known = ", ".join(presets.PRESETS)
        raise ValueError(
            f"student.model is {config.model!r}: no preset ({known}), and no model could be loaded: {error}"
        ) from error
    if model_config.model_type not in FAMILIES:
        raise ValueError(
            f"student.model is {config.model!r}, a {model_config.model_type!r} model; supported are "
            f"{', '.join(FAMILIES)}"
        )
    if config.dropout is not None:
        model_config.dropout_rate = config.dropout
    if config.init == "random":
        torch.manual_seed(seed)
        return AutoModelForSeq2SeqLM.from_config(model_config, dtype=torch.float32)
    return AutoModelForSeq2SeqLM.from_pretrained(config.model, config=model_config, dtype=torch.float32)


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token id has a row and the special tokens agree."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"student.tokenizer has {len(tokenizer)} tokens but student.model only {rows} embedding rows; "
            "take the model's own tokenizer (leave student.tokenizer empty) or a model of that vocabulary"
        )
    for name in ("pad_token_id", "eos_token_id"):
        theirs, ours = getattr(model.config, name), getattr(tokenizer, name)
        if theirs != ours:
            raise ValueError(
                f"student.tokenizer has {name} {ours} but student.model has {theirs}; "
                "they were not made for each other"
            )


def _with_lora(model: PreTrainedModel, config: StudentConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_targets,
        lora_dropout=0.0,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"student.lora_targets is {config.lora_targets}: {error}") from error


def target_states(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Stream -> [N_stream, D] final hidden states at the packed target positions, ready for the head.

    Padded decoder positions come last in their row, so under the causal mask no real position
    sees them and they need no mask of their own.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    encoded = base.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    streams = list(batch.decoder_input_ids)
    states = {}
    for stream, memory, mask in zip(
        streams, encoded.chunk(len(streams)), batch.attention_mask.chunk(len(streams)), strict=True
    ):
        decoded = base.get_decoder()(
            input_ids=batch.decoder_input_ids[stream],
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            use_cache=False,
        )[0]
        hidden = decoded.flatten(0, 1).index_select(0, batch.positions[stream])
        # T5 with tied embeddings scales what goes into the head
        scales = getattr(base.config, "scale_decoder_outputs", False)
        states[stream] = hidden * base.config.d_model**-0.5 if scales else hidden
    return states


class WholeModel:
    """Gives the trained model in one piece, for decoding and export, whatever ZeRO does to it.

    Under ZeRO-3 every rank collects a copy, one parameter at a time, and drops it afterwards.
    That takes one more student in memory while evaluating, and in return decoding runs without
    an all-gather a token, ranks may decode unequal shares, and the engine's hooks and trace
    are left alone.
    """

    def __init__(self, model: nn.Module, *, sharded: bool) -> None:
        """Call before the engine partitions `model`."""
        self._model = model
        self._skeleton = _skeleton(model) if sharded else None

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """The model in evaluation mode. Collective under ZeRO-3."""
        model = self._model if self._skeleton is None else self._collect()
        model.eval()
        try:
            yield model
        finally:
            self._model.train()

    def _collect(self) -> nn.Module:
        model = copy.deepcopy(self._skeleton)
        state = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                state[name] = parameter.detach().clone()
        # tied weights: one tensor under several names
        first: dict[int, str] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            state[name] = state[first.setdefault(id(parameter), name)]
        model.load_state_dict(state, strict=False, assign=True)
        return model


def _skeleton(model: nn.Module) -> nn.Module:
    """The model's structure and buffers without its weights."""
    weights = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo=weights)


def export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write the student for `from_pretrained`: safetensors, tokenizer, and a model card.

    LoRA adapters are merged into a copy of the weights.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def card(config: str, scores: str) -> str:
    """The exported student's model card."""
    return f"""---
library_name: transformers
tags: [ibdistill, chain-of-thought, distillation]
---

A student distilled with ibdistill. `predict: QUESTION` gives the label, `explain: QUESTION`
the rationale. Method: "Learning to Maximize Mutual Information for Chain-of-Thought
Distillation", Findings of ACL 2024, arXiv 2403.03348.

Scores on the test split:

```json
{scores}
```

Configuration:

```yaml
{config}```
"""
