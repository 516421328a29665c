"""Teacher answers: asked once, read later; a cache of something else is refused; top k loses little."""

from __future__ import annotations

from functools import partial

import pytest
import tokenizer_variants
import torch
from harness import same, steps, tiny, weights
from safetensors.torch import load
from workers.one_step import gradients_of_step

from ibdistill.config.load import load_settings
from ibdistill.config.sections import TeacherConfig
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.teacher import answer_tensors, answers
from ibdistill.teacher.cache import AnswerCache
from ibdistill.teacher.teacher import Teacher
from ibdistill.training.prepare import prepare

ONLINE = {
    "teacher.placement": "replica",
    "teacher.model": "demo-teacher",
    "teacher.precision": "fp32",
    "teacher.cache_form": "states",
    "objective.method": "ib+kd",
    "student.dropout": 0.0,
    "data.subsample": 64,  # 8 steps per epoch, no record left over
    "optim.max_steps": 24,
}


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The number of questions in each forward pass of the teacher."""
    calls: list[int] = []
    honest = Teacher.__call__

    def counted(self, batch):
        calls.append(len(batch.question_ids))
        return honest(self, batch)

    monkeypatch.setattr(Teacher, "__call__", counted)
    return calls


def terms(job) -> dict[str, float]:
    return job.meter.close_interval().terms


def step_and_compare(job, teacher: Teacher) -> None:
    """Take a step, which reads; what it read is what this teacher says about its batch, to fp32's rounding.

    A batch is padded to its longest text, and a state is a sum over other blocks in another batch: some
    hundred products in a row, of values of about 1, so about 100 times 2^-24.
    """
    ((rows, batch),) = job.micro_batches()
    read, said = job.teacher_answers.of(rows, batch), teacher(batch)
    pairs = list(zip(read.tensors(), said.tensors(), strict=True))
    assert pairs and all(a.std() > 0.1 for a, _ in pairs if a.ndim == 2)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    steps(job, 1)


@pytest.mark.parametrize("method", ["ib+kd", "ib"])
def test_the_first_epoch_asks_and_later_ones_read(make_job, tmp_path, asked, method):
    """The method ib alone reads question states only, and no head.

    While both runs ask they are the same to the last bit. The first step that reads starts from the same
    state as the one that asks, so its losses and gradients are compared; of all later ones what they read is.
    """
    online = ONLINE | {"objective.method": method}
    plain = make_job(tmp_path / "plain", **online)
    steps(plain, 8)
    after_an_epoch = weights(plain), terms(plain)
    expected = gradients_of_step(plain)
    assert asked == [8] * 9
    cached = make_job(tmp_path / "cached", **online, **{"teacher.cache": str(tmp_path / "cache")})
    asked.clear()
    steps(cached, 8)
    assert asked == [8] * 8
    assert same(weights(cached), after_an_epoch[0]) and terms(cached) == after_an_epoch[1]
    gradients = gradients_of_step(cached)
    assert terms(cached) == pytest.approx(terms(plain), rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-6), name
    asked.clear()
    teacher = plain.teacher_answers.teacher
    for _ in range(15):
        step_and_compare(cached, teacher)
    assert asked == [8] * 15  # by the comparison alone

    # another seed, another subsample of the same records, and no teacher in memory
    overrides = online | {"teacher.placement": "cache", "run.seed": 5, "data.subsample": 1.0}
    with pytest.raises(ValueError, match="lacks 15936 of the 16000 training records; run the same data once"):
        make_job(tmp_path / "more", **overrides, **{"teacher.cache": str(tmp_path / "cache")})
    again = make_job(
        tmp_path / "again",
        **online | {"teacher.placement": "cache", "run.seed": 5},
        **{"teacher.cache": str(tmp_path / "cache")},
    )
    assert again.teacher_answers.teacher is None
    asked.clear()
    steps(again, 1)
    assert asked == []
    fresh = make_job(tmp_path / "fresh", **online | {"run.seed": 5})
    steps(fresh, 1)
    cached_terms, fresh_terms = terms(again), terms(fresh)
    assert fresh_terms.keys() >= ({"vid", "kd_predict", "kd_explain"} if method == "ib+kd" else {"vid"})
    assert cached_terms == pytest.approx(fresh_terms, rel=1e-5)
    for _ in range(7):
        step_and_compare(again, teacher)


def test_records_left_over_by_an_epoch_are_asked_for_later(make_job, tmp_path, asked):
    job = make_job(**ONLINE | {"data.subsample": 60}, **{"teacher.cache": str(tmp_path / "cache")})
    steps(job, 7)  # 56 of 60
    asked.clear()
    steps(job, 7)
    assert 1 <= len(asked) <= 4


def test_a_record_keeps_its_first_answer_in_a_batch_that_is_asked_again(make_job, tmp_path):
    """The other records get theirs: the batch equals one that is asked without a cache, to rounding."""
    job = make_job(**ONLINE, **{"teacher.cache": str(tmp_path / "cache")})
    first = job.teacher_answers.of([3, 5], job.collate([3, 5]))
    kept = [
        {name: t + 1 for name, t in job.teacher_answers._cache.get([job.teacher_answers._keys[5]])[0].items()}
    ]
    job.teacher_answers._cache._buffer[job.teacher_answers._keys[5]] = kept[0]
    mixed = job.teacher_answers.of([9, 5, 3], job.collate([9, 5, 3]))
    plain = make_job(tmp_path / "plain", **ONLINE).teacher_answers.of([9, 5, 3], job.collate([9, 5, 3]))
    for stream in ("predict", "explain"):
        cu = job.collate([9, 5, 3]).cu[stream].tolist()
        ours, theirs = mixed.targets[stream].hidden, plain.targets[stream].hidden
        assert torch.equal(ours[cu[1] : cu[2]], kept[0][stream])
        assert torch.equal(ours[cu[2] :], first.targets[stream].hidden[: cu[3] - cu[2]])
        torch.testing.assert_close(ours[: cu[1]], theirs[: cu[1]])
        torch.testing.assert_close(ours[cu[2] :], theirs[cu[2] :])


@pytest.mark.parametrize(("k", "tolerance"), [(268, 1e-3), (32, 0.5)])
def test_top_k_says_nearly_what_the_states_say(make_job, tmp_path, k, tolerance):
    whole = make_job(tmp_path / "whole", **ONLINE)
    topk = make_job(
        tmp_path / "topk",
        **ONLINE
        | {"teacher.cache": str(tmp_path / "c"), "teacher.cache_form": "topk", "teacher.cache_top_k": k},
    )
    steps(whole, 1)
    steps(topk, 1)
    expected, ours = terms(whole), terms(topk)
    assert ours["kd_explain"] == pytest.approx(expected["kd_explain"], rel=tolerance)
    # merging tokens into the tail can only lose divergence
    assert ours["kd_explain"] <= expected["kd_explain"] * (1 + 1e-3)


def test_top_k_in_chunks():
    hidden, weight, bias = torch.randn(7, 4), torch.randn(9, 4), torch.randn(9)
    ids, probabilities = answer_tensors.top_k(hidden, (weight, bias, None), 3, 2.0, chunk=2)
    expected = torch.softmax((hidden @ weight.T + bias) / 2.0, -1).sort(-1, descending=True)
    assert torch.equal(ids, expected.indices[:, :3])
    torch.testing.assert_close(probabilities, expected.values[:, :3])
    ids, probabilities = answer_tensors.top_k(hidden[:0], (weight, bias, None), 3, 2.0)
    assert ids.shape == probabilities.shape == (0, 3)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"teacher.model": "t5-mini"}, "teacher"),
        ({"teacher.precision": "bf16"}, "precision"),
        ({"objective.method": "kd"}, "holds"),
        ({"teacher.cache_form": "topk"}, "top_k"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_both_fingerprints(make_job, world, tmp_path, changed, key):
    cache = {"teacher.cache": str(tmp_path / "cache")}
    make_job(tmp_path / "one", **ONLINE, **cache)
    settings = tiny(tmp_path / "two") | ONLINE | cache | changed
    with pytest.raises(ValueError, match=rf"{key} is .* there and .* here"):
        prepare(load_settings(None, settings), world)


LLAMA = tokenizer_variants.llama
T5 = tokenizer_variants.t5


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (partial(LLAMA, bos=True), partial(LLAMA, bos=False), "bos is 0 there and absent here"),
        (partial(LLAMA, bos=False), partial(LLAMA, bos=True), "bos is absent there and 0 here"),
        (partial(T5, template="<s> $A </s>"), T5, "bos is 3 there and absent here"),
        # what comes behind a question is not the tokenizer's: `token_ids` puts the end token there itself
        (partial(LLAMA, eos=True), LLAMA, None),
        (partial(T5, template=""), T5, None),
    ],
)
def test_a_cache_knows_what_stood_in_front_of_the_questions(tmp_path, there, here, said):
    config, wanted = TeacherConfig(model="demo-teacher", placement="replica"), Wanted(True, True)
    prints = [
        answer_tensors.fingerprint(config, wanted, make(tmp_path / name))
        for make, name in ((there, "there"), (here, "here"))
    ]
    AnswerCache(tmp_path / "cache", prints[0], rank=0)
    if said is None:
        AnswerCache(tmp_path / "cache", prints[1], rank=0)
        return
    with pytest.raises(ValueError, match=f"was made by something else: {said}. Choose another folder, or"):
        AnswerCache(tmp_path / "cache", prints[1], rank=0)


def test_weights_have_an_identity(tmp_path):
    from ibdistill.data import tokenizers
    from ibdistill.models import families

    tokenizer = tokenizers.demo_tokenizer()
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        families.load_preset("demo-student", tokenizer, seed).save_pretrained(tmp_path / folder)
    names = [families.identity(str(tmp_path / folder)) for folder in "abc"]
    assert names[0] == names[1] != names[2]


def test_a_full_disk_ends_the_cache_and_not_the_run(make_job, tmp_path, monkeypatch, caplog, asked):
    job = make_job(**ONLINE, **{"teacher.cache": str(tmp_path / "cache")})
    monkeypatch.setattr(
        job.teacher_answers._cache, "flush", lambda: (_ for _ in ()).throw(OSError("no space"))
    )
    monkeypatch.setattr(answers.logger, "propagate", True)
    steps(job, 9)
    assert "no space. The run goes on and asks the teacher" in caplog.text
    monkeypatch.undo()
    steps(job, 1)
    assert job.state.step == 10


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_head_that_cannot_be_read_is_written_again(make_job, tmp_path, damage):
    cache = {"teacher.cache": str(tmp_path / "cache")}
    first = make_job(tmp_path / "first", **ONLINE | cache)
    steps(first, 8)
    first.teacher_answers.flush()
    assert make_job(tmp_path / "again", **ONLINE | cache).teacher_answers.teacher is None
    path = tmp_path / "cache" / "head.tensors"
    whole = path.read_bytes()
    tensors = load(whole)
    middle = len(whole) // 2
    content = {
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "cut": whole[:-9],
    }
    path.unlink() if damage == "gone" else path.write_bytes(content[damage])
    with pytest.raises(ValueError, match="lacks the teacher's head; run the same data once with the teacher"):
        make_job(tmp_path / "alone", **ONLINE | cache | {"teacher.placement": "cache"})
    assert make_job(tmp_path / "mended", **ONLINE | cache).teacher_answers.teacher is not None
    mended = load(path.read_bytes())  # the order of the metadata differs from file to file
    assert mended.keys() == tensors.keys() and all(torch.equal(mended[k], t) for k, t in tensors.items())
