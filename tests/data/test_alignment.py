"""Which tokens of two tokenizers stand for the same text, and where both end one."""

from __future__ import annotations

import itertools
import random

import aligned_tokenizers
import pytest
from chat_tokenizers import qwen, smollm2
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as cores
from transformers import PreTrainedTokenizerFast

from ibdistill.data import alignment, token_ids
from ibdistill.data.alignment import END, pieces_of, shared, spans, text_for
from ibdistill.data.tokenizers import demo_tokenizer

TEXTS = [
    "start 3 . found means + 4 .",
    "found",
    "",
    "found  two\n\nspaces \t and lines\n",
    "na\u00efve caf\u00e9 \u6771\u4eac \U0001f642\U0001f642 done",
    "<pad> </s> <|end|>",
    " leading and trailing ",
]
TOKENIZERS = {
    "bytes": aligned_tokenizers.byte_level(
        words=160, merged=("caf\u00e9 found", "\u6771\u4eac \u6771\u4eac")
    ),
    "longer": aligned_tokenizers.byte_level(words=400, merged=("start 3 .",) * 3),
    "fallback": aligned_tokenizers.fallback("caf\u00e9"),
    "bos": aligned_tokenizers.fallback(bos=True),
}
PIECES = {name: pieces_of(tokenizer, "student.tokenizer") for name, tokenizer in TOKENIZERS.items()}


def sides(text: str, mine: str, yours: str) -> tuple[list[int], list[int], list[bytes], list[bytes]]:
    """The student's tokens of a text and the teacher's of what these say, and what they stand for."""
    [ids] = token_ids.target_ids([text], TOKENIZERS[mine])
    raw = b"".join(PIECES[mine].of(ids))
    again = text_for(raw, PIECES[mine], PIECES[yours], begins_target=True)
    [others] = token_ids.target_ids([again], TOKENIZERS[yours])
    return ids, others, PIECES[mine].of(ids), PIECES[yours].of(others)


def shortest(mine: list[bytes], yours: list[bytes]) -> list[tuple[int, int, int, int]]:
    """Spans by comparing every beginning of the one side with every beginning of the other."""
    found, last = [], (0, 0)
    for i in range(1, len(mine) + 1):
        for j in range(1, len(yours) + 1):
            same = b"".join(mine[:i]) == b"".join(yours[:j])
            if same and i > last[0] and j > last[1]:
                found.append((last[0], i, last[1], j))
                last = i, j
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_bytes_of_the_text(name):
    for text in TEXTS:
        text = token_ids.defused(text, TOKENIZERS[name])
        [ids] = token_ids.text_ids([text], TOKENIZERS[name])
        said = b"".join(PIECES[name].of(ids)).decode()
        assert said == (" " + text if PIECES[name].spaced and text else text)
    assert PIECES[name].spaced == (name in ("fallback", "bos"))


@pytest.mark.parametrize(("mine", "yours"), itertools.product(TOKENIZERS, repeat=2))
def test_spans_are_the_shortest_whose_ends_lie_at_the_same_byte(mine, yours):
    for text in TEXTS:
        ids, others, left, right = sides(text, mine, yours)
        found = spans(left, right)
        if alignment.begins(left, right):  # the space that one side has in front is no text
            left, right = ([s[0].removeprefix(b" "), *s[1:]] if PIECES[n].spaced else s
                           for n, s in ((mine, left), (yours, right)))  # fmt: skip
        if all(left) and all(right):  # else one token is that space alone, and stands for nothing
            assert found == shortest(left, right)
        if text:
            assert found[-1][1::2] == (len(ids), len(others))  # the end tokens meet
            assert left[-1] == right[-1] == END
        for a, b, c, d in found:
            if "<" not in text:  # each side breaks up its own special tokens that a text spells
                assert b"".join(left[a:b]) == b"".join(right[c:d])
        if mine == yours:
            assert found == [(i, i + 1, i, i + 1) for i in range(len(ids))]


def test_random_cuts_of_a_text_align():
    generator = random.Random(0)
    for _ in range(200):
        text = bytes(generator.choice(b"ab \n") for _ in range(generator.randrange(1, 30)))
        cuts = [sorted({0, len(text), *(generator.randrange(len(text)) for _ in range(9))}) for _ in range(2)]
        mine, yours = ([text[a:b] for a, b in itertools.pairwise(cut)] for cut in cuts)
        assert spans(mine, yours) == shortest(mine, yours)


