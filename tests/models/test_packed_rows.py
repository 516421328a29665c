"""Packed rows: a model's states, losses and gradients are those of unpadded sequences."""

from __future__ import annotations

import pytest
import torch
from feature_tables import features_of
from tiny_models import ENCODER_DECODER_SHAPES, SHAPES, tiny
from torch.nn import functional as F

from ibdistill.config.sections import DataConfig
from ibdistill.data import batches
from ibdistill.models import forward
from ibdistill.models.fused import fused, packs
from ibdistill.models.student import check_packing

STREAMS = ("predict", "explain")
RAGGED = [(5, 1, 0), (9, 2, 14), (3, 3, 1), (21, 1, 30), (6, 4, 13)]
# within a window of 8, on a stack of full and sliding layers where the type has such
WINDOWED = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}
FEW_BUCKETS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
CASES = [(kind, {}) for kind in SHAPES if kind != "gemma2"] + list(WINDOWED.items())
CASES += [(kind, FEW_BUCKETS) for kind in ("t5", "mt5")]


@pytest.fixture(autouse=True)
def in_double(monkeypatch):
    """transformers' norms and rotary positions compute in fp32 whatever the model's dtype; here in fp64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)


def features():
    """Made-up records whose token ids are in the tiny models' vocabulary."""
    table = features_of(RAGGED)
    for part in (*table.questions.values(), *table.targets.values()):
        part.flat[:] = part.flat % 400 + 1
    return table


def double(kind: str, **overrides):
    return fused(tiny(kind, **overrides)).double().eval()


def collated(packed: bool, rows=range(5), streams=STREAMS, start: int | None = 7, kind: str = "llama"):
    separator = None if kind in ENCODER_DECODER_SHAPES else 5
    return batches.collate(features(), rows, streams, pad=0, start=start, separator=separator, packed=packed)


def losses_and_gradients(model, found: dict[str, torch.Tensor], batch):
    """Each segment's sum of cross entropies by torch's own formula, and all gradients of their sum."""
    model.zero_grad()
    head = model.get_output_embeddings()
    losses = {s: F.cross_entropy(head(h), batch.labels[s], reduction="sum") for s, h in found.items()}
    sum(losses.values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {s: loss.detach() for s, loss in losses.items()}, gradients


@pytest.mark.parametrize(("kind", "overrides"), CASES)
def test_losses_and_gradients_are_those_of_unpadded_sequences(kind, overrides):
    model = double(kind, **overrides)
    assert packs(model)
    batch = collated(packed=True, kind=kind)
    assert batch.input_ids.shape == (1, int(batch.row_lengths.sum()))
    assert batch.num_positions == batch.num_tokens
    got = forward.states(model, batch)
    loss, gradients = losses_and_gradients(model, got.targets, batch)
    alone, questions = {s: [] for s in STREAMS}, []
    for row in range(len(RAGGED)):  # one sequence per call: transformers' own attention, nothing padded
        for stream in STREAMS:
            one = forward.states(model, collated(False, [row], (stream,), kind=kind))
            alone[stream].append(one.targets[stream])
            questions += [one.questions] if stream == "predict" else []
    expected, theirs = losses_and_gradients(model, {s: torch.cat(h) for s, h in alone.items()}, batch)
    torch.testing.assert_close(got.questions, torch.cat(questions), rtol=0, atol=1e-10)
    for stream in STREAMS:
        torch.testing.assert_close(loss[stream], expected[stream], rtol=1e-10, atol=1e-10)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_first_streams_questions_alone(kind):
    model = double(kind)
    got, padded = (
        forward.states(model, collated(packed, kind=kind), targets=False) for packed in (True, False)
    )
    assert got.targets == {}
    torch.testing.assert_close(got.questions, padded.questions, rtol=0, atol=1e-10)
    shorter = forward.questions_only(collated(packed=True, kind=kind))
    assert shorter.input_ids.shape[1] == int(shorter.row_lengths.sum()) and len(shorter.row_lengths) == len(
        RAGGED
    )


@pytest.mark.parametrize("kind", ["qwen2", "t5"])
def test_activation_checkpointing_reads_the_lengths_again(kind):
    model = double(kind, **({"dropout_rate": 0.0} if kind == "t5" else {}))
    batch = collated(packed=True, kind=kind)
    expected = losses_and_gradients(model, forward.states(model, batch).targets, batch)
    model.activation_checkpointing_enable()
    model.train()
    other = collated(packed=True, rows=[2, 1], kind=kind)
    before = forward.states(model, batch)
    forward.states(model, other)  # another row between the two forward passes of the first
    got = losses_and_gradients(model, before.targets, batch)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_model_whose_attention_cannot_be_packed_is_refused_by_name():
    model = fused(tiny("gemma2"))
    with pytest.raises(
        ValueError, match="data.packing is 'on'.*'gemma2' model.*attention 'eager'.*packing off"
    ):
        check_packing(model, DataConfig(packing="on"))
    check_packing(model, DataConfig())
    for kind in sorted(ENCODER_DECODER_SHAPES.keys() - {"t5", "mt5"}):
        with pytest.raises(ValueError, match=f"data.packing is 'on'.*'{kind}' model"):
            check_packing(fused(tiny(kind)), DataConfig(packing="on"))
    for kind in ("llama", "t5"):
        check_packing(fused(tiny(kind)), DataConfig(packing="on"))


def test_positions_and_masks_of_the_collated_row():
    padded, packed = collated(False, start=None), collated(True, start=None)
    flat = packed.input_ids[0]
    assert flat.tolist() == padded.input_ids[padded.attention_mask.bool()].tolist()
    assert packed.row_lengths.tolist() == padded.attention_mask.sum(1).tolist()
    first = padded.input_ids[: len(RAGGED)].flatten()
    assert flat[packed.question_positions].tolist() == first[padded.question_positions].tolist()
    for number, stream in enumerate(STREAMS):
        rows = padded.input_ids.chunk(2)[number].flatten()
        assert flat[packed.positions[stream]].tolist() == rows[padded.positions[stream]].tolist()


def test_an_encoder_decoders_rows_hold_what_the_padded_ones_hold():
    """With BOS in front of questions, targets without a token, and none at all."""
    table = features()
    layout = {"pad": 0, "start": 7, "bos": 3}
    padded, packed = (batches.collate(table, range(5), STREAMS, **layout, packed=on) for on in (False, True))
    flat = packed.input_ids[0]
    assert flat.tolist() == padded.input_ids[padded.attention_mask.bool()].tolist()
    first = padded.input_ids[: len(RAGGED)].flatten()
    assert flat[packed.question_positions].tolist() == first[padded.question_positions].tolist()
    decoded = torch.cat(list(packed.decoder_input_ids.values()), 1)[0]
    assert packed.decoder_lengths.tolist() == [1, 2, 3, 1, 4, 0, 14, 1, 30, 13]
    for stream in STREAMS:
        rows = padded.decoder_input_ids[stream].flatten()
        assert decoded[packed.positions[stream]].tolist() == rows[padded.positions[stream]].tolist()
    assert packed.num_tokens == padded.num_tokens
    none = batches.collate(table, [0], ("explain",), **layout, packed=True)  # models need one column
    assert none.decoder_lengths.tolist() == [1] and len(none.positions["explain"]) == 0
    assert forward.states(double("t5"), none).targets["explain"].shape == (0, 32)
