"""Agreement on unlabelled questions: what is kept, what is mixed in, and that a resumed run does the same."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from feature_tables import random_features
from harness import same, steps, tiny, weights
from workers.agreeing import answers_of_an_oracle

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig
from ibdistill.data import loading
from ibdistill.data.records import STREAMS, Record
from ibdistill.data.sampler import MixedSampler, Sampler
from ibdistill.evaluation import predictions as evaluation_predictions
from ibdistill.models.decoding import Answer
from ibdistill.training import pseudo_labels
from ibdistill.training.prepare import prepare

AGREE = {"data.unlabelled": 40, "run.term_gradients_every": 0, "run.save_every": 100}
OFF = {"run.term_gradients_every": 0, "run.save_every": 100}
MONEY = "where is money kept?\nAnswer Choices:\n(a) river bank\n(b) bank\n(c) shoe"


def said(task: str, question: str, label: str, rationale: str, gold: str = "", quantities=()):
    record = Record(f"{task}/{label}/{rationale}", task, question, "", "", gold, quantities)
    return evaluation_predictions.prediction(record, Answer(label, 1.0, 1.0), Answer(rationale, 1.0, 1.0))


@pytest.mark.parametrize(
    ("task", "question", "label", "rationale", "kept"),
    [
        ("demo", "q", "n0 * n1", "start n0 . bred means * n1 . tall means ignore n2 .", True),
        ("demo", "q", "n1 * n0", "start n0 . bred means * n1 .", True),  # the same value
        ("demo", "q", "n0 + n1", "start n0 . bred means * n1 .", False),
        ("demo", "q", "n0 * n1", "start n0 . bred means n1 .", False),  # implies nothing
        ("demo", "q", "", "", False),
        ("svamp", "q", "( 8 - 3 ) * 2", "He had 8 - 3 = 5 left , so 5 * 2 = 10 .", True),
        ("svamp", "q", "10", "So 5 * 2 = 10 , and before that 8 - 3 = 5 .", False),  # the last one counts
        ("svamp", "q", "5", "There are 5 .", False),  # nothing is computed
        ("cqa", MONEY, "bank", "Money is kept in a bank.", True),
        ("cqa", MONEY, "(b)", "Money is kept in a bank.", True),
        ("cqa", MONEY, "bank", "It is in a river bank.", False),
        ("cqa", MONEY, "bank", "A bank, as no shoe is safe.", False),  # names two options
        ("esnli", "q", "neutral", "It may be, so it is neutral.", True),
        ("esnli", "q", "entailment", "It may be, so it is neutral.", False),
    ],
)
def test_kept_is_where_the_rationale_implies_the_predicted_label(task, question, label, rationale, kept):
    prediction = said(task, question, label, rationale, quantities=("4", "2", "9"))
    pseudo = pseudo_labels.agreed([prediction])
    assert len(pseudo) == kept
    for record in pseudo:
        assert (record.question, record.label, record.rationale) == (question, label, rationale)


def test_scalars_count_and_measure_against_the_ground_truth_where_there_is_one():
    right, wrong = "start n0 . bred means * n1 .", "start n0 . lost means - n1 ."
    predictions = [
        said("demo", "q", "n0 * n1", right, gold="n0 * n1", quantities=("4", "2")),
        said("demo", "q", "n0 - n1", wrong, gold="n0 * n1", quantities=("4", "2")),
        said("demo", "q", "n0 * n1", wrong + " ", gold="n0 * n1", quantities=("4", "2")),
        said("demo", "q", "n0 * n1", right + " ", gold="", quantities=("4", "2")),
    ]
    pseudo = pseudo_labels.agreed(predictions)
    assert len(pseudo) == 3
    assert pseudo_labels.scalars(predictions, pseudo, 1.5) == {
        "agree/asked": 4,
        "agree/agreed": 3,
        "agree/seconds": 1.5,
        "agree/precision": 1 / 2,
        "agree/accuracy": 2 / 3,
    }


@pytest.mark.parametrize(("share", "num_pseudo"), [(0.5, 8), (0.25, 4), (0.3, 5)])
def test_every_batch_has_its_share_of_pseudo_labelled_records(share, num_pseudo):
    settings = DataConfig(agree_share=share)
    gold, pseudo = random_features(50, seed=1), random_features(23, seed=2)
    both = gold + pseudo
    plan = MixedSampler(gold, pseudo, settings, batch_size=16, seed=3)
    for step in (0, 7, 100):
        rows = plan.step(step)
        assert len(set(rows.tolist())) == 16 and (rows >= 50).sum() == num_pseudo
        lengths = both.questions["predict"].lengths[rows]
        assert (np.diff(lengths) >= 0).all()
        counts = plan.counts(step)
        for stream in STREAMS:
            tokens = [
                (gold.targets[stream][row] if row < 50 else pseudo.targets[stream][row - 50]) for row in rows
            ]
            assert counts[stream] == sum(map(len, tokens))
        assert counts["question_tokens"] == lengths.sum()
        parts = [plan.micro_batches(step, rank=r, world_size=2, micro_batch_size=4) for r in range(2)]
        assert sorted(np.concatenate([*parts[0], *parts[1]]).tolist()) == sorted(rows.tolist())
    # each part walks through permutations of its own records
    gold_steps = 50 // (16 - num_pseudo)
    walked = np.concatenate([plan.step(step) for step in range(gold_steps)])
    walked = walked[walked < 50]
    assert len(set(walked.tolist())) == len(walked) == gold_steps * (16 - num_pseudo)
    again = MixedSampler(gold, pseudo, settings, batch_size=16, seed=3)
    assert (again.step(100) == plan.step(100)).all()
    assert plan.steps_per_epoch == Sampler(gold, settings, batch_size=16, seed=3).steps_per_epoch


def test_joined_features_are_the_ones_and_then_the_others():
    first, second = random_features(5, seed=1), random_features(3, seed=2)
    both = first + second
    assert len(both) == 8 and list(both.ids) == [*first.ids, *second.ids]
    for table in ("questions", "targets"):
        for stream in STREAMS:
            parts = [getattr(features, table)[stream] for features in (first, second, both)]
            expected = [parts[0][i].tolist() for i in range(5)] + [parts[1][i].tolist() for i in range(3)]
            assert [parts[2][i].tolist() for i in range(8)] == expected
            assert parts[2].lengths.tolist() == [len(row) for row in expected]


@pytest.fixture
def oracle(monkeypatch) -> list[int]:
    """The student answers rightly; how many, and which, depends on its weights."""
    calls: list[int] = []
    monkeypatch.setattr(evaluation_predictions, "decode", answers_of_an_oracle(calls))
    return calls


def test_agreed_answers_are_mixed_in_and_replaced_and_logged(make_job, oracle, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ibdistill"), "propagate", True)
    job = make_job(**AGREE)
    assert pseudo_labels.due_steps(job.config) == {5, 8}
    scalars = {}
    monkeypatch.setattr(
        job.board, "scalars", lambda values, step: scalars.setdefault(step, {}).update(values)
    )
    seen = []
    step = train.train_step

    def observed(job):
        seen.append((len(job.features) - 100, int((job.sampler.step(job.state.step) >= 100).sum())))
        step(job)

    monkeypatch.setattr(train, "train_step", observed)
    with caplog.at_level(logging.INFO):
        train.train(job)
    (first, _), (second, _) = seen[5], seen[8]
    assert first >= 4 and second >= 4
    assert seen == [(0, 0)] * 5 + [(first, 4)] * 3 + [(second, 4)] * 4
    for at, count in ((6, first), (9, second)):
        assert scalars[at]["agree/asked"] == 40 and scalars[at]["agree/agreed"] == count
        assert scalars[at]["agree/precision"] == 1.0 and scalars[at]["agree/seconds"] > 0
        assert scalars[at]["agree/accuracy"] == count / 40
    assert f"after step 5  unlabelled questions: asked 40  agreed {first}" in caplog.text
    files = sorted((job.folder / "agree").iterdir())
    assert [path.name[:13] for path in files] == ["step-00000005", "step-00000008"]
    assert job.state.pseudo == files[1].name
    unlabelled = {record.id: record for record in job.unlabelled}
    for row in map(json.loads, files[1].read_text().splitlines()):
        assert row["label"] == row["gold"] and row["question"] == unlabelled[row["id"]].question


@pytest.mark.parametrize(("saved_at", "killed_at"), [(3, 5), (5, 5), (6, 9), (10, 11)])
def test_a_resumed_run_learns_from_the_same_answers(
    make_job, oracle, tmp_path, monkeypatch, saved_at, killed_at
):
    """Refreshes are at 5 and 8: killed after one that the checkpoint lacks, within one, after both."""
    whole = make_job(tmp_path / "whole", **AGREE)
    train.train(whole)
    expected = weights(whole)

    class Killed(Exception):
        pass

    job = make_job(tmp_path / "broken", **AGREE | {"run.save_every": saved_at})
    step = train.train_step
    with monkeypatch.context() as patch:
        if saved_at == killed_at:
            patch.setattr(pseudo_labels, "write", lambda *a: (_ for _ in ()).throw(Killed))
        else:
            patch.setattr(
                train,
                "train_step",
                lambda j: (_ for _ in ()).throw(Killed) if j.state.step == killed_at else step(j),
            )
        with pytest.raises(Killed):
            train.train(job)
    again = make_job(tmp_path / "broken", **AGREE | {"run.save_every": saved_at})
    assert again.state.step == saved_at and bool(again.state.pseudo) == (saved_at > 5)
    train.train(again)
    assert same(weights(again), expected) and again.state.pseudo == whole.state.pseudo


def test_a_missing_or_changed_file_is_refused_on_resuming(make_job, oracle):
    job = make_job(**AGREE | {"run.save_every": 6})
    train.train(job)
    path = job.folder / "agree" / job.state.pseudo
    path.write_text(path.read_text().replace("n0", "n1"))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: the checkpoint was trained with its rec"):
        make_job(**AGREE | {"run.save_every": 6})
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing.*Put it back, or start a new run"):
        make_job(**AGREE | {"run.save_every": 6})


def test_too_few_agreed_answers_leave_all_of_the_batch_gold(make_job, tmp_path, monkeypatch, caplog):
    """And then the run is, bit for bit, one without unlabelled questions: decoding draws no random number."""
    monkeypatch.setattr(logging.getLogger("ibdistill"), "propagate", True)
    off = make_job(tmp_path / "off", **OFF)
    train.train(off)
    job = make_job(tmp_path / "on", **AGREE)  # a student from scratch never agrees with itself
    train.train(job)
    assert "0 agreed answers do not fill their share of a batch: all of it is gold" in caplog.text
    assert same(weights(job), weights(off)) and job.state.pseudo == ""
    assert not (job.folder / "agree").exists() and off.unlabelled == []


def test_a_full_disk_leaves_the_earlier_answers_in_force(make_job, oracle, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("ibdistill"), "propagate", True)
    job = make_job(**AGREE)
    steps(job, 5)
    train.refresh(job)
    before, rows = job.state.pseudo, job.sampler.step(6).tolist()
    steps(job, 1)
    monkeypatch.setattr(pseudo_labels, "write", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    train.refresh(job)
    assert "the earlier ones stay in force: no space" in caplog.text
    assert job.state.pseudo == before and job.sampler.step(6).tolist() == rows


@pytest.mark.parametrize("cached", [False, True])
def test_the_teacher_scores_the_pseudo_labelled_text_too(make_job, tmp_path, oracle, monkeypatch, cached):
    """Its terms on a mixed batch equal those of a teacher that was asked about these very records."""
    online = {
        "teacher.placement": "replica",
        "teacher.model": "demo-teacher",
        "teacher.precision": "fp32",
        "objective.method": "ib+kd",
        "student.dropout": 0.0,
        "teacher.cache": str(tmp_path / "cache") if cached else "",
    }
    job = make_job(tmp_path / "run", **AGREE, **online)
    steps(job, 5)
    train.refresh(job)
    before = weights(job)
    job.meter.close_interval()
    rows = job.sampler.step(5)
    counts = job.sampler.counts(5)
    steps(job, 1)
    found = job.meter.close_interval()
    assert found.counts == counts and (rows >= 100).sum() == 4

    by_id = {r.id: r for r in [*job.records.train, *pseudo_labels.read(job.folder, job.state.pseudo)]}
    with torch.no_grad():
        for name, parameter in job.engine.module.named_parameters():
            parameter.copy_(before[name])
    records = [by_id[job.features.ids[row]] for row in rows]
    prefixes = {"demo": loading.TASKS["demo"].prefixes}
    features = agreement_features(records, prefixes, job)
    job.gold, job.teacher_answers._reads = features, False
    job.teacher_answers._features, job.features = features, features
    batch = job.collate(np.arange(8))
    signal = job.teacher_answers.of(np.arange(8), batch)
    weights_ = train.step_weights(job.config.objective, counts)
    _, terms = job.engine.module(batch, weights_, signal, counts["question_tokens"])
    assert {"kd_predict", "kd_explain", "vid", "ce_predict"} <= terms.keys()
    for name, value in terms.items():
        assert found.terms[name] == pytest.approx(float(value), rel=1e-5), name


def agreement_features(records, prefixes, job):
    from ibdistill.data.tokenizing import tokenize

    return tokenize(records, prefixes, job.tokenizer, job.config.data)


def test_a_full_cache_does_not_keep_a_growing_run_from_loading_its_teacher(make_job, tmp_path, oracle):
    online = {
        "teacher.placement": "replica",
        "teacher.model": "demo-teacher",
        "objective.method": "kd",
        "teacher.cache": str(tmp_path / "cache"),
    }
    first = make_job(tmp_path / "first", **OFF, **online, **{"data.subsample": 96})
    steps(first, 12)
    first.teacher_answers.flush()
    job = make_job(tmp_path / "second", **AGREE, **online, **{"data.subsample": 96})
    assert job.teacher_answers.teacher is not None
    train.train(job)
    assert job.state.pseudo and job.state.skipped == 0


def test_questions_are_read_from_a_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "He has 3 and 4. All?", "label": "3 + 4"}\n\n{"question": "5 less 2?"}\n')
    records = pseudo_labels.questions(DataConfig(task="svamp", unlabelled=str(path), map_numbers=True))
    assert [(r.id, r.question, r.label, r.rationale, r.gold, r.quantities) for r in records] == [
        ("svamp/unlabelled/0", "He has n0 and n1. All?", "", "", "n0 + n1", ("3", "4")),
        ("svamp/unlabelled/1", "n0 less n1?", "", "", "", ("5", "2")),
    ]
    assert pseudo_labels.questions(DataConfig()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a"}\n{"text": "b"}\n', r"questions.jsonl:2: no question \(KeyError: 'question'\)"),
        ('{"question": " "}\n', r"questions.jsonl:1: the question is empty"),
        ('["a"]\n', r"questions.jsonl: item 0: no question"),
        ('{"question": "a"\n', r"questions.jsonl:1"),
        ("", r"questions.jsonl' holds no questions"),
        (None, r"data.unlabelled '.*questions.jsonl' is no file"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        pseudo_labels.questions(DataConfig(task="svamp", unlabelled=str(path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unlabelled": 5, "task": "svamp"}, r"is 5; for task 'svamp' it is the path of a JSONL file"),
        ({"unlabelled": "x.jsonl"}, r"'x.jsonl'; for task 'demo' it is a number of questions to generate"),
        ({"unlabelled": 20001}, r"data.unlabelled is 20001: the demo corpus has 0 to 20000"),
        ({"unlabelled": "x", "task": "jsonl"}, r"'jsonl' has none; tasks with one: demo, svamp, asdiv"),
        ({"unlabelled": 5, "task": ["demo", "svamp"]}, r"goes with one task.*mixture of demo, svamp"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pseudo_labels.questions(DataConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.agree_at": [0.7, 0.4]}, r"data.agree_at is \[0.7, 0.4\]; give one or more shares.*rising"),
        ({"data.agree_at": [0.4, 0.4]}, r"in rising order"),
        ({"data.agree_at": []}, r"data.agree_at is \[\]; give one or more"),
        ({"data.agree_at": [0.4, 1.0]}, r"data.agree_at is 1.0; it must be between 0 and 1, both excluded"),
        ({"data.agree_at": [0]}, r"data.agree_at is 0.0; it must be between 0 and 1"),
        ({"data.agree_share": 1.0}, r"data.agree_share is 1.0; it must be between 0 and 1"),
        ({"data.agree_share": 0.05}, r"data.agree_share is 0.05, which is 0 of optim.batch_size 8; at least"),
        ({"data.agree_share": 0.99}, r"data.agree_share is 0.99, which is 8 of optim.batch_size 8; at least"),
        ({"data.unlabelled": 0}, r"data.unlabelled is 0; it must be at least 1"),
        ({"objective.method": "finetune"}, r"objective.method finetune does not train both; choose another"),
        (
            {
                "teacher.placement": "cache",
                "teacher.cache": "c",
                "teacher.model": "t5-mini",
                "objective.method": "kd",
            },
            r"data.unlabelled makes new text, for which teacher.placement cache, whose answers are there",
        ),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, tiny(tmp_path) | AGREE | settings)


def test_a_bad_source_is_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ibdistill.training.build_student.load_student", lambda *a: pytest.fail("a model was loaded")
    )
    settings = tiny(tmp_path / "run") | {"data.unlabelled": str(tmp_path / "none.jsonl")}
    with pytest.raises(ValueError, match="for task 'demo' it is a number"):
        prepare(load_settings(None, settings), world)
