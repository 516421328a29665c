"""Labels that tokens cannot say, and texts of every split that are cut or unknown."""

from __future__ import annotations

import logging

import pytest
import tokenizer_variants
from tiny_models import byte_tokenizer

from ibdistill.config.sections import DataConfig
from ibdistill.data import loading, text_checks
from ibdistill.data.records import STREAMS, Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizing import tokenize


def check(tokenizer, train, test=None, task="jsonl", valid=("1",), streams=STREAMS, **settings):
    """`check_texts` on records with these labels (or questions and labels)."""

    def records(split, labels):
        pairs = [label if isinstance(label, tuple) else ("q", label) for label in labels]
        return [
            Record(f"{task}/{split}/{i}", task, question, label, "why" * ("reason" in streams), gold=label)
            for i, (question, label) in enumerate(pairs)
        ]

    parts = {
        split: {task: records(split, part)} for split, part in (("valid", valid), ("test", test or train))
    }
    loaded = loading.Loaded(records("train", train), parts["valid"], parts["test"], {})
    config = DataConfig(**settings)
    features = tokenize(loaded.train, {task: TASKS[task].prefixes}, tokenizer, config, streams=streams)
    return text_checks.check_texts(loaded, features, tokenizer, config)


@pytest.mark.parametrize(
    ("label", "back", "variant"),
    [
        ("{3, 4}", "3, 4", {}),
        ("3 < 4", "3  4", {}),
        ("9 m\N{SUPERSCRIPT TWO}", "9 m2", {"nfkc": True}),
        (
            "\N{VULGAR FRACTION ONE HALF}",
            "1\N{FRACTION SLASH}2",
            {"nfkc": True, "characters": "\N{FRACTION SLASH}"},
        ),
        ("a</s>b", "a< /s>b", {"characters": "<>"}),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "caf", {}),
    ],
)
def test_a_label_that_reads_back_as_another_answer_is_counted(tmp_path, caplog, label, back, variant):
    tokenizer = tokenizer_variants.t5(tmp_path, **variant)
    with caplog.at_level(logging.WARNING, logger="ibdistill"):
        counts = check(tokenizer, ["1", "2"], test=["1", "2", "a b", label])
    assert counts == {"jsonl/test/unsayable": 1}
    message = next(m for m in caplog.messages if "can never be right" in m)
    assert "jsonl/test: 1 of 4 labels (25.0%) can never be right" in message
    assert f"{label!r} (jsonl/test/3), which becomes {back!r}" in message


@pytest.mark.parametrize("marker, label", [("", "The answer is: 9"), ("####", "#### 9"), ("so", "9 so 8")])
def test_a_label_with_the_words_before_the_answer_is_counted(caplog, marker, label):
    tokenizer, texts = byte_tokenizer(), ["1", "2", "a b", label]
    settings = {"streams": ("reason",), "answer_marker": marker}
    with caplog.at_level(logging.WARNING, logger="ibdistill"):
        check(tokenizer, ["1", "2"], test=texts, **settings)
        check(tokenizer, ["1", "2"], test=texts, **settings | {"streams": ("predict", "explain")})
    told = [m for m in caplog.messages if "hold the words before the answer" in m]
    assert len(told) == 1 and told[0].startswith("jsonl/test: 1 of 4 labels can never be right")
    assert f"The first is {label!r} (jsonl/test/3)" in told[0]
    with pytest.raises(ValueError, match="jsonl/test: 2 of 3 labels can never be right, as they hold the wo"):
        check(tokenizer, ["1"], test=["1", label, label], **settings)


def test_labels_that_the_rule_still_takes_are_not_counted(tmp_path, caplog):
    llama = tokenizer_variants.llama(tmp_path / "llama", clean_up_tokenization_spaces=True)
    hard = ["{3, 4}", "3 < 4", "9 m\N{SUPERSCRIPT TWO}", "a , b", "a</s>b", "<|end|>", "Yes.", "a  b\nc"]
    t5 = tokenizer_variants.t5(tmp_path / "t5", characters="Y")
    with caplog.at_level(logging.WARNING, logger="ibdistill"):
        assert check(llama, hard) == {}
        assert check(t5, ["a , b", "a   b", "3, 4", "Yes."]) == {}
        assert check(t5, ["1,200", "2 + 3"], task="gsm8k") == {}
    assert not caplog.messages


def test_a_run_is_refused_where_most_labels_can_never_be_right(tmp_path):
    tokenizer = tokenizer_variants.t5(tmp_path)
    assert check(tokenizer, ["1"], test=["{1}", "2"])["jsonl/test/unsayable"] == 1  # half of them
    for splits in ({"train": ["1"], "test": ["{1}", "{2}", "2"]}, {"train": ["<", ">", "3"], "test": ["1"]}):
        with pytest.raises(
            ValueError, match=r"jsonl/(test|train): 2 of 3 labels \(66.7%\) can never be right"
        ):
            check(tokenizer, **splits)


@pytest.mark.parametrize(("check_", "bad"), [("choice", 3), ("value", 2), ("text", 0)])
def test_a_rule_by_which_most_labels_equal_nothing_is_refused(tmp_path, check_, bad):
    """As `choice` does for questions without options, and `value` for words."""
    config = DataConfig(task="jsonl", answer_check=check_)
    tests = [
        Record(f"t{i}", "jsonl", "a", g, "", g, answer_check=check_) for i, g in enumerate(["1", "b", "c"])
    ]
    loaded = loading.Loaded([], {"jsonl": tests[:1] * (check_ != "choice")}, {"jsonl": tests}, {})
    tokenizer = tokenizer_variants.t5(tmp_path)
    features = tokenize([], {"jsonl": TASKS["jsonl"].prefixes}, tokenizer, config)
    if not bad:
        assert text_checks.check_texts(loaded, features, tokenizer, config) == {}
        return
    message = rf"jsonl/test: {bad} of 3 labels equal no answer .*answer_check is '{check_}'"
    with pytest.raises(ValueError, match=message):
        text_checks.check_texts(loaded, features, tokenizer, config)


