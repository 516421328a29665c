"""Decoder-only models: batches, states, loss, decoding and loading, on every supported type."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from feature_tables import features_of, random_features
from tiny_models import QUESTION, SHAPES, TEXTS, byte_tokenizer, save, tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from ibdistill.config.sections import Config, DataConfig, ObjectiveConfig, StudentConfig
from ibdistill.data import batches, id_rows, tokenizers
from ibdistill.data.records import Record
from ibdistill.data.sampler import Sampler
from ibdistill.data.tokenizing import tokenize
from ibdistill.models import decoding, export, families, forward
from ibdistill.models.architectures import softcap
from ibdistill.models.student import check_context, check_fit, load_model, load_student
from ibdistill.objectives import distillation, weights
from ibdistill.ops.head_loss.softcap import capped

STREAMS = ("predict", "explain")


def answers(*args, **kwargs) -> list[str]:
    return [answer.text for answer in decoding.decode(*args, **kwargs)]


@pytest.fixture
def folder(tmp_path):
    """Saves a model and its tokenizer for `from_pretrained`; gives the folder and the tokenizer."""

    def make(model_type: str = "llama", *, bos: bool = False, **overrides):
        name = save(tmp_path / f"{model_type}-{bos}", model_type, bos=bos, **overrides)
        return name, tokenizers.load_tokenizer(name, "student.tokenizer")

    return make


def test_every_decoder_only_type_is_tested():
    types = {t for t, kind in families.FAMILIES.items() if kind.family == families.DECODER_ONLY}
    assert set(SHAPES) == types


def test_collate_puts_prompt_and_target_in_one_row():
    features = features_of([(3, 2, 0), (4, 1, 4)])
    batch = batches.collate(features, [0, 1], STREAMS, pad=0, start=7, separator=5)
    assert batch.input_ids.tolist() == [
        [7, 10, 11, 5, 10, 0, 0, 0],
        [7, 110, 111, 112, 5, 0, 0, 0],
        [7, 10, 11, 5, 0, 0, 0, 0],
        [7, 110, 111, 112, 5, 110, 111, 112],
    ]
    assert batch.attention_mask.sum(1).tolist() == [5, 5, 4, 8]
    assert batch.positions["predict"].tolist() == [3, 4, 12]
    assert batch.positions["explain"].tolist() == [12, 13, 14, 15]
    assert batch.question_positions.tolist() == [1, 2, 3, 9, 10, 11, 12]
    assert batch.labels["explain"].tolist() == [110, 111, 112, 113]
    assert batch.num_tokens == 22 and batch.num_positions == 32
    assert batch.to(torch.device("cpu")).decoder_input_ids == {}
    bare = batches.collate(features, [0, 1], ("predict",), pad=0, start=None, separator=5)
    assert bare.input_ids.tolist() == [[10, 11, 5, 10], [110, 111, 112, 5]]
    assert bare.positions["predict"].tolist() == [2, 3, 7]
    assert bare.question_positions.tolist() == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("streams", [("predict",), STREAMS])
def test_both_families_get_the_same_labels_and_question_tokens(bos, streams):
    features, rows = random_features(30), [4, 17, 9, 22, 1]
    seq2seq = batches.collate(features, rows, streams, pad=0, start=0)
    decoder_only = batches.collate(features, rows, streams, pad=0, start=bos, separator=5)
    for stream in streams:
        assert torch.equal(seq2seq.labels[stream], decoder_only.labels[stream])
        assert torch.equal(seq2seq.cu[stream], decoder_only.cu[stream])
        assert len(decoder_only.positions[stream]) == len(decoder_only.labels[stream])
    theirs, ours = (b.input_ids[: len(rows)].flatten()[b.question_positions] for b in (seq2seq, decoder_only))
    ends = np.cumsum([len(features.questions["predict"][row]) for row in rows]) - 1
    assert (ours[ends] == 5).all()
    ours[ends] = theirs[ends]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("model_type", SHAPES)
def test_states_through_the_head_are_the_models_own_logits(model_type, bos):
    """In a ragged batch with an empty rationale, against each row alone and unpadded; fp64."""
    model = tiny(model_type).double()
    close = dict.fromkeys(
        ("rtol", "atol"), 1e-4 if model_type == "gemma2" else 1e-9
    )  # its softmax is in fp32
    features = features_of([(9, 2, 7), (4, 5, 0), (13, 1, 3)])
    batch = batches.collate(features, [0, 1, 2], STREAMS, pad=0, start=bos, separator=5)
    states = forward.states(model, batch)
    lead = [] if bos is None else [bos]
    questions = []
    for stream in STREAMS:
        cu = batch.cu[stream].tolist()
        for b in range(3):
            prompt = [*lead, *features.questions[stream][b][:-1], 5]
            row = torch.tensor([[*prompt, *features.targets[stream][b]]])
            alone = model(input_ids=row, output_hidden_states=True, use_cache=False)
            expected = alone.logits[0, len(prompt) - 1 : -1]
            ours = model.get_output_embeddings()(states.targets[stream][cu[b] : cu[b + 1]])
            ours = capped(ours, softcap(model.config))
            assert len(ours) == len(features.targets[stream][b])
            torch.testing.assert_close(ours, expected, **close)
            if stream == "predict":
                hidden = model.get_decoder()(input_ids=row, use_cache=False)[0]
                questions.append(hidden[0, len(lead) : len(prompt)])
    assert ours.std() > 0.1
    torch.testing.assert_close(states.questions, torch.cat(questions), **close)
    only = forward.states(model, batch, targets=False).questions
    torch.testing.assert_close(only, torch.cat(questions), **close)


@pytest.mark.parametrize("method", ["finetune", "dss"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2"])
def test_loss_and_gradients_equal_transformers_own_on_masked_prompts(model_type, method):
    """transformers computes its loss in fp32, hence the tolerances."""
    model = tiny(model_type, vocab_size=5000).double()
    objective = ObjectiveConfig(method=method, alpha=0.3)
    features = random_features(40)
    plan = Sampler(features, DataConfig(), batch_size=6, seed=0)
    streams = weights.streams_of(objective)
    batch = batches.collate(features, plan.step(0), streams, pad=0, start=3, separator=5)
    wrapped = distillation.Distillation(model, objective)
    loss, _ = wrapped(batch, weights.step_weights(objective, plan.counts(0)))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    expected = 0.0
    for stream, weight in zip(streams, (1.0,) if method == "finetune" else (0.3, 0.7), strict=True):
        prompts = [[3, *features.questions[stream][row][:-1], 5] for row in plan.step(0)]
        rows = [
            p + features.targets[stream][row].tolist() for p, row in zip(prompts, plan.step(0), strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = ids.masked_fill(mask == 0, -100)
        for b, prompt in enumerate(prompts):
            labels[b, : len(prompt)] = -100
        expected = expected + weight * model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=2e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bos", [False, True])
def test_training_rows_begin_with_the_prompt_that_decoding_uses(bos):
    tokenizer = byte_tokenizer(bos=bos)
    records = [Record(f"r{i}", "t", "word " * (3 + 9 * i), "yes", "as it is", gold="yes") for i in range(3)]
    config = DataConfig(max_question_tokens=40)
    features = tokenize(records, {"t": {"predict": "predict: ", "explain": "explain: "}}, tokenizer, config)
    newline = tokenizer.convert_tokens_to_ids("\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}")
    layout = families.layout(tiny("llama"), tokenizer)
    assert layout == {"pad": tokenizer.pad_token_id, "start": 1 if bos else None, "separator": newline}
    layout["pad"] = tokenizer.eos_token_id
    batch = batches.collate(features, [0, 1, 2], ("predict",), **layout)
    ids, mask = id_rows.prompts([f"predict: {r.question}" for r in records], tokenizer, 40, **layout)
    assert mask.sum(1).tolist()[2] == 40 + bos and mask.sum(1).min() < 40
    for b in range(3):
        first = int(batch.positions["predict"][batch.cu["predict"][b]]) - b * batch.input_ids.shape[1]
        assert batch.input_ids[b, : first + 1].tolist() == ids[b, mask[b] == 1].tolist()
        assert mask[b, -1] == 1 and ids[b, -1] == newline


def test_a_vocabulary_without_newline_separates_by_the_end_token():
    tokenizer = tokenizers.demo_tokenizer()
    layout = families.layout(tiny("llama"), tokenizer)
    assert layout == {"pad": 0, "start": None, "separator": tokenizer.eos_token_id}


def test_llamas_sentencepiece_tokenizer_brings_its_bos_and_a_newline_byte():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    for bos in (False, True):
        tokenizer = LlamaTokenizer(vocab=vocab, merges=[("\u2581", "a")], add_bos_token=bos)
        assert len(tokenizer("\n", add_special_tokens=False).input_ids) == 2  # a space comes first
        assert tokenizers.separator_of(tokenizer) == vocab["<0x0A>"]
        assert tokenizers.bos_of(tokenizer) == (1 if bos else None)


def greedy(model, ids: list[int], steps: int, end: int) -> list[int]:
    said = []
    while len(said) < steps and end not in said:
        with torch.no_grad():
            said.append(int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2", "mistral"])
def test_decoding_is_greedy_in_batches_and_alone(folder, model_type, bos):
    name, tokenizer = folder(model_type, bos=bos)
    assert tokenizer.pad_token == ("<|endoftext|>" if model_type == "qwen2" else tokenizer.eos_token)
    model = load_student(StudentConfig(model=name), tokenizer, 0).eval()
    ends = [" and found 4" * (7 - i) + QUESTION[: 3 * i] for i in range(7)]
    questions = [f"predict: tom had {i} apples{end}" for i, end in enumerate(ends)]
    limits = dict(max_question_tokens=64, max_new_tokens=9, device=torch.device("cpu"))
    together = answers(model, tokenizer, questions, **limits, batch_size=3)
    assert len(set(together)) > 3
    for question, text in zip(questions, together, strict=True):
        assert answers(model, tokenizer, [question], **limits) == [text]
        ids = tokenizer(question, add_special_tokens=False).input_ids[:63]
        newline = tokenizer("\n", add_special_tokens=False).input_ids
        said = greedy(model, [1] * bos + ids + newline, 9, tokenizer.eos_token_id)
        assert text == tokenizer.decode(said, skip_special_tokens=True)


def test_a_published_models_sampling_settings_do_not_reach_decoding(folder):
    name, tokenizer = folder("qwen2")
    limits = dict(max_question_tokens=64, max_new_tokens=24, device=torch.device("cpu"))
    plain = answers(load_model(name, tokenizer, setting="x"), tokenizer, TEXTS, **limits)
    settings = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "eos_token_id": [0, 7, 9]}
    with open(f"{name}/generation_config.json", "w") as file:
        json.dump(settings, file)
    loaded = load_model(name, tokenizer, setting="x")
    assert answers(loaded, tokenizer, TEXTS, **limits) == plain
    theirs = AutoModelForCausalLM.from_pretrained(name)
    assert answers(theirs, tokenizer, TEXTS, **limits) != plain  # the settings do matter


@pytest.mark.parametrize(("model_type", "field"), [("gpt2", "resid_pdrop"), ("llama", "attention_dropout")])
def test_a_local_folder_loads_with_its_weights_or_with_its_shape_only(folder, model_type, field):
    name, tokenizer = folder(model_type)
    same = load_student(StudentConfig(model=name), tokenizer, 0)
    original = AutoModelForCausalLM.from_pretrained(name)
    assert same.training and same.dtype == torch.float32
    embeddings = [m.get_input_embeddings().weight for m in (same, original)]
    assert torch.equal(*embeddings)
    fresh = load_student(StudentConfig(model=name, init="random", dropout=0.3), tokenizer, 0)
    assert getattr(fresh.config, field) == 0.3 and fresh.config.hidden_size == 32
    assert not torch.equal(fresh.get_input_embeddings().weight, embeddings[1])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2"])
def test_lora_trains_adapters_and_the_export_says_the_same(folder, tmp_path, model_type):
    name, tokenizer = folder(model_type, bos=True)
    student = load_student(StudentConfig(model=name, lora_rank=4), tokenizer, 0).eval()
    trainable = [n for n, p in student.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n for n in trainable)
    limits = dict(max_question_tokens=64, max_new_tokens=9, device=torch.device("cpu"))
    before = answers(student, tokenizer, TEXTS, **limits)
    torch.manual_seed(1)
    with torch.no_grad():
        for n, parameter in student.named_parameters():
            if "lora_B" in n:
                parameter.normal_()
    after = answers(student, tokenizer, TEXTS, **limits)
    assert after != before
    export.write(student, tokenizer, tmp_path / "out", Config())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert answers(loaded, again, TEXTS, **limits) == after


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2"])
def test_gradient_checkpointing_does_not_change_gradients(folder, model_type):
    name, tokenizer = folder(model_type)
    features = features_of([(9, 2, 7), (4, 5, 0), (13, 1, 3)])
    batch = batches.collate(features, [0, 1, 2], STREAMS, pad=0, start=None, separator=5)
    gradients = []
    for on in (False, True):
        config = StudentConfig(model=name, gradient_checkpointing=on, dropout=0.0)
        student = load_student(config, tokenizer, 0).double()
        assert bool(student.is_gradient_checkpointing) == on
        sum(s.square().sum() for s in forward.states(student, batch).targets.values()).backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 15
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2"])
def test_a_compiled_student_says_the_same(folder, monkeypatch, model_type):
    """Through dynamo only; inductor's C++ would take minutes to build on two cores."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend="eager", **kw)
    )
    name, tokenizer = folder(model_type)
    eager, compiled = (
        load_student(StudentConfig(model=name, compile=on), tokenizer, 0).eval() for on in (False, True)
    )
    assert compiled.get_decoder()._compiled_call_impl and not eager.get_decoder()._compiled_call_impl
    for lengths in ([(9, 2, 7), (4, 5, 0)], [(13, 1, 3), (6, 2, 2), (5, 5, 20)]):
        batch = batches.collate(
            features_of(lengths), range(len(lengths)), STREAMS, pad=0, start=None, separator=5
        )
        with torch.no_grad():
            ours, expected = (forward.states(m, batch).targets["explain"] for m in (compiled, eager))
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gemma2", "final_logit_softcapping": 0.0},
            "final_logit_softcapping '0.0' in its con",
        ),
        ({"model_type": "cohere", "logit_scale": None}, "which has logit_scale 'None' in its config.json"),
        ({"model_type": "granite", "logits_scaling": -8.0}, "it must be a positive number: take it from the"),
        ({"model_type": "bloom"}, "a 'bloom' model; supported are t5, mt5, umt5, bart, mbart, plbart"),
    ],
)
def test_models_that_the_loss_would_get_wrong_are_refused_by_name(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_student(StudentConfig(model=str(tmp_path)), byte_tokenizer(), 0)
    with pytest.raises(ValueError, match="teacher.model is"):
        families.load_config(str(tmp_path), "teacher.model")


def test_targets_need_an_end_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="student.tokenizer has no end-of-sequence token"):
        check_fit(tiny("gpt2"), tokenizer)