@pytest.mark.parametrize(
    ("mine", "yours", "expected"),
    [
        # white space that one side takes together, or leaves out in front
        ([b"a", b"\n", b"\n", b"b", END], [b"a", b" b", END], [(0, 1, 0, 1), (1, 4, 1, 2), (4, 5, 2, 3)]),
        ([b" a", b"b", END], [b"ab", END], [(0, 2, 0, 1), (2, 3, 1, 2)]),
        ([b"a", b"  b", b" "], [b" a", b" b"], [(0, 1, 0, 1), (1, 2, 1, 2)]),
        # a token that stands for nothing belongs to the next span; a character that one side changes
        ([b"a", b"", b"b"], [b"a", b"b"], [(0, 1, 0, 1), (1, 3, 1, 2)]),
        (
            [b"x", b" \xef\xac\x81", b"t", b" y", END],
            [b"x", b" f", b"it", b" y", END],
            [(0, 1, 0, 1), (1, 3, 1, 3), (3, 4, 3, 4), (4, 5, 4, 5)],
        ),
        # a character that is cut, and one without an end token
        ([b"a", b"\xe2\x82", END], [b"a", END], [(0, 1, 0, 1), (1, 3, 1, 2)]),
        ([b"a", b" b"], [b"a", b" b", END], [(0, 1, 0, 1), (1, 2, 1, 2)]),
        ([], [], []),
        ([END], [END], [(0, 1, 0, 1)]),
    ],
)
def test_what_tokenizers_change_lies_within_a_span(mine, yours, expected):
    assert spans(mine, yours) == expected
    turned = [(c, d, a, b) for a, b, c, d in expected]
    assert spans(yours, mine) == turned


def test_cover_leaves_no_token_out():
    for mine, yours in (
        ([b"a", b" b"], [b"c"]),
        ([b"a", b"b"], [b"a", b"c", b"d"]),
        ([b"<s>", b"a"], [b"a"]),
    ):
        found = spans(mine, yours, cover=True)
        assert [t for a, b, _, _ in found for t in range(a, b)] == list(range(len(mine)))
        assert [t for _, _, c, d in found for t in range(c, d)] == list(range(len(yours)))


def test_shared_tokens_stand_for_the_same_bytes_and_ends_are_partners():
    inner, mine_spaced, yours_spaced = shared(PIECES["fallback"], PIECES["bytes"])
    texts = [PIECES[name].texts for name in ("fallback", "bytes")]
    for table, leads in ((inner, (b"", b"")), (mine_spaced, (b" ", b"")), (yours_spaced, (b"", b" "))):
        pairs = list(zip(table.student, table.teacher, strict=True))
        assert pairs[0] == (TOKENIZERS["fallback"].eos_token_id, TOKENIZERS["bytes"].eos_token_id)
        assert table.bucket[END] == 0
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs) > 10
        for text, place in table.bucket.items():
            if text != END:
                assert texts[0][pairs[place][0]] == leads[0] + text
                assert texts[1][pairs[place][1]] == leads[1] + text
    everything = {t for t in texts[0] if t and t != END} & {t for t in texts[1] if t and t != END}
    plain = {"<unk>", "<s>", "</s>"}
    assert inner.bucket.keys() - {END} == {t for t in everything if t.decode(errors="ignore") not in plain}
    # A of sentencepiece is the piece, which text is made of, and not the token for the byte
    assert inner.student[inner.bucket[b"A"]] == TOKENIZERS["fallback"].convert_tokens_to_ids("A")


def test_tokens_of_published_tokenizers_find_each_other():
    """Pieces cut out of SmolLM2's and Qwen2.5's tokenizers: digits are single tokens in both."""
    mine, yours = pieces_of(smollm2(), "student.tokenizer"), pieces_of(qwen(), "teacher.model")
    table, *_ = shared(mine, yours)
    assert (table.student[0], table.teacher[0]) == (2, 151645)
    found = dict(zip(table.student, table.teacher, strict=True))
    assert found[1232] == 488 and found[198] == 198 and found[314] == 374  # ` +`, newline, ` is`
    assert found[0] == 151643 and 1 not in found  # padding; <|im_start|> is BOS on one side only


def test_a_sampled_row_beyond_the_tokenizer_stands_for_nothing():
    assert PIECES["bytes"].of([len(TOKENIZERS["bytes"]) + 5]) == [b""]


def test_the_unknown_token_stands_for_nothing():
    tokenizer = demo_tokenizer()
    pieces = pieces_of(tokenizer, "student.tokenizer")
    [ids] = token_ids.text_ids(["found xylophone"], tokenizer)
    assert tokenizer.unk_token_id in ids and b"".join(pieces.of(ids)) == b" found"


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["bytes"].backend_tokenizer)
    with pytest.raises(ValueError, match=r"the tokenizer of teacher\.model has no end token"):
        pieces_of(tokenizer, "teacher.model")


def test_a_tokenizer_whose_bytes_are_not_known_is_refused():
    core = Tokenizer(cores.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "</s>": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"which bytes a token of teacher\.model stands for"):
        pieces_of(tokenizer, "teacher.model")