@pytest.mark.parametrize("streams", [("predict",), ("predict", "explain"), ("reason",)])
def test_only_questions_that_the_run_has_are_reported(tmp_path, caplog, streams):
    tokenizer, config = tokenizer_variants.t5(tmp_path), DataConfig(max_question_tokens=20)
    record = Record("r", "jsonl", "a" * 50, "1", "2", "1")
    loaded = loading.Loaded([], {"jsonl": []}, {"jsonl": [record]}, {})
    features = tokenize([], {"jsonl": TASKS["jsonl"].prefixes}, tokenizer, config, streams=streams)
    with caplog.at_level(logging.WARNING, logger="ibdistill"):
        text_checks.check_texts(loaded, features, tokenizer, config)
    expected = {"predict", *streams} - {"reason"}
    assert {m.split()[4] for m in caplog.messages if "questions are longer" in m} == expected


def test_an_evaluation_is_warned_and_goes_on(tmp_path, caplog):
    tokenizer = tokenizer_variants.t5(tmp_path)
    records = [
        Record(f"r{i}", "jsonl", "aaaaa", label, "", label) for i, label in enumerate(["{1}", "{2}", ""])
    ]
    with caplog.at_level(logging.WARNING, logger="ibdistill"):
        config = DataConfig(max_question_tokens=9)
        counts = text_checks.check_split("evaluation", records, tokenizer, config)
    assert counts == {"evaluation/cut_questions": 3, "evaluation/cut_labels": 0, "evaluation/unsayable": 2}
    assert any("evaluation: 2 of 3 labels (66.7%) can never be right" in m for m in caplog.messages)
    assert text_checks.check_split("evaluation", [], tokenizer, config)["evaluation/unsayable"] == 0


def test_a_cut_label_is_one_that_can_never_be_right(tmp_path, caplog):
    tokenizer = tokenizer_variants.t5(tmp_path)
    with caplog.at_level(logging.WARNING, logger="ibdistill"):
        counts = check(tokenizer, ["1", "ab"], test=["1", "2", "abcdef"], max_label_tokens=5)
    assert counts == {"jsonl/test/cut_labels": 1, "jsonl/test/unsayable": 1}
    assert "jsonl/test: 1 of 3 labels are longer than 5 tokens and were cut" in caplog.messages
    assert any("'abcdef' (jsonl/test/2), which becomes 'abcd'" in message for message in caplog.messages)


def test_questions_over_the_limit_are_counted_in_every_split(tmp_path, caplog):
    tokenizer = tokenizer_variants.t5(tmp_path)
    long, short = ("a" * 40, "1"), ("a", "1")
    with caplog.at_level(logging.WARNING, logger="ibdistill"):
        counts = check(
            tokenizer, [long, short], valid=[long, long], test=[short, long, short], max_question_tokens=20
        )
    assert counts == {"jsonl/valid/cut_questions": 2, "jsonl/test/cut_questions": 1}
    for split, share in (("train", "1 of 2"), ("jsonl/valid", "2 of 2"), ("jsonl/test", "1 of 3")):
        for stream in ("predict", "explain"):
            message = f"{split}: {share} {stream} questions are longer than 20 tokens and were cut"
            assert message in caplog.messages


def test_unknown_characters_are_counted_in_every_text(tmp_path, caplog):
    tokenizer = tokenizer_variants.t5(tmp_path)
    with caplog.at_level(logging.WARNING, logger="ibdistill"):
        check(tokenizer, [("what is {x} ?", "1"), ("q", "1"), ("q", "100 %")], test=["1"])
    unknown = [message for message in caplog.messages if "does not know" in message]
    assert [message.split(" have")[0] for message in unknown] == [
        "train: 1 of 3 predict questions",
        "train: 1 of 3 explain questions",
        "train: 1 of 3 labels",
    ]
    assert "sees <unk> in their place" in unknown[2] and unknown[2].endswith("The first is '100 %'")


def test_where_the_student_says_letters_the_letters_are_checked(tmp_path):
    tokenizer = tokenizer_variants.t5(tmp_path, characters="()")
    question = "which ?\nAnswer Choices:\n(a) {1}\n(b) 2"
    rows = [(question, "{1}"), (question, "2"), (question, "{1}")]
    letters = [(question, "(a)"), (question, "2")]
    settings = dict(task="cqa", valid=[(question, "2")], test=rows)
    assert check(tokenizer, letters, **settings, choice_labels="letter") == {}
    with pytest.raises(ValueError, match="cqa/test: 2 of 3 labels"):
        check(tokenizer, [(question, "2")], **settings)


def test_a_run_reports_what_it_cuts(make_job, tmp_path):
    job = make_job(**{"data.max_question_tokens": 12})
    report = job.records.report
    assert 0 < report["demo/test/cut_questions"] <= report["demo/test/records"]
    assert 0 < report["demo/valid/cut_questions"] <= report["demo/valid/records"]
    assert not any("unsayable" in name for name in report)
