"""A run in which some records have no rationale: they train the predict stream, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
from miniatures import lines

from ibdistill.objectives.weights import means


@pytest.fixture
def folder(tmp_path):
    """Eight training records in two lengths, half of them without a rationale."""
    rows = [
        {"question": f"what is {i} ?", "label": "odd" if i % 2 else "even", "rationale": reason}
        for i in range(8)
        for reason in (f"half of {i} is whole . " * 2 if i % 4 < 2 else None,)
    ]
    for split in ("train", "valid", "test"):
        lines(tmp_path / f"data/{split}.jsonl", rows)
    return tmp_path / "data"


def job_of(make_job, folder, **settings):
    return make_job(
        **{
            "data.task": "jsonl",
            "data.path": str(folder),
            "data.subsample": 1.0,
            "data.missing_rationales": "predict_only",
            "student.tokenizer": "train",
            "student.vocab_size": 60,
            "optim.batch_size": 8,
            **settings,
        }
    )


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_each_term_is_a_mean_over_the_records_that_have_it(make_job, folder, micro_batch_size):
    """The terms of one step are torch's: over all labels, and over the rationales that there are."""
    from ibdistill.train import train_step

    settings = {"objective.method": "ib", "optim.micro_batch_size": micro_batch_size}
    job = job_of(make_job, folder, **settings)
    features, counts = job.features, job.sampler.counts(0)
    explained = features.targets["explain"].lengths > 0
    assert explained.sum() == 4 == counts["explained"] and counts["questions"] == 8
    model = job.engine.module.model.eval()
    expected = {}
    for stream, rows in (("predict", range(8)), ("explain", explained.nonzero()[0])):
        total = 0.0
        for row in rows:
            question, target = (
                torch.tensor(part[stream][row]).long()[None]
                for part in (features.questions, features.targets)
            )
            with torch.no_grad():
                total += model(input_ids=question, labels=target).loss.item() * target.numel()
        assert counts[stream] == features.targets[stream].lengths.sum()
        expected[f"ce_{stream}"] = total / counts[stream]
    train_step(job)
    interval = job.meter.close_interval()
    terms = means(interval.terms, interval.counts)
    assert {name: terms[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert job.state.skipped == 0


def test_a_step_without_any_rationale_trains_the_predict_stream(make_job, folder):
    """With batches of two some have no rationale at all; nothing is divided by zero."""
    from ibdistill.train import train_step

    job = job_of(make_job, folder, **{"objective.method": "ib", "optim.batch_size": 2})
    counts = [job.sampler.counts(step)["explained"] for step in range(12)]
    assert 0 in counts and max(counts) > 0
    for _ in counts:
        train_step(job)
    assert job.state.skipped == 0
    assert all(weight.isfinite().all() for weight in job.engine.module.parameters())
