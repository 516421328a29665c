"""Models from random weights: their shapes, their initialisation, their separate head."""

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from ibdistill.models.presets import PRESETS, SEPARATE_HEAD, build, initialise, is_decoder_only, untie_head

T5 = [name for name in PRESETS if name not in SEPARATE_HEAD and not is_decoder_only(name)]
LLAMA = [name for name in PRESETS if is_decoder_only(name)]


def separate(model):
    return model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()


def logits(model):
    model.eval()
    questions, targets = torch.arange(3, 23).view(2, 10), torch.arange(5, 15).view(2, 5)
    return model(input_ids=questions, labels=targets).logits


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("demo-student", 181_696),
        ("demo-teacher", 444_448),
        ("demo-student-decoder", 177_024),
        ("demo-teacher-decoder", 505_344),
    ],
)
def test_sizes(name, count):
    assert sum(p.numel() for p in build(name, 263, 0).parameters()) == count


def test_t5_v1_1_small_has_the_true_shape():
    """76,961,152 is the number of parameters of google/t5-v1_1-small. No memory is spent on them."""
    with torch.device("meta"):
        config = T5Config(**PRESETS["t5-v1_1-small"], tie_word_embeddings=False)
        model = T5ForConditionalGeneration(config)
        untie_head(model)
    assert sum(p.numel() for p in model.parameters()) == 76_961_152


@pytest.mark.parametrize("name", T5)
def test_standard_deviations(name):
    model = build(name, 4000, 0)
    d_model = model.config.d_model
    layer = model.encoder.block[0].layer[0]
    assert model.shared.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert layer.SelfAttention.relative_attention_bias.weight.std().item() == pytest.approx(1.5, rel=0.15)
    assert layer.SelfAttention.k.weight.std().item() == pytest.approx(d_model**-0.5, rel=0.05)
    expected = (d_model * model.config.d_kv) ** -0.5
    assert layer.SelfAttention.q.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert torch.equal(layer.layer_norm.weight, torch.ones(d_model))


@pytest.mark.parametrize("name", LLAMA)
def test_decoder_only_presets(name, tmp_path):
    """Tied embeddings of 0.1, matrices of fan_in ** -0.5, norms of 1; saving keeps all of it."""
    model = build(name, 4000, 0, attention_dropout=0.3, eos_token_id=5).eval()
    width, layer = model.config.hidden_size, model.model.layers[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.02)
    for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
        assert linear.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    inner = model.config.intermediate_size
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(inner**-0.5, rel=0.05)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(width))
    assert (model.config.attention_dropout, model.config.eos_token_id) == (0.3, 5)
    model.save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(20)[None]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert not torch.equal(build(name, 4000, 1).lm_head.weight, model.lm_head.weight)


@pytest.fixture
def separate_head(monkeypatch):
    """A small preset with a head of its own: the shipped one has 77 million parameters."""
    shape = {**PRESETS["demo-student"], "feed_forward_proj": "gated-gelu"}
    monkeypatch.setitem(PRESETS, "small", shape)
    monkeypatch.setattr("ibdistill.models.presets.SEPARATE_HEAD", ("small",))
    return build("small", 263, 0)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return T5ForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("name", T5)
def test_tied_head_without_output_scaling_survives_saving(name, tmp_path):
    model = build(name, 263, 0)
    again = reloaded(model, tmp_path)
    for m in (model, again):
        assert not separate(m) and not m.config.scale_decoder_outputs
    assert torch.equal(logits(again), logits(model))


def test_separate_head_stays_so(separate_head, tmp_path):
    model = separate_head
    assert separate(model) and not model.config.scale_decoder_outputs
    assert model.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.03)
    model.tie_weights()
    assert separate(model)
    again = reloaded(model, tmp_path)
    assert separate(again) and not again.config.scale_decoder_outputs
    assert torch.equal(logits(again), logits(model))
    assert again.encoder.embed_tokens.weight is again.shared.weight
    untie_head(again)
    again.resize_token_embeddings(280, mean_resizing=False)
    assert separate(again) and again.lm_head.weight.shape == (280, model.config.d_model)


def test_separate_head_learns_apart_from_the_embeddings(separate_head):
    model = separate_head
    head, shared = model.lm_head.weight.clone(), model.shared.weight.clone()
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=1.0)
    logits(model).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.shared.weight, shared)


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    first = build("demo-student", 263, 7)
    torch.manual_seed(2)
    second, other = build("demo-student", 263, 7), build("demo-student", 263, 8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.shared.weight, other.shared.weight)
    initialise(other, 7)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_overrides():
    model = build("demo-student", 263, 0, dropout_rate=0.25)
    assert model.config.dropout_rate == 0.25 and model.encoder.dropout.p == 0.25


def test_refusals():
    with pytest.raises(ValueError, match="'t5-nano' is not a preset; choose from demo-student"):
        build("t5-nano", 263, 0)
    tied = T5ForConditionalGeneration(T5Config(**PRESETS["demo-student"], vocab_size=50))
    with pytest.raises(ValueError, match="ties its head"):
        untie_head(tied)
