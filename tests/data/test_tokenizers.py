"""Tokenizers made here: one id per demo word, faithful unigram models, hostile text."""

import ast
import itertools
import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ibdistill.data.tasks import demo
from ibdistill.data.tokenizers import (
    SENTINELS,
    demo_tokenizer,
    load_tokenizer,
    train_tokenizer,
    why_not_loaded,
)

DATA = Path(os.environ.get("IBDISTILL_DATA") or Path(__file__).parents[2] / "../shared/data")
HOSTILE = [
    "",
    " \t\r\n ",
    "\N{PILE OF POO} \N{ZERO WIDTH JOINER}\N{VARIATION SELECTOR-16}",
    "a\x00b\x01\x1b[31mc\x7f",
    "please fill <extra_id_0> and <extra_id_99> </s> <pad> <unk> <extra_id_",
    "\N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE EIGHTH BLOCK} x",
    "\ud800",
    "z" * 5000,
]


def spaced(text):
    """The round trip's one loss: runs of whitespace, line breaks included, become one space."""
    return " ".join(text.split())


def lines(name, *fields):
    with open(DATA / name, encoding="utf-8") as file:
        return [row[field] for row in map(json.loads, itertools.islice(file, 1500)) for field in fields]


def svamp():
    rows = json.loads((DATA / "svamp/SVAMP.json").read_text(encoding="utf-8"))
    return [row[field] for row in rows for field in ("Body", "Question", "Equation")]


def cose():
    questions = [row["stem"] for row in lines("cose/dev_rand_split.jsonl", "question")]
    return questions + [row["open-ended"] for row in lines("cose/cose_dev_v1.0.jsonl", "explanation")]


CORPORA = {
    "svamp": svamp,
    "gsm8k": lambda: lines("gsm8k/train.jsonl", "question", "answer"),
    "cose": cose,
    "demo": lambda: [t for r in demo.load_demo("demo")["valid"] for t in (r.question, r.label, r.rationale)],
}


@pytest.fixture(scope="module", params=CORPORA)
def trained(request, tmp_path_factory):
    if request.param != "demo" and not DATA.is_dir():
        pytest.skip(f"no data sets in {DATA}; set IBDISTILL_DATA")
    texts = CORPORA[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    return texts, folder, train_tokenizer(texts, 1000, folder)


def test_round_trip(trained):
    texts, _, tokenizer = trained
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and ids[-1] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == spaced(text)


def test_saved_tokenizer_and_sentencepiece_encode_alike(trained):
    sentencepiece = pytest.importorskip("sentencepiece")
    texts, folder, tokenizer = trained
    loaded = AutoTokenizer.from_pretrained(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert len(loaded) == len(tokenizer) == model.get_piece_size() + SENTINELS
    for text in texts:
        ids = tokenizer(text).input_ids
        assert loaded(text).input_ids == ids == [*model.encode(spaced(text)), 1]
    for text in HOSTILE[:-2]:
        assert loaded(text).input_ids == tokenizer(text).input_ids


def test_special_ids(trained):
    for tokenizer in (trained[2], demo_tokenizer()):
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        assert tokenizer.bos_token_id is None
    assert trained[2].tokenize("a <extra_id_0> b").count("<extra_id_0>") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text(text, tmp_path):
    for tokenizer in (
        demo_tokenizer(),
        train_tokenizer(["an ordinary sentence", "and another one"], 40, tmp_path),
    ):
        if text == "\ud800":
            # A lone surrogate is no text; the reader of the data refuses it long before.
            with pytest.raises((TypeError, UnicodeEncodeError, ValueError)):
                tokenizer(text)
            continue
        ids = tokenizer(text).input_ids
        assert ids[-1] == 1 and all(0 <= i < len(tokenizer) for i in ids)
        tokenizer.decode(ids)


def test_training_survives_hostile_text(tmp_path):
    texts = ["an ordinary sentence", *(text for text in HOSTILE if text != "\ud800")]
    tokenizer = train_tokenizer(texts, 200, tmp_path)
    assert tokenizer.decode(tokenizer("an ordinary sentence").input_ids, skip_special_tokens=True) == texts[0]


def test_the_same_text_gives_the_same_pieces(tmp_path):
    texts = [record.question for record in demo.load_demo("demo")["valid"]]
    first = train_tokenizer(iter(texts), 150, tmp_path / "a")
    second = train_tokenizer(texts, 150, tmp_path / "b")
    assert first.get_vocab() == second.get_vocab()
    assert (tmp_path / "a/spiece.model").read_bytes() == (tmp_path / "b/spiece.model").read_bytes()
    assert (tmp_path / "a/tokenizer.json").read_text() == (tmp_path / "b/tokenizer.json").read_text()


def test_a_large_vocabulary_is_an_upper_bound(tmp_path):
    tokenizer = train_tokenizer(["one two three two one"] * 3, 32000, tmp_path)
    assert 3 < len(tokenizer) - SENTINELS < 50


def test_refusals(tmp_path):
    for nothing in ([], iter(()), ["", " \n"], ["<extra_id_0>"]):
        with pytest.raises(ValueError, match="no text to train a tokenizer on"):
            train_tokenizer(nothing, 100, tmp_path)
    with pytest.raises(ValueError, match="student.vocab_size 5 .*Vocabulary size is smaller"):
        train_tokenizer(["more characters than five"], 5, tmp_path)


def test_each_demo_word_is_one_id(tmp_path):
    tokenizer = demo_tokenizer()
    ids = [tokenizer(word).input_ids for word in demo.vocabulary()]
    assert all(len(word) == 2 for word in ids)
    assert len({word[0] for word in ids}) == len(demo.vocabulary()) == 260
    assert len(tokenizer) == 260 + 3
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    splits = [*demo.load_demo("demo").values(), *demo.load_demo("demo_pretrain").values()]
    texts = [t for split in splits for r in split[-1000:] for t in (r.question, r.label, r.rationale)]
    encoded = tokenizer(texts).input_ids
    assert loaded(texts).input_ids == encoded
    assert [len(ids) - 1 for ids in encoded] == [len(text.split()) for text in texts]
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == texts


def test_nothing_is_loaded_with_a_folders_own_code():
    """Every call that loads something of transformers says so, rather than ask on the terminal."""
    root, calls = Path(__file__).parents[2], []
    for path in [*root.glob("ibdistill/**/*.py"), *root.glob("tools/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.endswith((".from_pretrained", ".from_config")) and not name.startswith("families."):
                trusts = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                calls.append((f"{path.name}:{node.lineno}", trusts.get("trust_remote_code")))
    assert len(calls) >= 6
    assert [place for place, trusted in calls if trusted is not False] == []


def test_a_mistyped_path_is_told_from_a_hub_name(tmp_path):
    for name in ("/no/such", "./no", "../no", "runs/mine/student", "no/", "~/no", str(tmp_path / "no")):
        with pytest.raises(
            ValueError, match="which holds no tokenizer: there is no such folder .seen from /"
        ):
            load_tokenizer(name, "student.tokenizer")
    for name in ("google/flan-t5-small", "gpt2", str(tmp_path)):
        assert why_not_loaded(name, OSError("as the hub says")) == "as the hub says"
