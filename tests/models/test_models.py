"""Students: the forward before the head, fitting tokenizers, adapters, and the whole model under sharding."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from feature_tables import features_of
from tiny_models import ENCODER_DECODER_SHAPES, SHAPES, save, tiny
from torch._subclasses.fake_tensor import FakeTensor
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from ibdistill.config.sections import Config, DataConfig, ObjectiveConfig, StudentConfig
from ibdistill.data import batches, tokenizers
from ibdistill.models import export, families, forward, whole_model
from ibdistill.models import fused as models_fused
from ibdistill.models.student import check_context, check_fit, load_student, with_lora
from ibdistill.objectives.distillation import Distillation
from ibdistill.ops.cpu import attention as cpu_attention
from ibdistill.planning.dryrun import DTYPES, Lengths, Skeleton, student_step

SHAPE = dict(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)


def tied() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(**SHAPE))


def untied() -> T5ForConditionalGeneration:
    model = T5ForConditionalGeneration(T5Config(**SHAPE, tie_word_embeddings=False))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(400, 32))
    return model


def ragged_batch() -> batches.Batch:
    features = features_of([(9, 2, 7), (4, 5, 0), (13, 1, 3)])
    return batches.collate(features, [0, 1, 2], ("predict", "explain"), pad=0, start=0)


@pytest.mark.parametrize("kind", ["untied", *ENCODER_DECODER_SHAPES])
def test_states_through_the_head_are_the_models_own_logits(kind):
    torch.manual_seed(0)
    model = (untied() if kind == "untied" else tiny(kind)).double().eval()
    batch = ragged_batch()
    states = forward.states(model, batch).targets
    for row, stream in enumerate(("predict", "explain")):
        cu = batch.cu[stream].tolist()
        for b in range(3):
            n = cu[b + 1] - cu[b]
            if n == 0:
                continue
            length = int(batch.attention_mask[row * 3 + b].sum())
            alone = model(
                input_ids=batch.input_ids[row * 3 + b : row * 3 + b + 1, :length],
                decoder_input_ids=batch.decoder_input_ids[stream][b : b + 1, :n],
            ).logits[0]
            ours = model.lm_head(states[stream][cu[b] : cu[b + 1]])
            torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("streams", [("predict",), ("predict", "explain")])
def test_question_states_are_the_encoders_own_for_the_predict_stream(streams):
    torch.manual_seed(0)
    model = tied().double().eval()
    features = features_of([(9, 2, 7), (4, 5, 0), (13, 1, 3)])
    batch = batches.collate(features, [0, 1, 2], streams, pad=0, start=0)
    alone = [
        model.get_encoder()(input_ids=torch.tensor(features.questions["predict"][row])[None].long())[0][0]
        for row in range(3)
    ]
    torch.testing.assert_close(forward.states(model, batch).questions, torch.cat(alone), rtol=1e-9, atol=1e-9)
    only = forward.states(model, batch, targets=False)
    torch.testing.assert_close(only.questions, torch.cat(alone), rtol=1e-9, atol=1e-9)
    assert not only.targets


def test_fused_layers_are_the_same_functions_and_leave_no_trace_in_what_is_saved(tmp_path):
    torch.manual_seed(0)
    gated = dict(feed_forward_proj="gated-gelu", dropout_rate=0.0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE, num_decoder_layers=2, **gated)).double()
    batch = ragged_batch()

    def kept_and_gradients() -> tuple[int, list[torch.Tensor]]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            targets = forward.states(model, batch).targets
        total = sum(hidden.square().sum() for hidden in targets.values())
        gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        return sum(kept), [g for g in gradients if g is not None]

    plain_bytes, plain = kept_and_gradients()
    assert models_fused.fused(model) is model
    fused_bytes, fused = kept_and_gradients()
    assert sum(isinstance(m, torch.nn.GELU) for m in model.modules()) == 4
    # transformers' norm takes its mean in fp32 whatever the dtype
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    assert fused_bytes < 0.8 * plain_bytes
    model.save_pretrained(tmp_path)
    assert models_fused.ATTENTION not in (tmp_path / "config.json").read_text()
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    states = forward.states(loaded, batch).targets["explain"]
    torch.testing.assert_close(states, forward.states(model, batch).targets["explain"], rtol=1e-5, atol=1e-6)


def test_attention_with_dropout_is_ours_on_a_cpu_and_torchs_without(monkeypatch):
    """In T5's encoder, its decoder and between the two; ours, when it drops nothing, agrees with SDPA."""
    torch.manual_seed(0)
    model = models_fused.fused(T5ForConditionalGeneration(T5Config(**SHAPE, dropout_rate=0.0))).double()
    batch, rates = ragged_batch(), []
    expected = forward.states(model, batch).targets
    attention = cpu_attention.attention
    monkeypatch.setattr(
        cpu_attention,
        "attention",
        lambda *args, rate, **kw: rates.append(rate) or attention(*args, rate=0.0, **kw),
    )
    forward.states(model, batch)
    assert not rates
    for module in model.modules():
        if isinstance(module, T5Attention):
            module.dropout = 0.25
    found = forward.states(model, batch).targets
    assert rates == [0.25] * 5 * SHAPE["num_layers"]  # the decoder reads two streams
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    forward.states(model.eval(), batch)
    assert len(rates) == 5 * SHAPE["num_layers"]


