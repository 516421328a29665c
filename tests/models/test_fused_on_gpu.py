"""Layers in their forms for a GPU, run on a CPU: the same functions, and memory linear in the length."""

from __future__ import annotations

import copy

import pytest
import torch
from feature_tables import features_of
from tiny_models import tiny
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from ibdistill.config.sections import ObjectiveConfig, StudentConfig
from ibdistill.data import batches
from ibdistill.models import forward, fused
from ibdistill.ops import implementation, layers
from ibdistill.ops.biased_attention import biased_attention
from ibdistill.planning.dryrun import Lengths, Skeleton, student_step

SHAPE = dict(
    vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=10, num_decoder_layers=2,
)  # fmt: skip


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(implementation, "on_gpu", lambda x: True)


def ragged_batch(packed: bool = False) -> batches.Batch:
    features = features_of([(9, 2, 7), (4, 5, 1), (23, 1, 14)])
    return batches.collate(features, [0, 1, 2], ("predict", "explain"), pad=0, start=0, packed=packed)


def t5(**changes) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE | dict(dropout_rate=0.0) | changes))
    for stack in (model.encoder, model.decoder):  # as large as in a trained model
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.normal_()
    return model.double().train()


def mt5(**changes) -> MT5ForConditionalGeneration:
    torch.manual_seed(0)
    return MT5ForConditionalGeneration(MT5Config(**SHAPE | dict(dropout_rate=0.0) | changes)).double().train()


def states_and_gradients(model, batch):
    targets = forward.states(model, batch).targets
    total = sum(hidden.square().sum() for hidden in targets.values())
    gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return targets, {
        name: g for (name, _), g in zip(model.named_parameters(), gradients, strict=True) if g is not None
    }


def test_the_gated_feed_forward_of_t5_is_one_operation_on_a_gpu(as_on_gpu, monkeypatch):
    calls, honest = [], layers.activate
    monkeypatch.setattr(layers, "activate", lambda *args, **kw: calls.append(kw) or honest(*args, **kw))
    forward.states(fused.fused(t5(feed_forward_proj="gated-gelu", dropout_rate=0.25)), ragged_batch())
    # the encoder, and the decoder for two streams
    assert calls == [{"activation": "gelu", "rate": 0.25}] * 3 * SHAPE["num_layers"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [t5, mt5, lambda: t5(feed_forward_proj="gated-gelu")])
def test_t5_on_a_gpu_is_transformers_t5(make, packed, as_on_gpu):
    """Encoder with padding, causal decoder and cross-attention; gradients of the bias tables included."""
    wanted, wanted_gradients = states_and_gradients(make(), ragged_batch())
    model = fused.fused(make())
    found, found_gradients = states_and_gradients(model, ragged_batch(packed))
    # the norms of transformers take their mean in fp32 whatever the dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert sum("relative_attention_bias" in name for name in found_gradients) == 2
    torch.testing.assert_close(found_gradients, wanted_gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"])
def test_decoder_only_models_compute_the_same_on_a_gpu_and_to_the_bit_on_a_cpu(model_type, monkeypatch):
    torch.manual_seed(0)
    plain = tiny(model_type).double().train()
    ids = torch.randint(3, 40, (3, 17))

    def of(model):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0]
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [hidden, *torch.autograd.grad(hidden, parameters, upstream, allow_unused=True)]

    wanted = of(plain)
    model = fused.fused(copy.deepcopy(plain))
    for mine, theirs in zip(of(model), wanted, strict=True):
        assert theirs is None or torch.equal(mine, theirs)
    calls = []
    silu, rms_norm = fused.activate, torch.nn.functional.rms_norm
    monkeypatch.setattr(fused, "activate", lambda *args, **kw: calls.append("gate") or silu(*args, **kw))
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda *args: calls.append("norm") or rms_norm(*args)
    )
    monkeypatch.setattr(implementation, "on_gpu", lambda x: True)
    # the norms of transformers take their mean in fp32 whatever the dtype
    torch.testing.assert_close(of(model), wanted, rtol=1e-4, atol=1e-4)
    layers = plain.config.num_hidden_layers
    assert calls.count("gate") == (0 if model_type == "phi3" else layers)
    assert calls.count("norm") >= 2 * layers + 1


