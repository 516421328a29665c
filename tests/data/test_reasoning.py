"""Rationale and answer in one text: joined, split, tokenized, cut or dropped, laid out in rows."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from tiny_models import byte_tokenizer

from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig
from ibdistill.data import batches, reasoning, token_ids, tokenizers
from ibdistill.data.records import SEGMENTS, Record
from ibdistill.data.sampler import Sampler
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizing import taught, tokenize

MARKER = "The answer is:"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("3 + 4 = 7.\nThe answer is: 7", ("3 + 4 = 7.", "7")),
        ("3 + 4 = 7. The  answer\nis: 7 \n", ("3 + 4 = 7.", "7")),
        ("so The answer is: 3\nThe answer is: 7", ("so The answer is: 3", "7")),
        ("The answer is: 7", ("", "7")),
        ("3 + 4 = 7.\nThe answer is:  ", ("3 + 4 = 7.", None)),
        ("3 + 4 = 7. The answer is 7", ("3 + 4 = 7. The answer is 7", None)),
        ("", ("", None)),
    ],
)
def test_the_answer_stands_behind_the_last_marker(text, parts):
    assert reasoning.split(text, MARKER) == parts
    if parts[1] is not None:
        assert text[reasoning.answer_start(text, MARKER) :].strip() == parts[1]


def test_what_is_joined_splits_into_its_parts():
    for marker in (MARKER, "predict:", "</think>"):
        assert reasoning.split(reasoning.join("a b.", "7", marker), marker) == ("a b.", "7")


@pytest.mark.parametrize(
    ("tokenizer", "marker"),
    [(byte_tokenizer(), MARKER), (tokenizers.demo_tokenizer(), "predict:")],
)
def test_ids_read_back_as_the_joined_text(tokenizer, marker):
    """A byte-level tokenizer needs the space before the answer, one of words puts it there itself."""
    rationale, label = "start n0 . found means + n1 .", "( n0 + n1 )"
    (ids,), (answer,), between = reasoning.segment_ids([rationale], [label], marker, tokenizer)
    assert answer[-1] == tokenizer.eos_token_id and answer.count(answer[-1]) == 1
    text = token_ids.read_back([ids + between + answer], tokenizer)[0]
    assert text.split() == reasoning.join(rationale, label, marker).split()
    assert reasoning.split(text, marker) == (rationale, label)


def test_a_marker_that_the_tokenizer_cannot_say_is_refused():
    with pytest.raises(ValueError, match="data.answer_marker is 'The answer is:', which the tokenizer reads"):
        reasoning.segment_ids(["start n0 ."], ["n0"], MARKER, tokenizers.demo_tokenizer())


RECORDS = [
    Record("a", "demo", "n0 + n1 ?", "n0", "start n0 .", "n0"),
    Record("b", "demo", "n1 ?", "( n0 + n1 )", "start n0 . found means + n1 .", "n1"),
    Record("c", "demo", "n2 + n1 ?", "n2", "", "n2"),
]
PREFIXES = {"demo": TASKS["demo"].prefixes}


def tokens(records=RECORDS, streams=("reason",), **settings):
    return tokenize(records, PREFIXES, tokenizers.demo_tokenizer(), DataConfig(**settings), streams=streams)


def words(ids) -> str:
    return " ".join(tokenizers.demo_tokenizer().convert_ids_to_tokens([int(i) for i in ids])).replace("▁", "")


def test_the_segments_of_the_reason_stream():
    features = tokens()
    assert features.streams == ("reason",) and tuple(features.targets) == SEGMENTS["reason"]
    assert words(features.questions["reason"][0]) == "explain: predict: n0 + n1 ? </s>"
    rows = [[words(features.targets[segment][i]) for segment in SEGMENTS["reason"]] for i in range(3)]
    assert rows == [
        ["start n0 . predict:", "n0 </s>"],
        ["start n0 . found means + n1 . predict:", "( n0 + n1 ) </s>"],
        ["", ""],
    ]
    kept = features.take(taught(features))
    assert kept.ids == ["a", "b"]
    assert words(kept.targets["answer"][1]) == "( n0 + n1 ) </s>" and kept.groups.tolist() == [0, 0]
    counts = Sampler(features, DataConfig(), batch_size=3, seed=0).counts(0)
    assert counts == {
        **{"rationale": 4 + 9, "answer": 2 + 6},
        **{"questions": 3, "explained": 2, "question_tokens": 7 + 5 + 7},
    }


def test_all_three_streams_keep_a_record_without_a_rationale():
    features = tokens(streams=("predict", "explain", "reason"))
    assert taught(features).tolist() == [0, 1, 2]
    assert [words(features.targets[s][2]) for s in features.targets] == ["n2 </s>", "", "", ""]


def test_too_long_reasoning_is_dropped_cut_or_refused(caplog):
    caplog.set_level(logging.WARNING)
    dropped = tokens(max_rationale_tokens=8)
    assert [len(dropped.targets["rationale"][i]) for i in range(3)] == [4, 0, 0]
    assert dropped.cut["reasonings"] == 1
    message = "train: 1 of 3 rationales of the reason stream are longer than 8 tokens"
    assert message in caplog.text and "has 9 (b): these records do not train it" in caplog.text
    cut = tokens(max_rationale_tokens=8, long_reasoning="cut")
    assert words(cut.targets["rationale"][1]) == "start n0 . found means + n1 predict:"
    assert words(cut.targets["answer"][1]) == "( n0 + n1 ) </s>" and cut.cut["reasonings"] == 1
    with pytest.raises(
        ValueError, match=r"9 \(b\)\. Raise the limit, or take data.long_reasoning drop or cut"
    ):
        tokens(max_rationale_tokens=8, long_reasoning="refuse")
    short = tokens(max_label_tokens=4)
    assert words(short.targets["answer"][1]) == "( n0 + </s>" and short.cut["answers"] == 1
    assert "1 of 3 answers of the reason stream are longer than 4 tokens and were cut" in caplog.text
    assert "reasonings" in tokens(max_rationale_tokens=9, long_reasoning="refuse").cut
    assert len(taught(tokens(max_rationale_tokens=3))) == 0
    with pytest.raises(ValueError, match=re.escape("marker 'one two three' before the answer takes")):
        tokenize(
            RECORDS, PREFIXES, byte_tokenizer(), streams=("reason",),
            config=DataConfig(max_rationale_tokens=5, answer_marker="one  two three"),
        )  # fmt: skip


@pytest.mark.parametrize("separator", [None, 5])
def test_rows_hold_rationale_and_answer_and_their_places(separator):
    """The label at each place is the next token of the row that the place reads."""
    features = tokens(streams=("predict", "explain", "reason"))
    batch = batches.collate(features, [2, 1, 0], features.streams, pad=0, start=7, separator=separator)
    assert batch.streams == ("predict", "explain", "reason") and len(batch.input_ids) == 9
    for index, stream in enumerate(batch.streams):
        rows = batch.input_ids[3 * index : 3 * index + 3] if separator else batch.decoder_input_ids[stream]
        for segment in SEGMENTS[stream]:
            cu, labels, places = batch.cu[segment].tolist(), batch.labels[segment], batch.positions[segment]
            assert len(labels) == len(places) == cu[-1] == sum(features.targets[segment].lengths)
            for b, row in enumerate([2, 1, 0]):
                own = slice(cu[b], cu[b + 1])
                assert labels[own].tolist() == features.targets[segment][row].tolist()
                columns = places[own] - b * rows.shape[1]
                assert columns.tolist() == sorted(columns.tolist()) and (columns >= 0).all()
                read = torch.roll(rows[b], -1)[columns][:-1]
                assert torch.equal(read, labels[own][:-1])
    whole = np.concatenate([features.targets[s][1] for s in SEGMENTS["reason"]])
    rows = batch.input_ids[6:] if separator else batch.decoder_input_ids["reason"]
    lead = 2 + len(features.questions["reason"][1]) - 1 if separator else 1  # BOS and question, or start
    assert rows[1, lead : lead + len(whole) - 1].tolist() == whole[:-1].tolist()
    assert batch.positions["answer"][-1] >= batch.positions["rationale"][-1]
    assert batch.num_tokens == int(batch.attention_mask.sum()) + (
        0 if separator else sum(map(len, batch.labels.values()))
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective.method": "cot", "data.missing_rationales": "predict_only"},
            "objective.method cot has none; leave it at refuse, or take dss+cot",
        ),
        (
            {"data.answer_marker": "so:"},
            "data.answer_marker is 'so:', which is for the reason stream, and obj",
        ),
        ({"data.long_reasoning": "cut"}, "data.long_reasoning is 'cut', which is for the reason stream"),
        (
            {"objective.method": "cot", "data.answer_marker": " "},
            "data.answer_marker is ' ', white space alone",
        ),
        ({"objective.method": "cot", "data.unlabelled": 9}, "objective.method cot does not train both"),
        ({"objective.method": "cot+kd"}, "objective.method cot+kd needs an online teacher"),
        (
            {"objective.method": "cot+ib", "objective.estimator": "vid"},
            "estimator vid needs an online teacher",
        ),
        ({"objective.method": "dss+cot", "objective.reason_share": 1.0}, "objective.reason_share is 1.0"),
    ],
)
def test_settings_that_contradict_the_stream_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_settings(None, settings)


@pytest.mark.parametrize(
    ("text", "task", "taken"),
    [
        ("2 + 3 = 5.\n#### 5", "gsm8k", ("2 + 3 = 5.", "5", 15)),
        ("2 + 3 = 5. The answer is 5.", "gsm8k", ("2 + 3 = 5.", "5", 25)),
        ("2 + 3 = 5. The answer is 5.", "", ("2 + 3 = 5. The answer is 5.", None, 27)),
        ("I do not know", "gsm8k", ("I do not know", None, 13)),
    ],
    ids=["marked", "by the task's rule", "without a task", "none"],
)
def test_an_answer_that_is_not_marked_is_found_by_the_tasks_rule(text, task, taken):
    assert reasoning.take_apart(text, task, "####") == taken