def test_the_loss_head_shares_the_models_parameter():
    model = untied()
    wrapped = Distillation(model, ObjectiveConfig())
    assert wrapped.head.weight is model.lm_head.weight
    assert sum(p.numel() for p in wrapped.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_tokenizer_with_more_tokens_than_rows_is_refused():
    tokenizer = tokenizers.demo_tokenizer()
    small = T5ForConditionalGeneration(T5Config(**SHAPE | {"vocab_size": 100}))
    with pytest.raises(
        ValueError, match=rf"student.tokenizer has {len(tokenizer)} tokens .* only 100 embedding"
    ):
        check_fit(small, tokenizer)


def test_a_tokenizer_with_other_special_tokens_is_refused():
    tokenizer = copy.deepcopy(tokenizers.demo_tokenizer())
    model = tied()
    model.config.eos_token_id = 3
    with pytest.raises(ValueError, match="eos_token_id 1 but student.model has 3"):
        check_fit(model, tokenizer)


def test_barts_logits_have_no_constant_and_its_layers_are_never_skipped(tmp_path):
    model = tiny("bart")
    model.save_pretrained(tmp_path)
    loaded = families.load_model(str(tmp_path), tokenizers.demo_tokenizer(), setting="student.model")
    assert loaded.get_encoder().layerdrop == 0 and model.get_encoder().layerdrop == 0.3
    model.config.activation_dropout = 0.1
    model.save_pretrained(tmp_path)
    loaded = families.load_model(str(tmp_path), tokenizers.demo_tokenizer(), setting="x", dropout=0.2)
    assert loaded.get_encoder().layers[0].activation_dropout == loaded.get_decoder().dropout == 0.2
    model.final_logits_bias[0, 3] = 0.5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="teacher.model is '.*', which adds a constant final_logits_bias to"):
        families.load_model(str(tmp_path), tokenizers.demo_tokenizer(), setting="teacher.model")


@pytest.mark.parametrize("settings", [{"max_question_tokens": 256}, {"max_rationale_tokens": 257}])
def test_barts_questions_and_targets_each_have_its_positions(settings):
    fits = {"max_question_tokens": 255, "max_label_tokens": 8, "max_rationale_tokens": 256}
    check_context(tiny("bart"), DataConfig(**fits))
    with pytest.raises(ValueError, match="has 256 positions in encoder and decoder, .* need 257; lower data"):
        check_context(tiny("bart"), DataConfig(**fits | settings))


def test_unknown_model_and_tokenizer_names(tmp_path):
    tokenizer = tokenizers.demo_tokenizer()
    with pytest.raises(ValueError, match=r"student.model is '.*nowhere': no preset \(demo-student"):
        load_student(StudentConfig(model=str(tmp_path / "nowhere")), tokenizer, 0)
    with pytest.raises(ValueError, match=r"student.tokenizer is '.*nowhere', which holds no tokenizer"):
        tokenizers.load_tokenizer(str(tmp_path / "nowhere"), "student.tokenizer")


@pytest.mark.parametrize("model_type", ["marian", "pegasus", "t5gemma"])
def test_an_unsupported_family_is_refused_by_name(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    said = f"a '{model_type}' model; supported are t5, mt5, umt5, bart, mbart, plbart"
    with pytest.raises(ValueError, match=said):
        load_student(StudentConfig(model=str(tmp_path)), tokenizers.demo_tokenizer(), 0)


def test_a_local_folder_loads_with_its_weights_or_with_its_shape_only(tmp_path):
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(T5Config(**SHAPE))
    model.save_pretrained(tmp_path)
    tokenizer = tokenizers.demo_tokenizer()
    same = load_student(StudentConfig(model=str(tmp_path)), tokenizer, 0)
    torch.testing.assert_close(same.shared.weight, model.shared.weight, rtol=0, atol=0)
    assert same.training and same.encoder.dropout.training  # dropout is on
    fresh = load_student(StudentConfig(model=str(tmp_path), init="random", dropout=0.3), tokenizer, 0)
    assert fresh.config.d_ff == 64 and fresh.encoder.dropout.p == 0.3
    assert not torch.equal(fresh.shared.weight, model.shared.weight)


def test_lora_trains_adapters_only_and_exports_merged_weights(tmp_path):
    torch.manual_seed(0)
    base = tied()
    base.save_pretrained(tmp_path / "base")
    tokenizer = tokenizers.demo_tokenizer()
    config = StudentConfig(model=str(tmp_path / "base"), lora_rank=4, lora_targets=["q", "v"])
    student = load_student(config, tokenizer, 0)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name and (".q." in name or ".v." in name) for name in trainable)
    batch = ragged_batch()
    before = forward.states(student.eval(), batch).targets["predict"]
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    after = forward.states(student, batch).targets["predict"]
    assert (after - before).abs().max() > 1e-3
    export.write(student, tokenizer, tmp_path / "out", Config())
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(forward.states(loaded, batch).targets["predict"], after, rtol=1e-4, atol=1e-4)


