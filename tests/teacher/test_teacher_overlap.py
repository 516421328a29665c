"""A teacher that works beside the student: what it reads lives until the student waits for it.

No GPU is needed: `torch.cuda`'s streams are faked. Work that is begun on the teacher's stream ends when the
student's stream waits for it, and until then whatever it reads has to be alive.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import ClassVar

import pytest
import torch
from harness import same, steps, weights

from ibdistill.runtime import hardware
from ibdistill.teacher.teacher import Teacher

ONLINE = {
    "teacher.placement": "replica",
    "teacher.model": "demo-teacher",
    "teacher.precision": "fp32",
    "objective.method": "ib+kd",
    "student.dropout": 0.0,
}


class Streams:
    """The student's and the teacher's stream, and the batches that the teacher's stream still has to read."""

    def __init__(self) -> None:
        self.unread: list[weakref.ref] = []
        self.waits = 0
        self.recorded = 0
        self.on_teachers = False

    def wait_stream(self, other: Streams | Teachers) -> None:
        """What the student's stream does: from here on the teacher's work is done."""
        assert all(batch() is not None for batch in self.unread), "a batch died before the wait"
        self.unread.clear()
        self.waits += 1

    @contextlib.contextmanager
    def on(self, stream: Teachers):
        self.on_teachers = True
        yield
        self.on_teachers = False


class Teachers:
    """The teacher's stream; that it waits for the student's is of no interest."""

    def wait_stream(self, other: Streams) -> None:
        pass


@pytest.fixture
def streams(monkeypatch) -> Streams:
    fake, honest = Streams(), Teacher.__call__

    def asked(self, batch):
        if fake.on_teachers:
            fake.unread.append(weakref.ref(batch))
        return honest(self, batch)

    def recorded(tensor, stream):
        assert stream is fake
        fake.recorded += 1

    monkeypatch.setattr(Teacher, "__call__", asked)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake)
    monkeypatch.setattr(torch.cuda, "stream", fake.on)
    monkeypatch.setattr(torch.Tensor, "record_stream", recorded)
    return fake


@pytest.fixture
def job(make_job, streams):
    made = make_job(**ONLINE)
    made.teacher_answers._stream = Teachers()
    assert made.teacher_answers.overlaps
    return made


def begin(job, rows) -> weakref.ref:
    """Let the teacher begin on these records, as a training step does, and forget their batch."""
    batch = job.collate(rows)
    job.teacher_answers.start(rows, batch)
    return weakref.ref(batch)


def test_a_batch_lives_until_its_answer_is_waited_for_and_no_longer(job, streams):
    begun = begin(job, [3, 5])
    assert begun() is not None and len(streams.unread) == 1 and streams.recorded >= 3
    answer = job.teacher_answers.of([3, 5], job.collate([3, 5]))
    assert streams.waits == 1 and begun() is None
    again = job.teacher_answers.of([3, 5], job.collate([3, 5]))  # asked at once, without a stream
    assert streams.waits == 1
    assert all(torch.equal(a, b) for a, b in zip(answer.tensors(), again.tensors(), strict=True))


def other_rows(job) -> None:
    job.teacher_answers.of([1, 2], job.collate([1, 2]))


def other_features(job) -> None:
    job.teacher_answers.set_features(job.features, unchanged=len(job.features))


def another_start(job) -> None:
    begin(job, [1, 2])


@pytest.mark.parametrize("instead", [other_rows, other_features, another_start])
def test_an_answer_that_nobody_asks_for_is_waited_for_too(job, streams, instead):
    begun = begin(job, [3, 5])
    instead(job)
    assert streams.waits == 1 and begun() is None


def test_steps_with_overlap_are_those_without(job, streams, make_job, tmp_path):
    """Every micro-batch but the first was begun ahead, too."""
    steps(job, 3)
    assert streams.waits == 2
    plain = make_job(tmp_path / "plain", **ONLINE)
    steps(plain, 3)
    assert streams.waits == 2 and same(weights(job), weights(plain))


class Late(hardware.ToHost):
    """A copy that is on its way until somebody waits for it, as from a GPU; it notes what was waited for."""

    waited: ClassVar[list[Late]] = []
    made: ClassVar[list[Late]] = []

    def __init__(self, tensors) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        Late.made.append(self)

    @property
    def is_there(self) -> bool:
        return False

    def wait(self) -> dict[str, torch.Tensor]:
        Late.waited.append(self)
        return self._tensors


@pytest.fixture
def late(monkeypatch) -> None:
    Late.waited, Late.made = [], []
    monkeypatch.setattr(hardware, "ToHost", Late)


def test_filling_the_cache_waits_for_no_copy_of_the_answer_just_begun(job, streams, late, make_job, tmp_path):
    cached = make_job(tmp_path / "cached", **ONLINE, **{"teacher.cache": str(tmp_path / "cache")})
    answers = cached.teacher_answers
    answers._stream = Teachers()
    begin(cached, [3, 5])
    assert len(Late.made) == 1 and not Late.waited and answers._keys[3] not in answers._cache
    begin(cached, [1, 2])
    assert Late.waited == Late.made[:1]  # the copy before, which has had a step's time
    assert answers._keys[3] in answers._cache and answers._keys[1] not in answers._cache
    answers.flush()
    assert Late.waited == Late.made and answers._keys[1] in answers._cache


def test_a_cache_that_is_filled_late_holds_the_same_and_the_steps_are_the_same(
    streams, late, make_job, tmp_path, monkeypatch
):
    """Over two epochs of records, the second of which is read; and partly known micro-batches."""
    found = {}
    for name in ("late", "at once"):
        if name == "at once":
            monkeypatch.undo()
        settings = ONLINE | {"teacher.cache": str(tmp_path / f"cache {name}"), "data.subsample": 20}
        made = make_job(tmp_path / name, **settings)
        steps(made, 5)
        made.teacher_answers.flush()
        keys = made.teacher_answers._keys
        found[name] = weights(made), {k: e[0] for k in keys if (e := made.teacher_answers._cache.get([k]))}
    (ours, entries), (theirs, others) = found.values()
    assert same(ours, theirs) and entries.keys() == others.keys() and len(entries) >= 16
    assert all(same(entries[key], others[key]) for key in entries)
    assert len(Late.made) == len(Late.waited) >= 2
