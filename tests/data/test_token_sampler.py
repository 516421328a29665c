"""The sampler whose steps are so many tokens: what a step holds, and how ranks share it."""

from __future__ import annotations

import numpy as np
import pytest
from feature_tables import features_of, random_features

from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig, ObjectiveConfig, OptimConfig
from ibdistill.data.token_sampler import TokenSampler, balanced, squares
from ibdistill.objectives.weights import check_split

STREAMS = ("predict", "explain")


def sampler(features, budget: int, *, ranks: int = 1, per_forward: int = 0, seed: int = 3, **data):
    optim = OptimConfig(tokens_per_batch=budget, tokens_per_forward=per_forward)
    return TokenSampler(features, DataConfig(**data), optim, streams=STREAMS, world_size=ranks, seed=seed)


def tokens_of(features) -> np.ndarray:
    tables = [*features.questions.values(), *features.targets.values()]
    return np.array([sum(len(table[i]) for table in tables) for i in range(len(features))])


def test_an_epoch_takes_each_record_at_most_once_and_leaves_out_what_is_stated():
    features, budget = random_features(400), 4000
    plan, tokens = sampler(features, budget), tokens_of(features)
    assert plan.steps_per_epoch == tokens.sum() // budget
    left = []
    for epoch in range(3):
        steps = [plan.step(epoch * plan.steps_per_epoch + k) for k in range(plan.steps_per_epoch)]
        rows = np.concatenate(steps)
        assert len(set(rows.tolist())) == len(rows)
        sums = np.array([tokens[step].sum() for step in steps])
        assert (sums <= budget).all() and (sums > budget - tokens.max()).all()
        left.append(set(range(400)) - set(rows.tolist()))
        assert tokens[list(left[-1])].sum() < budget + (budget - sums).sum()
    assert left[0] != left[1]


def test_the_plan_is_a_function_of_the_step_and_not_of_the_ranks():
    features = random_features(200)
    one, other = sampler(features, 4000), sampler(features, 4000, ranks=4)
    expected = {step: one.step(step) for step in range(30)}
    for step in reversed(range(30)):
        assert (other.step(step) == expected[step]).all()
    assert any((sampler(features, 4000, seed=4).step(k) != expected[k][:1]).any() for k in range(3))
    assert one.counts(5)["predict"] == features.targets["predict"].lengths[expected[5]].sum()


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_ranks_share_a_step_in_equally_many_and_nearly_equal_forward_passes(ranks):
    features, forwards = random_features(3000), 3
    budget = 3000 * ranks * forwards
    plan, tokens = sampler(features, budget, ranks=ranks, per_forward=3000), tokens_of(features)
    squared = squares(features, STREAMS)
    rows = [
        features.questions[s].lengths + features.targets[s].lengths for s in STREAMS
    ]  # an independent sum of squares
    assert (squared == sum(r**2 for r in rows)).all()
    for step in (0, plan.steps_per_epoch - 1, plan.steps_per_epoch + 1):
        shares = [plan.micro_batches(step, rank=rank, world_size=ranks) for rank in range(ranks)]
        assert [len(share) for share in shares] == [forwards] * ranks
        parts = [part for share in shares for part in share]
        assert min(map(len, parts)) > 0
        assert sorted(np.concatenate(parts).tolist()) == sorted(plan.step(step).tolist())
        loads = np.array([tokens[part].sum() for part in parts])
        assert loads.max() <= 1.1 * loads.mean() and loads.max() <= loads.mean() + tokens.max()
        attention = np.array([squared[part].sum() for part in parts])
        assert attention.max() <= 1.15 * attention.mean()


def test_a_lone_long_record_gets_fewer_neighbours():
    """By tokens alone both shares would have 1,000; by squares the long one has all the attention."""
    features = features_of([(490, 5, 5)] + [(40, 5, 5)] * 10)
    shares = balanced(np.arange(11), tokens_of(features), squares(features, STREAMS), 2)
    assert [share.tolist() for share in shares] == [[0], list(range(1, 11))]


def test_bad_input_is_named():
    features = features_of([(5, 2, 3), (90, 2, 3)])
    with pytest.raises(ValueError, match=r"record 'r1' has 185 tokens.*500 / \(1 ranks x 5 forward.* = 100"):
        sampler(features, 500, per_forward=100)
    with pytest.raises(
        ValueError, match="optim.tokens_per_batch 100 .* = 100.*lower data.max_question_tokens"
    ):
        sampler(features, 100)  # the budget is below the longest sequence
    with pytest.raises(
        ValueError, match="tokens_per_batch is 400, but the 2 training records have 200 tokens"
    ):
        sampler(features, 400)
    mixed = random_features(30, groups=[0] * 10 + [1] * 20)
    with pytest.raises(ValueError, match="data.mixture_temperature repeats some"):
        sampler(mixed, 1000, mixture_temperature=2.0)
    sampler(mixed, 1000)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"optim.batch_size": 32},
            "optim.batch_size is '32', which counts questions; leave one of the two out",
        ),
        (
            {"optim.micro_batch_size": 2},
            "optim.micro_batch_size is '2'.*set optim.tokens_per_forward instead",
        ),
        ({"data.bucket_batches": 4}, "data.bucket_batches is '4'"),
        ({"data.unlabelled": 40}, "data.unlabelled is '40'"),
    ],
)
def test_settings_that_contradict_the_tokens_are_refused(settings, words):
    with pytest.raises(ValueError, match=f"optim.tokens_per_batch is 4096 and {words}"):
        load_settings(None, {"optim.tokens_per_batch": 4096} | settings)


def test_other_contradictions_are_refused():
    with pytest.raises(ValueError, match="tokens_per_forward is 64, which splits optim.tokens_per_batch"):
        load_settings(None, {"optim.tokens_per_forward": 64})
    with pytest.raises(ValueError, match="data.packing is 'on' and student.compile is true"):
        load_settings(None, {"data.packing": "on", "student.compile": True})
    optim = OptimConfig(tokens_per_batch=100, tokens_per_forward=50)
    with pytest.raises(
        ValueError, match="tokens_per_forward splits the 100 of optim.tokens_per_batch into 2"
    ):
        check_split(ObjectiveConfig(method="ib", estimator="infonce", beta=0.1), optim, 2)
