"""The online teacher: the same gradients in every placement, shares of the promised size, clear refusals."""

from __future__ import annotations

import aligned_tokenizers
import pytest
import torch
from harness import ROOT, launch, tiny

from ibdistill.config.load import load_settings
from ibdistill.teacher import sharding, vocabulary
from ibdistill.training.prepare import prepare

ALIGNED = ["zero3_node+text:2", "cpu_offload+text:2"]
CASES = {
    1: ["replica:0", "replica+text:0"],
    2: ["replica:2", "zero3:2", "zero3:3", "cpu_offload:2", "zero3:2:60", *ALIGNED],
    4: ["zero3_node:2"],
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, list[dict]]:
    """`PLACEMENT:STAGE`, for one of them with steps -> what each rank found (see workers/teachers.py)."""
    folder = tmp_path_factory.mktemp("teachers")
    aligned_tokenizers.save_teacher(folder / "other", aligned_tokenizers.fallback(bos=True))
    cases = [f"{ranks}/{case}" for ranks, some in CASES.items() for case in some]
    worker, log = [str(ROOT / "tests/workers/teachers.py"), str(folder), *cases], folder / "log"
    assert launch(worker, log=log, timeout=500) == 0, log.read_text()[-4000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


SHARDED = [case for cases in CASES.values() for case in cases if not case.startswith("replica")]


@pytest.mark.parametrize("case", [*SHARDED, "replica:2"])
def test_gradients_equal_those_of_one_process_with_both_models_whole(facts, case):
    alone = "replica+text:0" if case in ALIGNED else "replica:0"
    reference, ours = facts[alone][0]["gradients"], facts[case][0]["gradients"]
    assert reference.keys() == ours.keys() and {"vid.weight", "vid.bias", "vid.log_variance"} <= ours.keys()
    for name, gradient in reference.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("case", [*SHARDED, "replica:2"])
def test_the_teacher_never_changes_and_gets_no_gradient(facts, case):
    assert all(rank["unchanged"] and rank["no_gradient"] for rank in facts[case])


@pytest.mark.parametrize("case", SHARDED)
def test_the_prefetch_trace_completes(facts, case):
    assert all(rank["complete"] for rank in facts[case])


@pytest.mark.parametrize("case", SHARDED)
def test_a_rank_holds_its_share_of_the_teacher(facts, case):
    """The share is 1 / 2, with two ranks or with two nodes of two ranks each."""
    whole = facts["replica+text:0" if case in ALIGNED else "replica:0"][0]["bytes"]
    assert all(rank["bytes"] <= (0.5 + 0.05) * whole for rank in facts[case])
    assert facts["replica:2"][0]["bytes"] == facts["replica:0"][0]["bytes"]


def test_the_teachers_config_does_not_reach_the_student(facts):
    """The student under ZeRO-2 trains all of its weights, and torch's own linear layer stays."""
    whole = facts["replica:0"][0]["optimized"]
    for case in ("zero3:2", "cpu_offload:2"):
        assert not any(rank["linear_replaced"] for rank in facts[case])
        assert sum(rank["optimized"] for rank in facts[case]) == pytest.approx(whole, rel=1e-3)


def test_memory_does_not_grow(facts):
    """Over the last 30 of 60 steps tensors grow by 4 bytes per step, the norms until the next logging step.

    The process's own size wanders by up to 7 MiB, with a teacher and without; parameters that were gathered
    and not let go would add 3.4 MiB per step.
    """
    for rank in facts["zero3:2:60"]:
        resident, living = zip(*rank["memory"][2:], strict=True)
        assert living[-1] - living[0] <= 4 * 30, living
        assert resident[-1] - resident[0] < 16 << 20, resident


@pytest.mark.parametrize(
    ("sizes", "threshold"),
    [
        ([100_000] * 10, 0),
        ([10, 10, 1000, 1000], 10),  # 20 of 2020 elements
        ([10, 35, 1000, 1000], 10),  # 45 of 2045 would be too many
        ([50_000, 1_000_000, 10**9], 100_000),  # DeepSpeed's own default is the most
        ([30, 30, 1000, 1000], 0),  # all of a size, or none
    ],
)
def test_small_parameters_stay_whole_within_a_budget(sizes, threshold):
    assert sharding.persistence_threshold(sizes) == threshold
    whole = sum(size for size in sizes if size <= threshold)
    assert whole <= sharding.PERSISTENT_SHARE * sum(sizes)


def test_nodes_are_told_apart_by_host():
    assert sharding.node_groups(["a", "b", "a", "b"]) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="same number of ranks on every node \\(a: 2, b: 1\\)"):
        sharding.node_groups(["a", "a", "b"])


