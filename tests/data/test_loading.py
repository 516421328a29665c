"""`load`: splits, subsamples, mixtures, and the text of every refusal."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from feature_tables import features_of
from miniatures import DATA, array, ids, lines, load_refused, loaded, real_data, said, svamp

from ibdistill.config.sections import DataConfig, ObjectiveConfig
from ibdistill.data.records import SEGMENTS, Record
from ibdistill.data.sampler import Sampler
from ibdistill.data.tasks import demo
from ibdistill.data.tasks.registry import TASKS
from ibdistill.objectives.weights import step_weights


def jsonl(root, n=40, rationale="because", **splits):
    for split, size in {"train": n, "test": 5, **splits}.items():
        rows = [{"question": f"{split} {i}", "label": f"{i}", "rationale": rationale} for i in range(size)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_every_task_is_named_after_its_key_and_prefixes_both_streams():
    names = "demo demo_pretrain svamp asdiv cqa gsm8k esnli anli1 anli2 anli3 jsonl"
    assert set(TASKS) == set(names.split())
    for name, task in TASKS.items():
        assert task.name == name and tuple(task.prefixes) == tuple(SEGMENTS)
    own = {"predict": "predict: ", "explain": "explain: ", "reason": "reason: "}
    assert TASKS["svamp"].prefixes == own
    own = {"predict": "solve: ", "explain": "steps: ", "reason": "steps: solve: "}
    assert TASKS["demo_pretrain"].prefixes == own


def test_validation_split_is_fixed_and_disjoint(tmp_path):
    jsonl(tmp_path, n=40)
    base = loaded("jsonl", tmp_path)
    held = sorted(np.random.default_rng(0).permutation(40)[:4])
    assert ids(base.valid["jsonl"]) == [f"jsonl/train/{i}" for i in held]
    assert ids(base.train) == [f"jsonl/train/{i}" for i in range(40) if i not in held]
    assert len(base.test["jsonl"]) == 5
    for settings in ({"subsample": 0.5}, {"subsample": 7, "subsample_seed": 3}):
        assert loaded("jsonl", tmp_path, **settings).valid == base.valid
    assert len(loaded("jsonl", tmp_path, valid_share=0.25).valid["jsonl"]) == 10


def test_validation_split_is_the_one_of_the_release():
    datasets = pytest.importorskip("datasets")
    from ibdistill.data.tasks.base import hold_out

    for n in (10, 803):
        split = datasets.Dataset.from_dict({"i": list(range(n))}).train_test_split(test_size=0.1, seed=0)
        train, valid = hold_out(list(range(n)), 0.1)
        assert (set(train), set(valid)) == (set(split["train"]["i"]), set(split["test"]["i"]))
        assert len(valid) == math.ceil(0.1 * n)


def test_a_split_of_the_source_is_kept(tmp_path):
    both = loaded("jsonl", jsonl(tmp_path, n=20, valid=3))
    assert len(both.train) == 20 and ids(both.valid["jsonl"]) == [f"jsonl/valid/{i}" for i in range(3)]


def test_subsamples_are_nested_and_seeded(tmp_path):
    jsonl(tmp_path, n=40)  # 36 to train on
    sets = [set(ids(loaded("jsonl", tmp_path, subsample=s).train)) for s in (2, 5, 0.5, 30, 36, 1.0)]
    assert [len(s) for s in sets] == [2, 5, 18, 30, 36, 36]
    assert all(small <= large for small, large in itertools.pairwise(sets))
    other = set(ids(loaded("jsonl", tmp_path, subsample=0.5, subsample_seed=1).train))
    assert len(other) == 18 and other != sets[2]
    kept = [int(i.split("/")[2]) for i in ids(loaded("jsonl", tmp_path, subsample=5).train)]
    assert kept == sorted(kept)


def test_subsample_that_the_data_cannot_give(tmp_path):
    jsonl(tmp_path, n=40)
    load_refused(
        "data.subsample 37 asks for 37 of the 36 training records of task 'jsonl'; it must leave 1 to 36",
        *("jsonl", tmp_path),
        subsample=37,
    )
    load_refused("data.subsample 0.001 asks for 0 of the 36", "jsonl", tmp_path, subsample=0.001)


def test_missing_rationales(tmp_path):
    jsonl(tmp_path, rationale="")
    load_refused(f"{tmp_path / 'train.jsonl'}:1: no rationale, and the method trains on", "jsonl", tmp_path)
    load_refused("36 of 36 training records of task 'jsonl' lack one. Ways out: --tea", "jsonl", tmp_path)
    load_refused("--teacher.rationales missing (a teacher", "jsonl", tmp_path)
    load_refused("--objective.method finetune (no record needs one); data.path with", "jsonl", tmp_path)
    load_refused("36 of 36 training records", "jsonl", tmp_path, missing_rationales="predict_only")
    assert len(loaded("jsonl", tmp_path, needs_rationale=False).train) == 36
    array(
        tmp_path / "SVAMP.json",
        [{"Body": "B", "Question": "Q", "Equation": "( 1.0 + 1.0 )", "Answer": 2}] * 20,
    )
    load_refused(f"{tmp_path / 'SVAMP.json'}: item", "svamp", tmp_path)
    load_refused("14 of 14 training records of task 'svamp' lack one", "svamp", tmp_path)
    load_refused("--data.derive_rationales true (they are made", "svamp", tmp_path)
    load_refused("the DSS data release", "svamp", tmp_path)


def test_records_without_a_rationale_may_train_on_their_labels(tmp_path):
    rows = [{"question": f"q{i}", "label": "x", "rationale": "r" if i % 3 else None} for i in range(30)]
    lines(tmp_path / "train.jsonl", rows)
    lines(tmp_path / "test.jsonl", rows[:2])
    message = "train.jsonl:1: no rationale, and the method trains on rationales; 10 of 27 training records"
    load_refused(message, "jsonl", tmp_path)
    load_refused("Ways out: --data.missing_rationales predict_only (they train on", "jsonl", tmp_path)
    result = loaded("jsonl", tmp_path, missing_rationales="predict_only")
    assert [record.rationale for record in result.train].count("") == 10 and len(result.train) == 27
    assert result.report["jsonl/train/no_rationale"] == 10
    assert "jsonl/train/no_rationale" not in loaded("jsonl", tmp_path, needs_rationale=False).report


def test_a_step_counts_the_tokens_of_records_without_a_rationale_in_the_predict_stream_alone():
    """The weights of a step divide each stream by its own tokens, and the term between them by the records
    that have both."""
    lengths = [(5, 2, 0), (6, 3, 7), (4, 2, 0), (7, 2, 4)]
    sampler = Sampler(features_of(lengths), DataConfig(), batch_size=4, seed=0)
    counts = sampler.counts(0)
    assert counts == {"predict": 9, "explain": 11, "questions": 4, "explained": 2, "question_tokens": 22}
    weights = step_weights(ObjectiveConfig(method="ib", alpha=0.5, beta=0.1, estimator="paper"), counts)
    assert (weights["ce_predict"], weights["ce_explain"], weights["mi"]) == (0.5 / 9, 0.5 / 11, 0.1 / 2)
    nobody = Sampler(features_of([(5, 2, 0)] * 4), DataConfig(), batch_size=4, seed=0).counts(0)
    assert (nobody["explain"], nobody["explained"]) == (0, 0)
    assert step_weights(ObjectiveConfig(method="dss"), nobody)["ce_explain"] == 0.5  # of a sum that is 0


def test_unparsable_outputs_may_leave_their_records_to_the_predict_stream(tmp_path):
    svamp(tmp_path, ["?" if i % 4 == 0 else said(i) for i in range(20)])
    refused, allowed = (
        loaded("svamp", tmp_path, missing_rationales=value) for value in ("refuse", "predict_only")
    )
    unexplained = [record for record in allowed.train if not record.rationale]
    assert len(allowed.train) == 18 and [r for r in allowed.train if r.rationale] == refused.train
    assert allowed.report["svamp/train/no_rationale"] == len(unexplained) == 18 - len(refused.train) > 0
    assert all(record.label == record.gold for record in unexplained)
    # Where the label too would be the LLM's, nothing is left to train on.
    labelled = loaded("svamp", tmp_path, missing_rationales="predict_only", label_source="llm")
    assert ids(labelled.train) == ids(refused.train)


def test_anli_explains_only_some_records(monkeypatch):
    import datasets

    rows = [
        {"premise": "P", "hypothesis": f"H{i}", "label": i % 3, "reason": "r" * (i % 2)} for i in range(10)
    ]
    splits = {"train_r1": rows, "dev_r1": rows[:2], "test_r1": rows[:3]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)
    result = loaded("anli1")
    assert [record.question for record in result.train] == [f"P</s>H{i}" for i in (1, 3, 5, 7, 9)]
    assert result.report["anli1/train/no_rationale"] == 5
    assert len(loaded("anli1", needs_rationale=False).train) == 10
    assert len(loaded("anli1", missing_rationales="predict_only").train) == 10


def test_mixture(tmp_path):
    svamp(tmp_path, [said(i) for i in range(10)])
    jsonl(tmp_path, n=20)
    for split in ("train", "test"):
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        text = "".join(json.dumps({"question": f"q{i}", "answer": "So.\n#### 1"}) + "\n" for i in range(20))
        (tmp_path / f"gsm8k/{split}.jsonl").write_text(text)
    result = loaded(["svamp", "gsm8k"], tmp_path, subsample=0.5, mixture_weights=[1.0, 2.0])
    assert [record.task for record in result.train] == ["svamp"] * 4 + ["gsm8k"] * 9
    assert {task: len(part) for task, part in result.valid.items()} == {"svamp": 1, "gsm8k": 2}
    assert {task: len(part) for task, part in result.test.items()} == {"svamp": 2, "gsm8k": 20}
    assert len(set(ids(result.train))) == 13


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("svanp", {}, "data.task 'svanp' is unknown: choose from demo, demo_pretrain, svamp, asdiv, cqa, "),
        ("svanp", {}, "did you mean 'svamp'?"),
        (["svamp", "zzz"], {}, "data.task 'zzz' is unknown"),
        ([], {}, "data.task is []: name at least one task"),
        (["demo", "demo"], {}, "data.task is ['demo', 'demo']: name at least one task, and each only once"),
        ("demo", {"mixture_weights": [1.0, 2.0]}, "data.mixture_weights is [1.0, 2.0]: give one positive"),
        (["demo", "svamp"], {"mixture_weights": [1.0]}, "each of the 2 tasks of data.task (demo, svamp)"),
        ("demo", {"path": "x"}, "data.path 'x': demo is generated; leave data.path empty"),
        ("svamp", {"path": "nowhere"}, "data.path 'nowhere' does not exist"),
        ("jsonl", {}, "data.path is not set: the task 'jsonl' needs a file"),
        ("cqa", {"derive_rationales": True}, "data.derive_rationales is for task svamp, not cqa"),
        ("gsm8k", {"answer_check": "choice"}, "data.answer_check is 'choice', which is for task jsonl;"),
        (["cqa", "esnli"], {"choice_labels": "letter"}, "for tasks of options (cqa), not cqa, esnli"),
    ],
)  # fmt: skip
def test_bad_settings(task, settings, message):
    load_refused(message, task, **settings)


def test_too_few_records(tmp_path):
    jsonl(tmp_path, n=1)
    load_refused(
        "task 'jsonl' has no train records left; give it more, or change data.valid_share", "jsonl", tmp_path
    )
    load_refused("task 'jsonl' has no train records left", "jsonl", tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text("")
    load_refused("the test split of task 'jsonl' is empty", "jsonl", tmp_path)


def test_demo_keeps_its_splits_and_numbers(monkeypatch):
    def record(split, i):
        return Record(f"demo/{split}/{i}", "demo", "n0 and n1", "n0 + n1", "add", "n0 + n1", ("2", "3"))

    splits = {split: [record(split, i) for i in range(4)] for split in ("train", "valid", "test")}
    monkeypatch.setattr(demo, "load_demo", lambda task, seed: splits)
    result = loaded("demo", map_numbers=True, subsample=2)
    assert len(result.train) == 2 and set(result.train) < set(splits["train"])
    assert (result.valid, result.test) == ({"demo": splits["valid"]}, {"demo": splits["test"]})
    assert TASKS["demo"].is_correct("5", result.train[0])


def test_demo_pretraining_is_scored_on_its_validation_split(monkeypatch):
    records = [Record(f"demo_pretrain/train/{i}", "demo_pretrain", "q", "a", "r", "a") for i in range(20)]
    monkeypatch.setattr(demo, "load_demo", lambda task, seed: {"train": records})
    result = loaded("demo_pretrain")
    assert len(result.train) == 18 and result.test == result.valid and len(result.test["demo_pretrain"]) == 2


def test_ground_truths_that_have_no_value_are_reported(tmp_path):
    svamp(tmp_path, [said(i) for i in range(10)])
    array(
        tmp_path / "svamp/svamp_test.json", [{"input": "q", "label": "10:45"}, {"input": "q", "label": "9"}]
    )
    assert loaded("svamp", tmp_path).report["svamp/test/unscorable"] == 1


def test_ground_truths_that_the_chosen_check_cannot_accept_are_reported(tmp_path):
    rows = [{"question": "q\n(a) yes\n(b) no", "label": label} for label in ("5", "3/4", "many", "b")]
    for split, times in (("train", 5), ("test", 1)):
        lines(tmp_path / f"{split}.jsonl", rows * times)

    def unscorable(**settings):
        report = loaded("jsonl", tmp_path, needs_rationale=False, **settings).report
        return report.get("jsonl/test/unscorable", 0)

    checks = ("text", "value", "choice")
    assert [unscorable(answer_check=check) for check in checks] == [0, 2, 3]


def test_letters_for_labels_are_of_the_training_records_only(tmp_path):
    row = {"question": "q?", "choices": ["safe", "Bank", "c", "d", "e"], "answer": "Bank",
           "abstractive_explanation": "r"}  # fmt: skip
    for split in ("train", "test"):
        lines(tmp_path / f"cqa/cqa_{split}.json", [row] * 20)
    result = loaded("cqa", tmp_path, needs_rationale=False, choice_labels="letter")
    assert {(r.label, r.gold) for r in result.train} == {("(b)", "Bank")}
    assert all(TASKS["cqa"].is_correct(r.label, r) for r in result.train)
    assert {(r.label, r.gold) for r in result.valid["cqa"] + result.test["cqa"]} == {("Bank", "Bank")}


@real_data
def test_real_data():
    with pytest.raises(ValueError, match=r"SVAMP\.json: item \d+: no rationale.*finetune"):
        loaded("svamp", DATA)
    result = loaded("svamp", DATA, needs_rationale=False, map_numbers=True)
    assert [len(part) for part in (result.train, result.valid["svamp"], result.test["svamp"])] == [
        720,
        80,
        200,
    ]
    assert not any("unscorable" in key for key in result.report)
    assert sum(re.search(r"n\d", record.label) is not None for record in result.train) > 700
    result = loaded(["cqa", "gsm8k"], DATA, subsample=100)
    assert [record.task for record in result.train] == ["cqa"] * 100 + ["gsm8k"] * 100
    assert result.report["cqa/valid/records"] == 761 and result.report["gsm8k/valid/records"] == 748
    assert not any("unscorable" in key for key in result.report)


def test_questions_of_a_split_that_are_trained_on_are_counted(tmp_path, caplog):
    """Several lines per question, as trace sets have them, fall into all parts of one file."""
    rows = [{"question": f"q{i}", "label": "x", "rationale": f"r{j}"} for i in range(20) for j in range(5)]
    lines(tmp_path / "one.jsonl", rows)
    found = loaded("jsonl", tmp_path / "one.jsonl")
    trained = {record.question for record in found.train}
    for split, part in (("valid", found.valid["jsonl"]), ("test", found.test["jsonl"])):
        shared = sum(record.question in trained for record in part)
        assert shared > 8 and f"jsonl/{split}: {shared} of {len(part)} questions stand in the" in caplog.text
    caplog.clear()
    lines(tmp_path / "once.jsonl", [row | {"question": f"q{i}"} for i, row in enumerate(rows)])
    loaded("jsonl", tmp_path / "once.jsonl")
    assert "stand in the training records" not in caplog.text
