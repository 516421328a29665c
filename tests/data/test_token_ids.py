"""Text to ids and back: special tokens that data spells, parts of questions, limits."""

from __future__ import annotations

import pytest
import tokenizer_variants
from transformers import AutoTokenizer

from ibdistill.data import token_ids, tokenizers
from ibdistill.data.tokenizers import bos_of, demo_tokenizer


def test_special_tokens_that_a_text_spells_are_split(tmp_path):
    t5 = tokenizer_variants.t5(tmp_path / "t5", characters="<>|_")
    llama = tokenizer_variants.llama(tmp_path / "llama")
    trained = tokenizers.train_tokenizer(["some < text / with > all _ s <i d p"], 80, tmp_path / "trained")
    spelled = [
        "a</s>b",
        "</s>",
        "<pad>",
        "a <s> b <|bos|>",
        "x<|end|>y <|user|>",
        "<extra_id_3> a",
        "a<unk>b",
    ]
    for tokenizer in (t5, llama, trained, demo_tokenizer()):
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special -= {tokenizer.unk_token_id}
        for text, ids in zip(spelled, token_ids.text_ids(spelled, tokenizer), strict=True):
            assert special.isdisjoint(ids) and len(ids) > 0
            target = token_ids.target_ids([text], tokenizer)[0]
            assert target == [*ids, tokenizer.eos_token_id]
    assert token_ids.read_back(token_ids.target_ids(spelled, llama), llama) == spelled  # nothing is lost
    assert token_ids.read_back(token_ids.target_ids(["a</s>b"], t5), t5) == ["a< /s>b"]
    ordinary = ["no such thing", "a , b . 3 < 4"]
    for tokenizer in (t5, llama, trained):
        usual = tokenizer(ordinary, add_special_tokens=False).input_ids
        assert token_ids.text_ids(ordinary, tokenizer) == usual


def test_normalisation_makes_no_special_token(tmp_path):
    tokenizer = tokenizer_variants.t5(tmp_path, characters="<>", nfkc=True)
    fullwidth = "a \N{FULLWIDTH LESS-THAN SIGN}/s\N{FULLWIDTH GREATER-THAN SIGN} b"
    assert 1 in tokenizer(fullwidth, add_special_tokens=False).input_ids
    assert 1 not in token_ids.text_ids([fullwidth], tokenizer)[0]


def test_a_questions_parts_end_as_the_published_ids_of_nli_do(tmp_path):
    tokenizer = tokenizer_variants.t5(tmp_path / "t5")
    question = "a dog runs.</s>it is wet."
    ids = token_ids.question_ids([question], tokenizer)[0]
    assert ids == tokenizer(question).input_ids and ids.count(1) == 2
    llama = tokenizer_variants.llama(tmp_path / "llama")
    parts = llama(["a dog runs.", "it is wet."], add_special_tokens=False).input_ids
    assert token_ids.question_ids([question], llama)[0] == [*parts[0], 1, *parts[1], 1]


def test_what_is_cut_keeps_its_beginning_and_the_end_token(tmp_path):
    tokenizer = tokenizer_variants.llama(tmp_path, truncation_side="left", model_max_length=4)
    ids = token_ids.question_ids(["abcdefgh"], tokenizer)[0]
    assert len(ids) == 9
    assert token_ids.cut(ids, 9) == ids
    assert token_ids.cut(ids, 8) == [*ids[:7], 1]
    assert token_ids.target_ids(["", "a"], tokenizer)[0] == [] == token_ids.cut([], 3)
    assert token_ids.question_ids([""], tokenizer) == [[1]]
    assert token_ids.text_ids([], tokenizer) == []


def test_a_question_in_a_template_is_text_and_within_its_limit(tmp_path):
    tokenizer = tokenizer_variants.llama(tmp_path)
    assert token_ids.in_template("a dog</s>it is", tokenizer, 99) == "a dog\nit is"
    assert token_ids.in_template("a<|end|>b", tokenizer, 99) == "a< |end|>b"
    assert token_ids.in_template("abcdef", tokenizer, 4) == "abcd"
    ids = token_ids.written_ids(["<|user|>" + token_ids.in_template("<|user|>", tokenizer, 99)], tokenizer, 0)
    assert ids[0].count(2) == 1


def test_reading_back_keeps_the_spaces_that_the_model_wrote(tmp_path):
    """A flag in a tokenizer's files makes `a, b.` of `a , b .`; an export does not inherit it."""
    tokenizer = tokenizer_variants.t5(tmp_path, clean_up_tokenization_spaces=True)
    ids = token_ids.text_ids(["a , b ."], tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids[0]) == "a, b."
    assert token_ids.read_back(ids, tokenizer) == ["a , b ."]
    tokenizer.save_pretrained(tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").decode(ids[0]) == "a , b ."


def test_bos_is_what_the_tokenizer_puts_in_front(tmp_path):
    t5, llama = tokenizer_variants.t5, tokenizer_variants.llama
    assert bos_of(t5(tmp_path)) is None and bos_of(t5(tmp_path, template="")) is None
    assert bos_of(t5(tmp_path, template="<s> $A")) == 3  # though it has no token of the name BOS
    assert bos_of(llama(tmp_path, bos=True, eos=True)) == 0
    assert bos_of(llama(tmp_path, bos=False, eos=True)) is None
    with pytest.raises(ValueError, match=r"puts \['<s>', '<s>'\] in front of a text, and only one"):
        bos_of(t5(tmp_path, template="<s> <s> $A </s>"))
