"""Decoding asks a model in the ids that it was trained with, whatever its tokenizer adds, cuts or pads."""

from __future__ import annotations

import pytest
import tokenizer_variants
import torch
from tiny_models import tiny

from ibdistill.config.sections import DataConfig
from ibdistill.data import batches
from ibdistill.data.records import Record
from ibdistill.data.tokenizing import tokenize
from ibdistill.models import decoding, families, forward

QUESTIONS = [
    "tom had 3 apples",
    "a",
    "he found 4 more , " * 4 + "how many ?",
    "one premise</s>one hypothesis",
]
PREFIXES = {"t": {"predict": "predict: ", "explain": "explain: "}}
LIMIT = 24
ENCODER_DECODER = [
    ({}, []),
    ({"template": ""}, []),
    ({"template": "<s> $A </s>"}, [3]),
    ({"template": "<s> $A"}, [3]),
    ({"truncation_side": "left"}, []),
    ({"padding_side": "left", "model_max_length": 8}, []),
    ({"nfkc": True, "clean_up_tokenization_spaces": True}, []),
]
DECODER_ONLY = [
    ({"bos": False}, []),
    ({"bos": True}, [0]),
    ({"bos": True, "eos": True}, [0]),
    ({"bos": False, "eos": True}, []),
    ({"bos": True, "truncation_side": "left"}, [0]),
    ({"bos": True, "eos": True, "padding_side": "right", "model_max_length": 8}, [0]),
]


def family_of(kind, tmp_path, variant):
    """A tokenizer and a tiny model for it."""
    if kind == "t5":
        tokenizer = tokenizer_variants.t5(tmp_path, **variant)
        return tokenizer, tiny("t5", vocab_size=len(tokenizer), eos_token_id=1)
    tokenizer = tokenizer_variants.llama(tmp_path, **variant)
    return tokenizer, tiny(kind, vocab_size=len(tokenizer))


def asked(model, tokenizer, texts, **kwargs):
    """The answers to `texts` one by one, and the ids that `generate` got for each."""
    seen, generate = [], model.generate

    def record(input_ids, attention_mask, **settings):
        assert attention_mask.all()
        seen.append(input_ids[0].tolist())
        return generate(input_ids=input_ids, attention_mask=attention_mask, **settings)

    model.generate = record
    limits = dict(max_question_tokens=LIMIT, max_new_tokens=3, device=torch.device("cpu"), **kwargs)
    answers = [decoding.decode(model, tokenizer, [text], **limits)[0] for text in texts]
    model.generate = generate
    return answers, seen


@pytest.mark.parametrize(
    ("kind", "variant", "lead"),
    [("t5", *case) for case in ENCODER_DECODER] + [("llama", *case) for case in DECODER_ONLY],
)
def test_decoding_asks_in_the_ids_of_training(tmp_path, kind, variant, lead):
    tokenizer, model = family_of(kind, tmp_path, variant)
    records = [Record(f"r{i}", "t", question, "4", "", gold="4") for i, question in enumerate(QUESTIONS)]
    features = tokenize(records, PREFIXES, tokenizer, DataConfig(max_question_tokens=LIMIT))
    batch = batches.collate(features, range(len(records)), ("predict",), **families.layout(model, tokenizer))
    answers, seen = asked(model, tokenizer, ["predict: " + question for question in QUESTIONS])
    with torch.no_grad():
        states = forward.states(model, batch)
    end = tokenizer.eos_token_id
    for i, ids in enumerate(seen):
        width = batch.input_ids.shape[1]
        first = batch.cu["predict"][i]
        if kind == "llama":  # the row's target follows
            trained = batch.input_ids[i, : int(batch.positions["predict"][first]) % width + 1].tolist()
            assert end not in ids
        else:
            trained = batch.input_ids[i][batch.attention_mask[i] == 1].tolist()
            assert ids[-1] == end
        assert ids == trained
        assert ids[: len(lead)] == lead and ids[len(lead)] not in (0, 3) and len(ids) <= LIMIT + len(lead)
        # and so the answer's first token has the probability that training raises
        head = model.get_output_embeddings()(states.targets["predict"][first])
        assert answers[i].first_confidence == pytest.approx(float(head.detach().softmax(-1).max()), rel=1e-4)
    assert len(seen[2]) == LIMIT + len(lead)  # the long one loses its end, not its beginning
    assert tokenizer.decode(seen[2], skip_special_tokens=True).startswith("predict: he found")
    together = decoding.decode(
        model,
        tokenizer,
        ["predict: " + question for question in QUESTIONS],
        max_question_tokens=LIMIT,
        max_new_tokens=3,
        device=torch.device("cpu"),
    )
    assert [answer.text for answer in together] == [answer.text for answer in answers]


@pytest.mark.parametrize("variant", [{"template": "<s> $A </s>"}, {"template": ""}])
def test_the_question_states_leave_bos_out(tmp_path, variant):
    tokenizer, model = family_of("t5", tmp_path, variant)
    records = [Record(f"r{i}", "t", question, "4", "", gold="4") for i, question in enumerate(QUESTIONS)]
    features = tokenize(records, PREFIXES, tokenizer, DataConfig())
    batch = batches.collate(features, range(4), ("predict", "explain"), **families.layout(model, tokenizer))
    ids = batch.input_ids[:4].flatten()[batch.question_positions]
    assert ids.tolist() == features.questions["predict"].flat.tolist()


@pytest.mark.parametrize(("variant", "lead"), DECODER_ONLY)
def test_a_teachers_prompt_has_its_bos_once_and_no_end_token(tmp_path, variant, lead):
    tokenizer, model = family_of("llama", tmp_path, variant)
    bare = [ids[0] for ids in tokenizer([*"Q: a\nA:"], add_special_tokens=False).input_ids]
    for text, expected in (
        ("Q: a\nA:", [*lead, *bare]),
        ("<|user|>a<|end|>\n", [*lead, 2, bare[3], 1, bare[4]]),  # what the template itself says is obeyed
        ("Q: a\nA:<|end|>", [*lead, *bare]),
    ):
        assert asked(model, tokenizer, [text], as_written=True)[1] == [expected]
    if lead:
        assert asked(model, tokenizer, ["<|bos|>Q: a\nA:"], as_written=True)[1] == [[*lead, *bare]]


@pytest.mark.parametrize("template", ["", "$A </s>", "<s> $A </s>"])
def test_an_encoder_decoder_teachers_prompt_ends_with_one_end_token(tmp_path, template):
    tokenizer, model = family_of("t5", tmp_path, {"template": template})
    bare = tokenizer("q: a", add_special_tokens=False).input_ids
    for text in ("q: a", "q: a</s>"):
        lead = [3] if "<s>" in template else []
        assert asked(model, tokenizer, [text], as_written=True)[1] == [[*lead, *bare, 1]]
