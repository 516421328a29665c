"""Bytes that an evaluation, the export and the sampling of own text hold beside the model states."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ibdistill.config.sections import Config
from ibdistill.models.families import ENCODER_DECODER, base_of, family
from ibdistill.models.merging import adapted_layers
from ibdistill.objectives.weights import streams_of
from ibdistill.planning.attention import attention_of
from ibdistill.planning.dryrun import Skeleton, Tracker
from ibdistill.planning.experts import experts_in_any_dtype
from ibdistill.runtime.hardware import DTYPES


def copied_bytes(student: Skeleton, precision: str, stage: int, *, in_4bit: bool = False) -> int:
    """Bytes on each rank of the copies that `models.whole_model` makes of a student, at most.

    ZeRO `stage` 3 collects the whole student, and weights in 4 bits become whole again. Otherwise the weights
    that have adapters are copied. They are merged in fp32, one layer at a time (`models.merging`): the
    weight, the product of its adapters, and that product scaled, with 4 bytes per element each.
    """
    layers = adapted_layers(student.model)
    weights = [layer.get_base_layer().weight.numel() for layer in layers]
    copied = sum(p.numel() for layer in layers for p in layer.parameters())
    if stage == 3 or in_4bit:
        copied = sum(n for n, _ in student.sizes())
    return DTYPES[precision].itemsize * copied + 3 * 4 * max(weights, default=0)


@dataclass(frozen=True)
class Decoding:
    """What one rank needs to sample a batch of texts (`training.on_policy`)."""

    texts: int
    tokens: int
    """The most tokens of a text."""
    cache: int
    """Bytes of all keys and values at the end."""
    kernels: int
    """Kernels of a forward pass, which every token takes."""


def sampling(student: Skeleton, config: Config, question: int = 1, device: str = "cuda") -> Decoding | None:
    """The sampling of a run's own text, None: it has none. `question`: tokens of each prompt.

    Counted on a forward pass of fake tensors over whole texts, which keeps the keys and values that decoding
    has kept when the last token comes.
    """
    settings = config.on_policy
    if not settings.share:
        return None
    tokens = settings.max_tokens or config.data.answer_limits()[streams_of(config.objective)[-1]]
    texts, base = config.run.eval_batch_size, base_of(student.model)
    is_pair = family(base) == ENCODER_DECODER
    lengths = (
        {"input_ids": question, "decoder_input_ids": tokens} if is_pair else {"input_ids": question + tokens}
    )
    with student.mode:
        given = {name: torch.ones(texts, length, dtype=torch.long) for name, length in lengths.items()}
    was_training = base.training
    base.eval()  # checkpointing keeps no keys and values
    tracker = Tracker([])
    with attention_of(device), experts_in_any_dtype(), student.mode, tracker, torch.no_grad():
        kept = base(**given, use_cache=True).past_key_values
    base.train(was_training)
    caches = [kept.self_attention_cache, kept.cross_attention_cache] if is_pair else [kept]
    layers = [layer for cache in caches for layer in cache.layers]
    return Decoding(texts, tokens, sum(x.keys.nbytes + x.values.nbytes for x in layers), tracker.kernels)