def test_lora_on_layers_that_do_not_exist(tmp_path):
    config = StudentConfig(model="demo-student", lora_rank=4, lora_targets=["nothing_like_this"])
    with pytest.raises(ValueError, match=r"student.lora_targets is \['nothing_like_this'\]"):
        load_student(config, tokenizers.demo_tokenizer(), 0)


@pytest.mark.parametrize(
    ("model_type", "targets", "name"),
    [
        ("llama", ["q_proj", "lm_head"], "lm_head"),
        ("qwen2", ["lm_head"], "lm_head"),
        ("t5", ["q", "shared"], "shared"),
        ("gpt2", ["wte"], "transformer.wte"),
        ("opt", ["embed_tokens"], "model.decoder.embed_tokens"),
    ],
)
def test_adapters_on_the_head_or_the_embeddings_would_not_be_trained(model_type, targets, name):
    config = StudentConfig(lora_rank=4, lora_targets=targets)
    with pytest.raises(
        ValueError, match=f"student.lora_targets is .*, and {name} is the model's head or emb"
    ):
        with_lora(tiny(model_type), config)


@pytest.mark.parametrize("model_type", ["olmo2", "llama"])
def test_all_linear_layers_get_adapters_where_asked_and_where_peft_names_none(model_type):
    targets = ["all-linear"] if model_type == "llama" else []
    adapted = with_lora(tiny(model_type), StudentConfig(lora_rank=4, lora_targets=targets))
    with_adapter = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert with_adapter == {f"{m}_proj" for m in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", [*ENCODER_DECODER_SHAPES, *SHAPES])
def test_the_planner_builds_the_adapters_that_the_student_has(tmp_path, model_type, precision):
    """Without storage; the head and the embeddings stay tied or apart as they are."""
    name = save(tmp_path / model_type, model_type)
    tokenizer = tokenizers.load_tokenizer(name, "student.tokenizer")
    config = StudentConfig(model=name, lora_rank=4, precision=precision)
    student = load_student(config, tokenizer, 0)
    skeleton = Skeleton(name, "student.model", tokenizer, precision, config)
    assert skeleton.sizes() == [(p.numel(), p.requires_grad) for p in student.parameters()]
    assert {p.dtype for p in skeleton.model.parameters()} == {DTYPES[precision]}
    assert all(isinstance(p, FakeTensor) for p in skeleton.model.parameters())
    living = student_step(skeleton, Lengths(4, 20, 5, 12), ObjectiveConfig())
    assert 0 < living.at_head < living.peak


@pytest.mark.parametrize("make", [tied, untied])
def test_the_skeleton_has_structure_and_ties_but_no_weights(make):
    model = make()
    skeleton = whole_model._skeleton(model)
    assert all(p.is_meta for p in skeleton.parameters()) and not any(p.is_meta for p in model.parameters())
    assert (skeleton.lm_head.weight is skeleton.shared.weight) == (
        model.lm_head.weight is model.shared.weight
    )
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_gradient_checkpointing_does_not_change_gradients():
    tokenizer = tokenizers.demo_tokenizer()
    batch = ragged_batch()
    gradients = []
    for checkpointing in (False, True):
        config = StudentConfig(model="demo-student", dropout=0.0, gradient_checkpointing=checkpointing)
        student = load_student(config, tokenizer, 5).double().train()
        batch.input_ids.clamp_(max=len(tokenizer) - 1)
        for ids in batch.decoder_input_ids.values():
            ids.clamp_(max=len(tokenizer) - 1)
        states = forward.states(student, batch).targets
        sum(s.square().sum() for s in states.values()).backward()
        gradients.append(
            {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 30
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_decode_is_greedy_and_keeps_the_order():
    from ibdistill.models.decoding import decode

    tokenizer = tokenizers.demo_tokenizer()
    model = load_student(StudentConfig(model="demo-student"), tokenizer, 3).eval()
    questions = [f"predict: tom had n{i} apples . " + "found n1 coins . " * (7 - i) for i in range(7)]
    together = decode(
        model,
        tokenizer,
        questions,
        max_question_tokens=64,
        max_new_tokens=6,
        device=torch.device("cpu"),
        batch_size=3,
    )
    for question, (text, confidence, first, *_) in zip(questions, together, strict=True):
        ids = tokenizer(question, return_tensors="pt").input_ids
        out, probabilities = [model.config.decoder_start_token_id], []
        for _ in range(6):
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([out])).logits[0, -1]
            out.append(int(np.argmax(logits.detach().numpy())))
            probabilities.append(float(logits.detach().double().softmax(-1)[out[-1]]))
            if out[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(out, skip_special_tokens=True)
        assert confidence == pytest.approx(math.prod(probabilities), rel=1e-5)
        assert first == pytest.approx(probabilities[0], rel=1e-5)
