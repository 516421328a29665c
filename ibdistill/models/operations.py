"""How many floating point operations training a model takes."""

from __future__ import annotations

from torch import nn

from ibdistill.models.families import ENCODER_DECODER, base_of, family


def operations_per_token(model: nn.Module) -> tuple[int, int]:
    """Floating point operations of one training step per token of a question and per token of a target.

    Each weight that the token meets counts 6: 2 in the forward pass, 4 in the backward pass (Kaplan et al.,
    arXiv 2001.08361, section 2.1). The products of attention itself are left out, and so is what is computed
    twice under `student.gradient_checkpointing`. In an encoder-decoder model a question's tokens meet the
    encoder, and a target's tokens the decoder and the head; in a decoder-only model they meet all blocks.
    """
    base = base_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if family(base) == ENCODER_DECODER:
        question = _weights(base.get_encoder()) - _weights(embedding)
        target = _weights(base.get_decoder()) - _weights(embedding)
    else:
        tied = embedding.weight is head.weight
        question = target = _weights(base) - _weights(embedding) - (0 if tied else _weights(head))
    return 6 * question, 6 * (target + _weights(head))


def _weights(module: nn.Module) -> int:
    """Number of weights, also where ZeRO-3 has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