def test_questions_and_targets_must_fit_the_positions():
    model = tiny("gpt2")
    config = DataConfig(max_question_tokens=191, max_label_tokens=4, max_rationale_tokens=64)
    check_context(model, config)
    config.max_question_tokens = 192
    with pytest.raises(
        ValueError, match="has 256 positions.* need 257; lower data.max_question_tokens to 191"
    ):
        check_context(model, config)
    config.max_rationale_tokens = 256
    with pytest.raises(ValueError, match="need 449; lower data.max_rationale_tokens or data.max_label"):
        check_context(model, config)
    seq2seq = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1))
    check_context(seq2seq, DataConfig(max_question_tokens=100_000))
    assert families.family(seq2seq) == families.ENCODER_DECODER


def with_token(tokenizer, token: str):
    tokenizer.add_tokens([token])
    return tokenizer


def test_padding_rows_are_no_difference_between_vocabularies():
    student, teacher = byte_tokenizer(), byte_tokenizer()
    size = len(student)
    assert tokenizers.check_vocabularies(student, teacher, size, size) == size
    assert tokenizers.check_vocabularies(student, teacher, size + 28, size) == size
    assert tokenizers.check_vocabularies(student, teacher, size + 28, size + 156) == size + 28
    sentencepiece = tokenizers.demo_tokenizer()
    assert tokenizers.check_vocabularies(sentencepiece, sentencepiece, 300, 320) == 300


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            byte_tokenizer(),
            with_token(byte_tokenizer(), "<tool>"),
            r"has {n} tokens \(student.model 500 rows\), the teacher's {m} \(600 rows\), and 1 ids differ. "
            r"The first is {n}: nothing for the student, '<tool>' for the teacher. Choose a teacher.*"
            "Or give the larger tokenizer as student.tokenizer",
        ),
        (
            with_token(byte_tokenizer(), "<one>"),
            with_token(byte_tokenizer(), "<two>"),
            "1 ids differ. The first is {n}: '<one>' for the student, '<two>' for the teacher. .*"
            "distil through the teacher's text",
        ),
        (tokenizers.demo_tokenizer(), byte_tokenizer(), "first is 0: '<pad>' for the student, '<.end.>' for"),
    ],
)
def test_other_vocabularies_are_refused_with_the_first_difference(student, teacher, message):
    n = len(byte_tokenizer())
    with pytest.raises(ValueError, match=message.format(n=n, m=n + 1)):
        tokenizers.check_vocabularies(student, teacher, 500, 600)


def test_tokens_beyond_the_shared_rows_are_refused():
    tokenizer = byte_tokenizer()
    last = len(tokenizer) - 1
    with pytest.raises(ValueError, match=f": 1 tokens, from {last}, .* among the {last} shared rows"):
        tokenizers.check_vocabularies(tokenizer, tokenizer, 500, last)


def test_another_end_token_is_refused():
    base, instructed = byte_tokenizer(), byte_tokenizer()
    instructed.eos_token = "<|begin|>"
    with pytest.raises(ValueError, match=r"'<\|end\|>' \(0\), the teacher's with '<\|begin\|>' \(1\)"):
        tokenizers.check_vocabularies(base, instructed, 500, 500)
