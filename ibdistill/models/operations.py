"""How many floating point operations training a model takes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ibdistill.models.architectures import ENCODER_DECODER, active_experts, family, in_decoder
from ibdistill.models.families import base_of


def operations_per_token(model: nn.Module) -> tuple[int, int]:
    """Floating point operations of one training step per token of a question and per token of a target.

    Each weight of a matrix that the token is multiplied with counts 6: 2 in the forward pass, and in the
    backward pass 2 for the gradient of the token's state and 2 for that of the weight (Kaplan et al.,
    arXiv 2001.08361, section 2.1), of which a frozen weight, as beside LoRA's adapters, saves the last.
    Embeddings, relative position biases among them, are looked up and cost nothing. The products of attention
    itself are left out, and so is what is computed twice under `student.gradient_checkpointing`.

    In an encoder-decoder model a question's tokens meet the encoder and the keys and values of the decoder's
    cross-attention, which read the encoder's states; a target's tokens meet the rest of the decoder and the
    head. In a decoder-only model both meet all blocks, but of a mixture of experts only those that the router
    chooses.
    """
    base = base_of(model)
    head = base.get_output_embeddings()
    share = active_experts(base.config)
    matrices = dict(_matrices(base, without=head, share=share))
    if family(base) == ENCODER_DECODER:
        target = sum(cost for name, cost in matrices.items() if in_decoder(name))
        question = sum(matrices.values()) - target
    else:
        question = target = sum(matrices.values())
    return question, target + sum(cost for _, cost in _matrices(head))


def _matrices(
    module: nn.Module, without: nn.Module | None = None, share: float = 1.0
) -> Iterable[tuple[str, int]]:
    """(name, operations per token) of the matrices in a module, also where ZeRO-3 has partitioned them or
    their weights are packed. `share`: of experts, whose matrices stand in one tensor [experts, ., .]."""
    left_out = set() if without is None else set(without.modules())
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) or part in left_out:
            continue
        for key, p in part.named_parameters(recurse=False):
            if len(getattr(p, "ds_shape", p.shape)) > 1:
                # a linear layer's own sizes, since 4-bit weights are packed into fewer elements
                is_linear = isinstance(part, nn.Linear) and key == "weight"
                size = (
                    part.in_features * part.out_features if is_linear else getattr(p, "ds_numel", p.numel())
                )
                if len(getattr(p, "ds_shape", p.shape)) == 3:
                    size = int(size * share)
                yield f"{name}.{key}", (6 if p.requires_grad else 4) * size
