"""Operations per token against those that torch counts, exactly, for every supported type of model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ENCODER_DECODER_SHAPES, SHAPES, tiny
from torch.utils.flop_counter import FlopCounterMode

from ibdistill.config.sections import StudentConfig
from ibdistill.models.operations import operations_per_token
from ibdistill.models.student import with_lora

ROWS = 3


def counted(model, **inputs) -> int:
    """Operations of all matrix products of a forward and a backward pass, without attention's own two."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False).logits.sum().backward()
    by_kind = counter.get_flop_counts()["Global"]
    return sum(n for kind, n in by_kind.items() if str(kind) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("model_type", ENCODER_DECODER_SHAPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("question", "target"), [(4, 4), (17, 3), (2, 9)])
def test_an_encoder_decoder_s_keys_and_values_of_cross_attention_meet_the_question(
    model_type, tied, question, target
):
    layers = "num_decoder_layers" if "t5" in model_type else "decoder_layers"
    model = tiny(model_type, tie_word_embeddings=tied, attn_implementation="eager", **{layers: 3})
    per_question, per_target = operations_per_token(model)
    ids = torch.ones(ROWS, question, dtype=torch.long), torch.ones(ROWS, target, dtype=torch.long)
    expected = ROWS * (per_question * question + per_target * target)
    assert counted(model, input_ids=ids[0], decoder_input_ids=ids[1]) == expected


@pytest.mark.parametrize("model_type", SHAPES)
def test_of_a_decoder_only_model(model_type):
    """Learned positions (GPT-2, OPT) are looked up like embeddings."""
    model = tiny(model_type, attn_implementation="eager")
    per_question, per_target = operations_per_token(model)
    head = 6 * model.get_output_embeddings().weight.numel()
    assert per_target == per_question + head
    ids = torch.ones(ROWS, 8, dtype=torch.long)
    assert counted(model, input_ids=ids) == ROWS * 8 * per_target


def test_frozen_weights_beside_adapters_have_no_gradient():
    """The first block's queries and values read states that need no gradient, and none is made below them."""
    model = with_lora(tiny("llama", attn_implementation="eager"), StudentConfig(lora_rank=4))
    _, per_target = operations_per_token(model)
    ids = torch.ones(ROWS, 8, dtype=torch.long)
    first = model.get_base_model().model.layers[0].self_attn
    unneeded = sum(
        2 * (proj.base_layer.weight.numel() + proj.lora_A["default"].weight.numel())
        for proj in (first.q_proj, first.v_proj)
    )
    unneeded += 2 * first.k_proj.weight.numel()
    assert counted(model, input_ids=ids) == ROWS * 8 * (per_target - unneeded)


def test_packed_weights_count_as_the_matrix_they_stand_for():
    """4-bit weights hold two values per byte, in one column."""
    model = tiny("llama")
    expected, _ = operations_per_token(model)
    layer = model.model.layers[0].mlp.up_proj
    packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert operations_per_token(model)[0] == expected - 2 * layer.in_features * layer.out_features
