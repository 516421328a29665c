"""The benchmark on a real model: its trainers learn the same, and what it prints and draws."""

from __future__ import annotations

import json
import math

import pytest
import tiny_models
import torch
from harness import ROOT
from transformers import AutoModelForCausalLM

ITEMS = [
    {
        "ID": f"chal-{i}",
        "Body": f"Tom had {i + 3} apples and {'gave away' if i % 2 else 'ate'} {i + 1} of them.",
        "Question": "How many apples are left?",
        "Equation": f"( {i + 3}.0 - {i + 1}.0 )",
        "Answer": 2.0,
        "Type": "Subtraction",
    }
    for i in range(30)
]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    import real_model

    return real_model


def test_our_run_and_a_plain_loop_have_one_loss_and_learn_the_same(bench, tmp_path, world):
    model = tiny_models.save(tmp_path / "model", "llama", num_hidden_layers=3)
    (tmp_path / "SVAMP.json").write_text(json.dumps(ITEMS))
    case = bench.prepare(model, str(tmp_path), 2, tmp_path / "cut")
    case.batch_size, case.steps = 4, 3
    losses = {name: [made(case, world)[0](0)] for name, made in bench.MADE.items()}
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-5)
    (ours, size), (plain, as_many) = (made(case, world) for made in bench.MADE.values())
    assert size == as_many == 16 * case.model().num_parameters()
    assert 16 * bench.replace(case, tiny=True).model().num_parameters() < size
    ours, plain = ([step(index) for index in range(3)] for step in (ours, plain))
    assert ours == pytest.approx(plain, rel=1e-3) and abs(ours[2] - ours[0]) > 1e-3
    file = bench.against_trl.trl_file(case, {}, {}, str(tmp_path), case.folder)
    told = json.loads((tmp_path / "case.json").read_text())
    assert (
        file == str(tmp_path / "case.json") and told["pretrained"] == case.folder and len(told["rows"]) == 12
    )
    end = case.tokenizer.eos_token_id
    assert all(row[-1] == end and 0 < prompt < len(row) for row, prompt in told["rows"])


def test_our_run_and_a_plain_loop_distil_the_same_teacher(bench, tmp_path, world):
    model = tiny_models.save(tmp_path / "model", "llama", num_hidden_layers=3)
    (tmp_path / "SVAMP.json").write_text(json.dumps(ITEMS))
    case = bench.prepare(model, str(tmp_path), 1, tmp_path / "cut", str(model))
    case.batch_size, case.steps = 4, 3
    (ours, states), (plain, as_many) = (made(case, world) for made in bench.MADE.values())
    numbers = [AutoModelForCausalLM.from_pretrained(f).num_parameters() for f in (case.folder, case.teacher)]
    assert states == as_many == 16 * numbers[0] + 4 * numbers[1]
    ours, plain = ([step(index) for index in range(3)] for step in (ours, plain))
    assert ours == pytest.approx(plain, rel=2e-3) and 0 < ours[2] < ours[0]
    bench.against_trl.trl_file(case, {}, {}, str(tmp_path), case.folder, case.teacher)
    told = json.loads((tmp_path / "case.json").read_text())
    assert told["distils"] and told["teacher"] == str(model) and told["clip_norm"] == 0
    for name, made in bench.MADE.items():  # the teacher that warms libraries
        small = bench.replace(case, tiny=True, teacher=case.tiny_teacher)
        assert 0 < made(small, world)[0](0) < math.log(2), name


def test_the_divergence_is_the_mixtures_entropy_less_the_mean_entropy(bench):
    student, teacher = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0)).double()
    p, q = student.softmax(-1), teacher.softmax(-1)
    mixed, first, second = (torch.special.entr(x).sum(-1) for x in ((p + q) / 2, p, q))
    expected = (mixed - (first + second) / 2).mean()
    assert float(bench.divergence(student, teacher)) == pytest.approx(float(expected), rel=1e-12)


def test_what_is_printed_and_drawn(bench, tmp_path, capsys):
    took = {
        "real": [90, 110],
        "positions": [100, 120],
        "seconds": [1.0, 1.0],
        "losses": [2.0, 1.0],
        "peak": 2**20,
    }
    found = {"ours": [took | {"seconds": [0.5, 0.5]}, took], "plain": [took]}
    bench.report(found)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["ours", "200", "2.00", "9.1%", "1", "1.000"],
        ["plain", "100", "1.00", "9.1%", "1", "1.000"],
    ]
    bench.draw(found, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
