"""Token tables, the data plan, packed batches."""

from __future__ import annotations

import numpy as np
import pytest
from feature_tables import features_of, random_features

from ibdistill.config.sections import DataConfig
from ibdistill.data.batches import collate
from ibdistill.data.features import Features, Ragged
from ibdistill.data.records import Record
from ibdistill.data.sampler import Sampler
from ibdistill.data.tokenizing import tokenize


def test_an_epoch_uses_each_record_at_most_once_and_leaves_out_only_the_tail():
    plan = Sampler(random_features(103), DataConfig(), batch_size=8, seed=3)
    assert plan.steps_per_epoch == 12
    for epoch in range(3):
        rows = np.concatenate([plan.step(epoch * 12 + k) for k in range(12)])
        assert len(set(rows.tolist())) == 96
    first = np.concatenate([plan.step(k) for k in range(12)])
    second = np.concatenate([plan.step(12 + k) for k in range(12)])
    assert set(range(103)) - set(first.tolist()) != set(range(103)) - set(second.tolist())


@pytest.mark.parametrize("pool", [1, 5, 64])
def test_the_plan_is_a_function_of_the_step(pool):
    features = random_features(200)
    forward = Sampler(features, DataConfig(bucket_batches=pool), batch_size=8, seed=3)
    backward = Sampler(features, DataConfig(bucket_batches=pool), batch_size=8, seed=3)
    steps = list(range(60))
    expected = {step: forward.step(step) for step in steps}
    for step in reversed(steps):
        assert (backward.step(step) == expected[step]).all()
    other = Sampler(features, DataConfig(), batch_size=8, seed=4)
    assert any((other.step(step) != expected[step]).any() for step in steps)


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (2, 4), (4, 3), (3, 8), (5, 5), (7, 2), (2, 7)])
def test_ranks_and_micro_batches_share_the_same_questions(world_size, micro):
    plan = Sampler(random_features(100), DataConfig(), batch_size=24, seed=0)
    for step in (0, 3, 7):
        parts = [
            rows
            for rank in range(world_size)
            for rows in plan.micro_batches(step, rank=rank, world_size=world_size, micro_batch_size=micro)
        ]
        sizes = {len(rows) for rows in parts}
        assert sizes == {micro} if 24 % (world_size * micro) == 0 else micro >= max(sizes) <= min(sizes) + 1
        assert min(sizes) > 0
        assert sorted(np.concatenate(parts).tolist()) == sorted(plan.step(step).tolist())


def test_counts_are_those_of_the_whole_step():
    features = random_features(100)
    plan = Sampler(features, DataConfig(), batch_size=24, seed=0)
    rows = plan.step(2)
    assert plan.counts(2) == {
        "question_tokens": sum(len(features.questions["predict"][i]) for i in rows),
        "predict": sum(len(features.targets["predict"][i]) for i in rows),
        "explain": sum(len(features.targets["explain"][i]) for i in rows),
        "questions": 24,
        "explained": sum(len(features.targets["explain"][i]) > 0 for i in rows),
    }


def test_bucketing_pads_less_than_half_of_what_shuffling_does():
    features = random_features(4000, seed=1)
    plan = Sampler(features, DataConfig(bucket_batches=64), batch_size=8, seed=0)

    def padded_share(batches: list[np.ndarray]) -> float:
        made = [collate(features, rows, ("predict", "explain"), pad=0, start=0) for rows in batches]
        return 1 - sum(b.num_tokens for b in made) / sum(b.num_positions for b in made)

    shuffled = np.random.default_rng(0).permutation(4000).reshape(-1, 8)
    ours = padded_share([plan.step(k) for k in range(plan.steps_per_epoch)])
    assert ours < 0.5 * padded_share(list(shuffled))
    # bucketing must not freeze the composition of batches
    together = {frozenset(plan.step(k).tolist()) for k in range(plan.steps_per_epoch)}
    again = {frozenset(plan.step(plan.steps_per_epoch + k).tolist()) for k in range(plan.steps_per_epoch)}
    assert len(together & again) < 5


def test_without_a_pool_a_batch_is_a_random_sample():
    """Long and short records, which a pool would keep apart, meet in every batch, sorted."""
    features = features_of([(5, 1, 2)] * 200 + [(50, 8, 60)] * 200)
    mixed = Sampler(features, DataConfig(), batch_size=16, seed=0)
    apart = Sampler(features, DataConfig(bucket_batches=64), batch_size=16, seed=0)
    shares = [float((mixed.step(k) >= 200).mean()) for k in range(mixed.steps_per_epoch)]
    assert min(shares) > 0.1 and max(shares) < 0.9
    assert sum(float((apart.step(k) >= 200).mean()) in (0.0, 1.0) for k in range(25)) >= 24
    lengths = features.questions["predict"].lengths[mixed.step(0)]
    assert (np.diff(lengths) >= 0).all()


