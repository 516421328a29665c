"""The cache's form sampled: unbiased gradients, draws that depend on text and seed alone, what it refuses."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from harness import FORKED, as_arguments, launch, same, steps, tiny, weights
from safetensors.torch import load_file
from test_teacher_answers import ONLINE

from ibdistill.config.load import load_settings
from ibdistill.ops.head_loss import Stream, TeacherDistributions, TeacherStream, Weights, head_loss
from ibdistill.teacher import answer_tensors, sampled_form
from ibdistill.training.prepare import prepare

SAMPLED = ONLINE | {"objective.method": "kd", "teacher.cache_form": "sampled", "data.subsample": 24}


def gradient_of(target: TeacherStream, student, head=None) -> torch.Tensor:
    """The gradient of the distillation term for the student's states, [N, D]."""
    hidden, weight = student
    hidden = hidden.clone().requires_grad_()
    n = len(hidden)
    stream = Stream(hidden, torch.zeros(n, dtype=torch.int64), torch.tensor([0, n]))
    teacher = TeacherDistributions(target, None, head)
    total, _ = head_loss(stream, None, weight, weights=Weights(0.0, kd_predict=1.0), teacher=teacher)
    return torch.autograd.grad(total, hidden)[0]


def models(rows: int, V: int):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return (draw(rows, 3), draw(V, 3)), draw(rows, 2), draw(V, 2)


def unpacked(drawn: torch.Tensor, V: int) -> TeacherStream:
    return sampled_form.unpack(**sampled_form.pack(drawn), k=min(V, drawn.shape[1]), vocabulary=V)


@pytest.mark.parametrize(("V", "n"), [(4, 1), (4, 3), (2, 4)])
def test_the_mean_gradient_over_all_draws_is_the_full_one(V, n):
    student, hidden, head = models(1, V)
    q, mean = torch.softmax(hidden @ head.T, -1)[0], 0.0
    for tokens in itertools.product(range(V), repeat=n):
        probability = q[list(tokens)].prod()
        mean = mean + probability * gradient_of(unpacked(torch.tensor([tokens]), V), student)
    full = gradient_of(TeacherStream(hidden), student, head)
    torch.testing.assert_close(mean, full, rtol=1e-6, atol=1e-7)  # the tail keeps 1e-8 of probability


def test_the_mean_gradient_over_seeds_is_the_full_one_within_its_error():
    V, seeds = 40, 200
    student, hidden, head = models(30, V)
    keys, lengths = [b"a" * 16, b"b" * 16], [20, 10]
    found = []
    for seed in range(seeds):
        u = sampled_form.uniforms(keys, "explain", lengths, 12, seed)
        drawn = sampled_form.draw(hidden, (head, None, None), 1.0, u, chunk=7)
        found.append(gradient_of(unpacked(drawn, V), student))
    found, full = torch.stack(found), gradient_of(TeacherStream(hidden), student, head)
    z = (found.mean(0) - full) / (found.std(0) / seeds**0.5)
    assert z.abs().max() < 4.5 and 0.8 < z.std() < 1.2  # 90 numbers of about unit variance


def test_a_softcap_and_a_temperature_shape_the_draws():
    V, n = 7, 20_000
    _, hidden, head = models(2, V)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    u = sampled_form.uniforms([b"c" * 16], "answer", [2], n, 5)
    drawn = sampled_form.draw(hidden, (head, bias, 1.5), 2.0, u)
    q = torch.softmax(1.5 * torch.tanh((hidden @ head.T + bias) / 1.5) / 2.0, -1)
    shares = torch.stack([row.bincount(minlength=V) for row in drawn]) / n
    assert ((shares - q).abs() < 4.5 * (q * (1 - q) / n).sqrt()).all()


def test_draws_depend_on_text_segment_and_seed_alone():
    def numbers(*arguments):
        return sampled_form.uniforms(*arguments[:3], 5, *arguments[3:])

    both = numbers([b"a", b"b"], "explain", [3, 2], 1)
    assert torch.equal(
        both, torch.cat([numbers([b"a"], "explain", [3], 1), numbers([b"b"], "explain", [2], 1)])
    )
    others = [numbers([b"a"], *rest) for rest in (("predict", [3], 1), ("explain", [3], 2))]
    assert all(not torch.equal(both[:3], other) for other in others)
    assert numbers([], "explain", [], 1).shape == (0, 5)