@pytest.mark.parametrize("model_type", ["t5", "mt5", "gpt2", "qwen2"])
def test_a_second_call_changes_nothing(model_type):
    model = fused.fused(tiny(model_type))
    classes = [type(module) for module in model.modules()]
    assert [type(module) for module in fused.fused(model).modules()] == classes


def test_it_takes_the_linear_attention_with_dropout_and_makes_no_matrix(as_on_gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(
        fused,
        "biased_attention",
        lambda q, k, v, bias, **kwargs: (
            calls.append((bias.shape, kwargs)) or biased_attention(q, k, v, bias, **kwargs)
        ),
    )
    model, batch = fused.fused(t5(dropout_rate=0.25)), ragged_batch()
    forward.states(model, batch)
    assert len(calls) == 3 * SHAPE["num_layers"]  # the encoder, and the decoder for two streams
    for index, (shape, kwargs) in enumerate(calls):
        T = (23, 5, 14)[index // SHAPE["num_layers"]]
        assert shape == (4, 2 * T - 1) and kwargs["rate"] == 0.25
        assert kwargs["causal"] == (index >= SHAPE["num_layers"]) == (kwargs["mask"] is None)
    torch.manual_seed(1)
    first = forward.states(model, batch).targets
    torch.manual_seed(1)
    torch.testing.assert_close(forward.states(model, batch).targets, first, rtol=0, atol=0)
    forward.states(model.eval(), batch)
    assert calls[-1][1]["rate"] == 0


def test_all_attention_of_packed_rows_is_linear_under_dropout(as_on_gpu, monkeypatch):
    """In cross-attention the bias is zeros, because flash attention for packed rows has no dropout."""
    calls = []

    def attend(query, key, value, bias, **given):
        calls.append((bias.shape[1], bool(bias.any()), given["causal"], given["rate"]))
        return biased_attention(query, key, value, bias, **given)

    monkeypatch.setattr(fused, "biased_attention", attend)
    model, batch = fused.fused(t5(dropout_rate=0.25)), ragged_batch(packed=True)
    forward.states(model, batch)
    layers = SHAPE["num_layers"]
    assert calls[:layers] == [(45, True, False, 0.25)] * layers
    assert calls[layers:] == [(27, True, True, 0.25), (14 + 23 - 1, False, False, 0.25)] * layers


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointed_layers_have_the_same_gradients(packed, as_on_gpu):
    batch, gradients = ragged_batch(packed), []
    for checkpointing in (False, True):
        model = fused.fused(t5(dropout_rate=0.3))
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        gradients.append(states_and_gradients(model, batch)[1])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_decoding_with_a_cache_is_as_on_a_cpu(monkeypatch):
    model = fused.fused(t5()).eval()
    batch = ragged_batch()
    given = dict(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=6, min_length=6
    )
    on_cpu = model.generate(**given)
    monkeypatch.setattr(implementation, "on_gpu", lambda x: True)
    assert torch.equal(model.generate(**given), on_cpu) and on_cpu.shape[1] > 3


def test_the_memory_of_t5_base_grows_with_the_length_alone():
    """A step of 64 questions in bf16; with a matrix per layer 11.6, 43.8 and 110.5 GiB."""
    skeleton = Skeleton("google-t5/t5-base", "student.model", None, "bf16", StudentConfig())
    short, middle, long = (
        student_step(skeleton, Lengths(64, question, 16, 128), ObjectiveConfig()).peak / 2**30
        for question in (128, 512, 1024)
    )
    assert short < 7.8 and long < 39
    per_token = (middle - short) / 384
    assert (long - middle) / 512 == pytest.approx(per_token, rel=0.02)
