"""Micro-batches that a thread makes ahead: the same ones, in the same order, with the same errors."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from harness import same, steps, tiny, weights

from ibdistill.config.load import load_settings
from ibdistill.data import batches
from ibdistill.training import assemble
from ibdistill.training.prefetch import Prefetch
from ibdistill.training.prepare import prepare

SETTINGS = {"student.dropout": 0.1, "optim.micro_batch_size": 4, "data.subsample": 20}
"""20 records are two steps of 8 questions an epoch, so the steps below pass from epoch to epoch."""


@pytest.fixture
def makers(monkeypatch) -> list[str]:
    """The name of the thread that made each micro-batch, in order."""
    names, honest = [], batches.collate

    def collate(*args, **kwargs):
        names.append(threading.current_thread().name)
        return honest(*args, **kwargs)

    monkeypatch.setattr(batches, "collate", collate)
    return names


def test_steps_are_those_without_and_each_micro_batch_is_made_once(make_job, tmp_path, makers):
    plain = make_job(tmp_path / "plain", **SETTINGS)
    steps(plain, 5)
    assert set(makers) == {"MainThread"} and len(makers) == 10
    makers.clear()
    ahead = make_job(tmp_path / "ahead", **SETTINGS)
    ahead.prefetch = Prefetch(pins=False)
    steps(ahead, 5)
    assert same(weights(plain), weights(ahead))
    ahead.prefetch.get(ahead._shares(5)[1])  # the last that is under way
    assert [name.split("_")[0] for name in makers] == ["MainThread"] * 2 + ["prefetch"] * 10


def test_a_resumed_run_goes_on_with_the_same_bits(make_job, tmp_path):
    whole = make_job(tmp_path / "whole", **SETTINGS)
    steps(whole, 5)
    first = make_job(tmp_path / "cut", **SETTINGS)
    first.prefetch = Prefetch(pins=False)
    steps(first, 3)
    first.checkpoints.save(first.engine, first.state)
    second = make_job(tmp_path / "cut", **SETTINGS)
    second.prefetch = Prefetch(pins=False)
    assert second.state.step == 3
    steps(second, 2)
    assert same(weights(whole), weights(second))


def test_nothing_is_made_for_steps_behind_the_last_one(make_job, makers):
    job = make_job(**SETTINGS, **{"optim.max_steps": 2})
    job.prefetch = Prefetch(pins=False)
    steps(job, 2)
    assert len(makers) == 4 and not job.prefetch._begun


def test_on_a_gpu_they_are_made_ahead_in_pinned_memory_and_in_widths_of_8(world, tmp_path, monkeypatch):
    """Once the engine is there, the run believes that it is on a GPU."""
    mine, honest = dataclasses.replace(world), assemble.Meter
    pinned: dict[int, torch.Tensor] = {}

    def meter():
        object.__setattr__(mine, "device", torch.device("cuda", 0))
        return honest()

    monkeypatch.setattr(assemble, "Meter", meter)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.setdefault(id(tensor), tensor))
    job = prepare(load_settings(None, tiny(tmp_path / "run", **SETTINGS)), mine)
    try:
        now = [batch for _, batch in job.micro_batches()]
        batch = job.prefetch.get(job._shares(1)[0])
        assert {id(ids) for ids in (batch.input_ids, *batch.decoder_input_ids.values())} <= pinned.keys()
        assert not {id(cu) for cu in batch.cu.values()} & pinned.keys()  # the host reads it
        assert all(made.input_ids.shape[1] % 8 == 0 for made in (*now, batch))
    finally:
        job.prefetch.forget()
        job.board.close()
        job.engine.destroy()


def test_an_error_is_raised_by_the_step_that_needs_the_micro_batch(make_job, monkeypatch):
    job = make_job(**SETTINGS)
    job.prefetch = Prefetch(pins=False)
    bad, honest = job._shares(2)[1].tobytes(), batches.collate

    def collate(features, indices, *args, **kwargs):
        if np.asarray(indices).tobytes() == bad:
            raise ValueError("a record that cannot be read")
        return honest(features, indices, *args, **kwargs)

    monkeypatch.setattr(batches, "collate", collate)
    steps(job, 2)
    with pytest.raises(ValueError, match="a record that cannot be read"):
        steps(job, 1)
    assert job.state.step == 2


def test_other_records_are_not_taken_for_the_old_ones(make_job):
    """Pseudo-labelled records change what an index stands for."""
    job = make_job(**SETTINGS)
    job.prefetch = Prefetch(pins=False)
    steps(job, 1)
    old = job._shares(1)[0]
    before = job.prefetch.get(old)
    assert before is not None and before.question_ids == job.collate(old).question_ids
    job.mix([])
    assert job.prefetch.get(old) is None
    steps(job, 1)


def test_what_is_not_needed_any_more_is_let_go():
    made = Prefetch(pins=False)
    rows = [np.array([i]) for i in range(3)]
    made.begin(rows[:2], lambda indices: int(indices[0]))
    assert [made.get(row) for row in rows] == [0, 1, None]
    made.begin(rows[1:], lambda indices: 10 + int(indices[0]))
    assert [made.get(row) for row in rows] == [None, 1, 12]