def test_shares_are_counts_and_tokens_differ():
    drawn = torch.tensor([[5, 5, 5, 1], [0, 1, 2, 3], [5, 0, 5, 0]])
    packed = sampled_form.pack(drawn)
    assert packed["distinct"].tolist() == [2, 4, 2] and packed["ids"].tolist() == [1, 5, 0, 1, 2, 3, 0, 5]
    assert packed["counts"].tolist() == [1, 3, 1, 1, 1, 1, 2, 2]
    more = sampled_form.pack(torch.tensor([[3, 3, 3, 3]]))
    both = {f"{s}.{name}": x for s, p in (("predict", more), ("explain", packed)) for name, x in p.items()}
    targets = answer_tensors.unpack(both, answer_tensors.NO_HEAD, 6).targets
    assert targets["predict"].ids.shape == (1, 4) and targets["predict"].probabilities[0, 0] == 1
    got = targets["explain"]
    assert got.ids[0, :2].tolist() == [5, 1] and got.probabilities[0].tolist() == [0.75, 0.25, 0, 0]
    assert all(len(set(row)) == 4 for row in got.ids.tolist())
    parts = {f"explain.{name}": x for name, x in packed.items()}
    entries = answer_tensors.pieces(parts, {"explain": np.array([2, 0, 1])})
    assert [len(entry["explain.ids"]) for entry in entries] == [6, 0, 2]
    joined = answer_tensors.join(entries, torch.device("cpu"))
    assert all(torch.equal(joined[name], parts[name]) for name in parts)
    assert sampled_form.unpack(**sampled_form.pack(drawn[:0]), k=2, vocabulary=6).ids.shape == (0, 2)


def test_asking_and_reading_give_the_same_step(make_job, tmp_path, world):
    """The second run reads all answers and loads no teacher; a third of another seed is refused."""
    cache = {"teacher.cache": str(tmp_path / "cache")}
    asked = make_job(tmp_path / "one", **SAMPLED | cache)
    steps(asked, 4)  # the fourth reads
    asked.teacher_answers.flush()
    read = make_job(tmp_path / "two", **SAMPLED | cache | {"teacher.placement": "cache"})
    assert read.teacher_answers.teacher is None
    steps(read, 4)
    assert same(weights(asked), weights(read))
    settings = tiny(tmp_path / "three", **SAMPLED | cache) | {"run.seed": 7}
    with pytest.raises(ValueError, match="seed is 0 there and 7 here"):
        prepare(load_settings(None, settings), world)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"objective.divergence": "jsd"},
            "divergence is 'jsd'.*take objective.divergence forward, or",
        ),
        ({"objective.kd_entropy": "teacher"}, "objective.kd_entropy is 'teacher'"),
        (
            {"objective.method": "ib+kd", "objective.mi_pair": "teacher", "objective.estimator": "paper"},
            "objective.mi_pair is 'teacher'",
        ),
        ({"teacher.cache": ""}, "there is no teacher.cache that would keep what is sampled"),
        (
            {"teacher.cache_form": "topk", "teacher.cache_samples": 9},
            "cache_samples is 9, .*that is 'topk'; take",
        ),
        ({"teacher.cache_samples": 256}, r"teacher.cache_samples is 256; it must be in 1 .. 255"),
    ],
)
def test_what_cannot_go_with_draws_is_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, tiny(tmp_path, **SAMPLED, **{"teacher.cache": "x"}) | more)


def test_through_train_py_with_models_from_a_folder(tmp_path):
    """A run's student becomes student and teacher of the next, at its defaults, on 2 ranks and on 1."""
    short = {"optim.max_steps": 4, "data.subsample": 24, "run.test_limit": 4, "run.report_to": []}
    # With its usual eps Adam makes a whole step of a gradient that is only rounding, which ranks change.
    short |= {"optim.adam_eps": 0.1, "optim.lr": 0.1}

    def run(name, ranks, **more):
        log = tmp_path / f"{name}.log"
        arguments = as_arguments(tiny(tmp_path / name, **short | more))
        assert launch([FORKED, str(ranks), *arguments], log=log) == 0, log.read_text()[-4000:]
        return json.loads((tmp_path / name / "result.json").read_text())

    run("first", 1)
    folder = str(tmp_path / "first/student")
    taught = {
        "student.dropout": 0.0,
        "student.model": folder,
        "teacher.model": folder,
        "teacher.placement": "replica",
    }
    taught |= {"objective.method": "kd", "objective.kd_later": 1.0, "objective.kd_entropy": "student"}
    taught |= {"teacher.cache_form": "sampled", "teacher.cache": str(tmp_path / "cache")}
    run("two", 2, **taught)
    run("one", 1, **taught | {"teacher.placement": "cache"})
    pairs = [load_file(tmp_path / name / "student/model.safetensors") for name in ("two", "one")]
    assert all(torch.allclose(x, pairs[1][name], atol=1e-5) for name, x in pairs[0].items())
    assert any(path.suffix == ".safetensors" for path in (tmp_path / "cache").iterdir())
    assert "2503.16870" in (tmp_path / "one/student/README.md").read_text()
