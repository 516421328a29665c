"""What each rank of a group gets of a packed row, without any process: the exchange is carried out here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ibdistill.data import batches
from ibdistill.data.features import Features, Ragged
from ibdistill.models import sequence_parallel
from ibdistill.ops.head_loss import api, estimators

# (question, label, rationale) tokens: no label, no rationale, neither, and more than all others together
LENGTHS = [(3, 2, 5), (7, 1, 0), (1, 0, 4), (2, 0, 0), (4, 3, 41), (5, 1, 2), (9, 2, 3)]
DISTRIBUTIONS = [name for name, own in estimators.ESTIMATORS.items() if own.space == "distribution"]


def batch_of(lengths, streams) -> batches.Batch:
    """A packed micro-batch whose targets are all different tokens."""
    segments = {"predict": 1, "explain": 2, "answer": 1, "rationale": 2}
    counts, ids, first = {name: [row[i] for row in lengths] for name, i in segments.items()}, {}, 10
    for name, own in counts.items():
        ids[name] = Ragged(np.split(np.arange(first, first + sum(own)), np.cumsum(own)[:-1]))
        first += sum(own)
    questions = Ragged([np.full(row[0], 3) for row in lengths])
    numbers = np.zeros(len(lengths), dtype=int)
    names = [str(i) for i in range(len(lengths))]
    features = Features(names, numbers, dict.fromkeys(streams, questions), ids)
    layout = {"pad": 0, "start": 1, "separator": 2, "packed": True}
    return batches.collate(features, range(len(lengths)), streams, **layout)


def parts_of(monkeypatch, whole: batches.Batch, ranks: int) -> list[batches.Batch]:
    """What `part_of` gives each rank where questions are brought together."""
    parts = []
    for rank in range(ranks):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: ranks)
        monkeypatch.setattr(sequence_parallel, "_group", group)
        monkeypatch.setattr(sequence_parallel, "_whole", True)
        parts.append(sequence_parallel.part_of(whole))
        here = sequence_parallel.owned(len(whole.question_ids))
        for cu in parts[-1].cu.values():
            assert not cu.diff()[~here].any()
    return parts


def exchanged(parts: list[batches.Batch], row: torch.Tensor, name: str) -> list[torch.Tensor]:
    """Each rank's states of a segment, or of `questions`, after the exchange; `row` [tokens, D]: all."""
    size, sent = parts[0].input_ids.shape[1], []
    row = torch.cat([row, row.new_zeros(len(parts) * size - len(row), row.shape[1])])
    for rank, part in enumerate(parts):
        places = part.positions.get(name, part.question_positions)
        sent.append(row[rank * size :][:size][places].split(part.exchanges[name][0]))
    for rank, part in enumerate(parts):
        assert [len(rows[rank]) for rows in sent] == part.exchanges[name][1]
    return [torch.cat([rows[rank] for rows in sent]) for rank in range(len(parts))]


@pytest.mark.parametrize("streams", [("predict", "explain"), ("reason",)])
@pytest.mark.parametrize("ranks", [2, 3, 4, 9])
def test_every_question_is_whole_on_one_rank(monkeypatch, ranks, streams):
    """Its states come in the order of its labels. Nine ranks share 7 questions, so two have none."""
    whole = batch_of(LENGTHS, streams)
    parts = parts_of(monkeypatch, whole, ranks)
    row = torch.arange(whole.input_ids.shape[1])[:, None]
    for name, labels in whole.labels.items():
        found = exchanged(parts, row, name)
        assert torch.equal(torch.cat(found)[:, 0], whole.positions[name])
        assert torch.equal(torch.cat([part.labels[name] for part in parts]), labels)
        assert torch.equal(sum(part.cu[name].diff() for part in parts), whole.cu[name].diff())
        assert [len(own) for own in found] == [len(part.labels[name]) for part in parts]
    assert torch.equal(torch.cat(exchanged(parts, row, "questions"))[:, 0], whole.question_positions)


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("estimator", DISTRIBUTIONS)
def test_pooled_terms_of_the_ranks_are_those_of_one_rank(monkeypatch, estimator, pool):
    """In fp64, to 1e-10: values and the gradients of states and head."""
    generator = torch.Generator().manual_seed(0)
    whole = batch_of(LENGTHS, ("reason",))
    row = torch.randn(whole.input_ids.shape[1], 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(140, 6, dtype=torch.float64, generator=generator)
    weights = api.Weights(ce_predict=0.3, ce_explain=0.2, mi=0.7)
    mi = api.MISettings(estimator, pool)

    def learned(shares) -> tuple:
        """Loss, terms and gradients of [(states by segment, labels, cu)] of all ranks together."""
        total, sums = 0.0, {}
        for states, own in shares(leaf := row.clone().requires_grad_()):
            streams = (api.Stream(states[s], own.labels[s], own.cu[s]) for s in ("answer", "rationale"))
            loss, terms = api.head_loss(*streams, head, weights=weights, mi=mi, chunk_bytes=5 * 140 * 8)
            total, sums = total + loss, {k: sums.get(k, 0) + v for k, v in terms.items() if k != "mi_bound"}
        return total.detach(), sums, torch.autograd.grad(total, (leaf, head))

    head = weight.requires_grad_()
    alone = learned(lambda leaf: [({s: leaf[places] for s, places in whole.positions.items()}, whole)])
    parts = parts_of(monkeypatch, whole, 4)

    def shared(leaf):
        by_rank = zip(*(exchanged(parts, leaf, s) for s in ("answer", "rationale")), strict=True)
        return [
            (dict(zip(("answer", "rationale"), own, strict=True)), p)
            for own, p in zip(by_rank, parts, strict=True)
        ]

    torch.testing.assert_close(learned(shared), alone, rtol=1e-10, atol=1e-10)