def test_a_mixture_gives_each_task_its_share():
    features = random_features(100, groups=[0] * 90 + [1] * 10)
    by_size = Sampler(features, DataConfig(), batch_size=10, seed=0)
    even = Sampler(features, DataConfig(mixture_weights=[1.0, 1.0]), batch_size=10, seed=0)
    warm = Sampler(features, DataConfig(mixture_temperature=2.0), batch_size=10, seed=0)

    def small_share(plan: Sampler) -> float:
        rows = np.concatenate([plan.step(k) for k in range(plan.steps_per_epoch * 4)])
        return float((rows >= 90).mean())

    assert small_share(by_size) == pytest.approx(0.1, abs=0.01)
    assert small_share(even) == pytest.approx(0.5, abs=0.01)
    assert small_share(warm) == pytest.approx(10**0.5 / (10**0.5 + 90**0.5), abs=0.01)
    # a task that comes round several times an epoch still uses its records evenly
    rows = np.concatenate([even.step(k) for k in range(10)])
    counts = np.bincount(rows[rows >= 90] - 90, minlength=10)
    assert counts.min() >= 4 and counts.max() <= 6


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="optim.batch_size is 16, but there are only 10 training records"):
        Sampler(random_features(10), DataConfig(), batch_size=16, seed=0)


def test_collate_packs_targets_and_shifts_them():
    features = features_of([(3, 2, 0), (5, 1, 4)])
    batch = collate(features, [0, 1], ("predict", "explain"), pad=0, start=7)
    assert batch.question_ids == ("r0", "r1")
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 0, 0],
        [110, 111, 112, 113, 114],
        [10, 11, 12, 0, 0],
        [110, 111, 112, 113, 114],
    ]
    assert batch.attention_mask.sum(1).tolist() == [3, 5, 3, 5]
    assert batch.decoder_input_ids["predict"].tolist() == [[7, 10], [7, 0]]
    assert batch.decoder_input_ids["explain"].tolist() == [[0, 0, 0, 0], [7, 110, 111, 112]]
    assert batch.labels["predict"].tolist() == [10, 11, 110]
    assert batch.labels["explain"].tolist() == [110, 111, 112, 113]
    assert batch.cu["predict"].tolist() == [0, 2, 3]
    assert batch.cu["explain"].tolist() == [0, 0, 4]
    assert batch.positions["predict"].tolist() == [0, 1, 2]
    assert batch.positions["explain"].tolist() == [4, 5, 6, 7]
    assert batch.num_tokens == 8 + 8 + 3 + 4
    assert batch.num_positions == 20 + 4 + 8


def test_an_encoder_decoder_question_begins_with_bos_where_the_tokenizer_has_one():
    features = features_of([(3, 2, 0), (5, 1, 4)])
    batch = collate(features, [0, 1], ("predict", "explain"), pad=0, start=7, bos=9)
    plain = collate(features, [0, 1], ("predict", "explain"), pad=0, start=7)
    assert batch.input_ids[:2].tolist() == [[9, 10, 11, 12, 0, 0], [9, 110, 111, 112, 113, 114]]
    assert (
        batch.input_ids[:, 1:].equal(plain.input_ids) and batch.attention_mask.sum(1).tolist() == [4, 6] * 2
    )
    assert batch.question_positions.tolist() == [1, 2, 3, 7, 8, 9, 10, 11]
    assert batch.decoder_input_ids["explain"].equal(plain.decoder_input_ids["explain"])


def test_a_decoder_only_prompt_has_the_separator_for_every_end_token():
    parts = Ragged([[5, 6, 1, 7, 1], [8, 1]])  # the first question has two parts
    targets = Ragged([[4, 1], [4, 1]])
    features = Features(["a", "b"], np.zeros(2), {"predict": parts}, {"predict": targets})
    batch = collate(features, [0, 1], ("predict",), pad=0, start=2, separator=3)
    assert batch.input_ids.tolist() == [[2, 5, 6, 3, 7, 3, 4], [2, 8, 3, 4, 0, 0, 0]]
    assert batch.question_positions.tolist() == [1, 2, 3, 4, 5, 8, 9]
    assert batch.positions["predict"].tolist() == [5, 6, 9, 10]


def test_a_batch_without_any_rationale_still_collates():
    features = features_of([(3, 2, 0), (5, 1, 0)])
    batch = collate(features, [0, 1], ("predict", "explain"), pad=0, start=7)
    assert batch.labels["explain"].tolist() == []
    assert batch.decoder_input_ids["explain"].shape == (2, 1)


class WordTokenizer:
    """One id per word; as much of a tokenizer as `tokenize` uses."""

    eos_token_id, unk_token_id, added_tokens_decoder = 1, None, {}

    def __call__(self, texts, add_special_tokens, split_special_tokens):
        assert not add_special_tokens and split_special_tokens
        return {"input_ids": [[len(word) + 10 for word in text.split()] for text in texts]}


def test_tokenize_cuts_counts_and_reports(caplog):
    records = [
        Record("a", "t", "one two three", "x", "r " * 6, gold="x"),
        Record("b", "t", "one", "x y z", "", gold="x"),
    ]
    config = DataConfig(max_question_tokens=4, max_label_tokens=4, max_rationale_tokens=4)
    with caplog.at_level("WARNING", logger="ibdistill"):
        features = tokenize(records, {"t": {"predict": "p: ", "explain": "e: "}}, WordTokenizer(), config)
    assert features.questions["predict"][0].tolist() == [12, 13, 13, 1]
    assert features.targets["predict"][1].tolist() == [11, 11, 11, 1]
    assert features.targets["explain"][0].tolist() == [11, 11, 11, 1]
    assert features.targets["explain"][1].tolist() == []
    messages = [record.getMessage() for record in caplog.records]
    assert "train: 1 of 2 predict questions are longer than 4 tokens and were cut" in messages
    assert "train: 1 of 2 rationales are longer than 4 tokens and were cut" in messages
    assert not any("labels" in message for message in messages)
