"""Evaluation: confidences of decoded answers, scores of predictions, files of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch

from ibdistill.config.sections import DataConfig, StudentConfig
from ibdistill.data import tokenizers
from ibdistill.data.loading import load
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.evaluation import calibration, text_scores
from ibdistill.evaluation import predictions as evaluation_predictions
from ibdistill.models import decoding, student


@pytest.fixture(scope="module")
def records():
    return load(DataConfig(), needs_rationale=True).test["demo"][:40]


@pytest.fixture
def predictions(records):
    """Three in four labels right; confidences 0, 1/40, ...; every fifth rationale says nothing."""
    made = []
    for i, record in enumerate(records):
        label = record.gold if i % 4 else "n0 * 99"
        rationale = record.rationale if i % 5 else "and so on ."
        answer = decoding.Answer(label, i / 40, 0.9)
        made.append(evaluation_predictions.prediction(record, answer, decoding.Answer(rationale, 1.0, 1.0)))
    return made


def test_the_confidence_ends_with_the_end_token():
    """Two answers of a batch: one ends after two tokens (eos = 1) and is padded, one never ends."""
    logits = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    processor = decoding._Confidence()
    generated = torch.tensor([[4, 1, 0], [5, 3, 2]])
    for step, scores in enumerate(logits):
        for row in range(2):
            scores[row, generated[row, step]] = 4.0  # the largest
        assert processor(generated[:, :step], scores) is scores
    whole, first = processor.of(generated, eos=1)
    p = logits.softmax(-1).amax(-1).T.tolist()
    assert whole == pytest.approx([p[0][0] * p[0][1], math.prod(p[1])]) and first == pytest.approx(
        [p[0][0], p[1][0]]
    )


def test_scores_join_calibration_texts_and_faithfulness(predictions):
    scores = evaluation_predictions.scores(predictions)
    correct = [i % 4 != 0 for i in range(40)]
    assert scores["accuracy"] == scores["accuracy_strict"] == scores["accuracy_lenient"] == 0.75
    expected = calibration.summary([i / 40 for i in range(40)], correct)
    assert {name: scores[name] for name in expected} == expected
    assert scores["first_token_ece"] == pytest.approx(0.15) and scores["first_token_confidence"] == 0.9
    assert scores["implies"] == 0.8 and scores["rationale_accuracy"] == 0.8
    assert scores["faithful"] == pytest.approx(24 / 40) and scores["agreement"] == pytest.approx(24 / 32)
    texts = text_scores.text_scores(
        [p.rationale for p in predictions], [p.record.rationale for p in predictions]
    )
    assert {name: scores[f"rationale_{name}"] for name in texts} == texts


def test_without_rationales_only_labels_are_scored(predictions):
    unexplained = [dataclasses.replace(p, rationale=None) for p in predictions]
    assert evaluation_predictions.scores(unexplained).keys() == {
        "accuracy",
        "accuracy_strict",
        "accuracy_lenient",
    } | {prefix + name for prefix in ("", "first_token_") for name in calibration.summary([0.5], [1])}
    # reference rationales may be missing: then texts are not compared, faithfulness is still told
    lonely = [dataclasses.replace(p, record=dataclasses.replace(p.record, rationale="")) for p in predictions]
    scores = evaluation_predictions.scores(lonely)
    assert "rationale_bleu" not in scores and "reference_leakage" not in scores
    assert scores["faithful"] == pytest.approx(24 / 40)


def test_answers_are_scored_by_three_rules():
    """The first is today's accuracy; lenient counts what any rule accepts."""
    record = Record("gsm8k/test/0", "gsm8k", "q", "1200", "", gold="1200")
    labels = ["1200", "2 * 600", "1200 dollars", "The answer is 1200", "1200 or so, or 12", "12"]
    made = [evaluation_predictions.prediction(record, decoding.Answer(x, 1.0, 1.0), None) for x in labels]
    scores = evaluation_predictions.scores(made)
    assert [p.correct for p in made] == [True, True, False, False, False, False]
    assert scores["accuracy"] == pytest.approx(2 / 6)
    assert scores["accuracy_strict"] == pytest.approx(3 / 6)
    assert scores["accuracy_lenient"] == pytest.approx(5 / 6)


def test_predictions_survive_their_file(predictions, records, tmp_path):
    path = tmp_path / "deep" / "test_demo.jsonl"
    evaluation_predictions.write_predictions(path, predictions)
    assert evaluation_predictions.read_predictions(path, records) == predictions
    rows = [json.loads(line) for line in path.open()]
    assert rows[1]["implied"] == TASKS["demo"].implied(records[1].rationale, records[1])
    assert rows[0]["implied"] == []


def refused(message: str, path, records) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluation_predictions.read_predictions(path, records)


def test_files_that_are_no_predictions_of_this_task_are_refused(predictions, records, tmp_path):
    path = tmp_path / "p.jsonl"
    refused("does not exist; predictions of a run are in RUN/predictions", path, records)
    path.write_text("")
    refused("is empty: there are no predictions", path, records)
    path.write_text('{"id": "demo/test/0"}\n')
    refused("p.jsonl:1: not a prediction (KeyError: 'label')", path, records)
    path.write_text("[1]\n")
    refused("not a prediction (TypeError", path, records)
    evaluation_predictions.write_predictions(path, predictions)
    refused("p.jsonl:6: 'demo/test/5' is none of the 5 records of task 'demo'", path, records[:5])
    evaluation_predictions.write_predictions(path, [predictions[0]] * 9)
    refused(f"p.jsonl:2: 'demo/test/0' stands at {path}:1 already; each record counts once", path, records)
    evaluation_predictions.write_predictions(path, predictions)
    others = [dataclasses.replace(r, question="another") for r in records]
    refused("p.jsonl:1: 'demo/test/0' has another question", path, others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 5}, "the label is 5; it must be text"),
        ({"label": None}, "the label is None; it must be text"),
        ({"id": ["x"]}, "the id is ['x']; it must be text"),
        ({"rationale": 5}, "the rationale is 5; it must be text, or null"),
        ({"confidence": None}, "a confidence is None; it must be a number from 0 to 1"),
        ({"confidence": float("nan")}, "a confidence is nan; it must be"),
        ({"first_confidence": True}, "a confidence is True; it must be"),
        ({"first_confidence": 7}, "a confidence is 7; it must be"),
        ({"confidence": "0.5"}, "a confidence is '0.5'; it must be"),
        ({"label": "\ud83d"}, "the text '\\ud83d' has half of a surrogate pair"),
        ({"rationale": "x \udc00"}, "the text 'x \\udc00' has half of a surrogate pair"),
    ],
)
def test_a_bad_prediction_is_named_with_its_line(predictions, records, tmp_path, change, message):
    path = tmp_path / "p.jsonl"
    evaluation_predictions.write_predictions(path, predictions[:3])
    rows = [json.loads(line) for line in path.open()]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], rows[2] | change]))
    refused(f"p.jsonl:3: {message}", path, records)


def test_an_empty_split_is_refused(world):
    tokenizer = tokenizers.demo_tokenizer()
    model = student.load_student(StudentConfig(), tokenizer, 0).eval()
    with pytest.raises(ValueError, match="there are no records to evaluate"):
        evaluation_predictions.evaluate(model, tokenizer, [], ("predict",), DataConfig(), world)