@pytest.mark.parametrize("bias", [None, torch.arange(3.0)])
def test_a_head_is_fitted_to_the_students_rows(bias):
    weight, hidden = torch.randn(3, 4), torch.randn(5, 4)
    cut, cut_bias = vocabulary.fit_rows(weight, bias, 2)
    assert torch.equal(cut, weight[:2]) and (bias is None or torch.equal(cut_bias, bias[:2]))
    wide, wide_bias = vocabulary.fit_rows(weight, bias, 6)
    probabilities = torch.softmax(torch.nn.functional.linear(hidden, wide, wide_bias), -1)
    expected = torch.softmax(torch.nn.functional.linear(hidden, weight, bias), -1)
    torch.testing.assert_close(probabilities[:, :3], expected)
    assert torch.equal(probabilities[:, 3:], torch.zeros(5, 3))
    assert vocabulary.fit_rows(weight, bias, 3) == (weight, bias)


ONLINE = {"teacher.placement": "replica", "teacher.model": "demo-teacher", "objective.method": "kd"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective.method": "kd"}, "objective.method kd needs an online teacher; set teacher.placement"),
        ({"objective.method": "ib", "objective.estimator": "vid"}, "estimator vid needs an online teacher"),
        (ONLINE | {"objective.method": "dss"}, "does not use a teacher; choose kd, ib or ib\\+kd"),
        (ONLINE | {"teacher.model": ""}, "teacher.model is empty: which model"),
        (
            ONLINE | {"teacher.model": "/no/such"},
            "teacher.model is '/no/such': no model could be loaded: there is no such folder",
        ),
        (ONLINE | {"teacher.placement": "cache"}, "name its folder in teacher.cache"),
        (ONLINE | {"teacher.placement": "zero3", "teacher.load_in_8bit": True}, "goes with .* replica"),
        (
            ONLINE
            | {"objective.method": "ib", "objective.estimator": "infonce", "objective.mi_pair": "teacher"},
            "mi_pair teacher goes with estimator paper or normalized, not infonce",
        ),
    ],
)
def test_what_is_missing_or_contradicts_is_named(world, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(load_settings(None, tiny(tmp_path / "run") | settings), world)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_8_bits_need_a_gpu(world, tmp_path):
    with pytest.raises(ValueError, match="load_in_8bit needs a CUDA device and the package bitsandbytes"):
        prepare(load_settings(None, tiny(tmp_path / "run") | ONLINE | {"teacher.load_in_8bit": True}), world)


def test_the_estimator_follows_the_teacher():
    plain = load_settings(None, {"objective.method": "ib"}).objective
    assert (plain.estimator, plain.beta) == ("paper", 0.1)
    online = load_settings(None, ONLINE | {"objective.method": "ib"}).objective
    assert (online.estimator, online.beta) == ("vid", 1.0)
    assert (
        load_settings(None, ONLINE | {"objective.method": "ib", "objective.beta": 0.3}).objective.beta == 0.3
    )


def test_the_form_of_the_cache_follows_the_objective():
    pooled = {"objective.method": "ib+kd", "objective.estimator": "paper", "objective.mi_pair": "teacher"}
    cached = ONLINE | {"teacher.cache": "c"}
    assert load_settings(None, cached).teacher.cache_form == "topk"
    assert load_settings(None, cached | {"teacher.cache_form": "states"}).teacher.cache_form == "states"
    assert load_settings(None, cached | pooled).teacher.cache_form == "states"
