"""The reason stream's loss against formulas on transformers' own logits of single, unpadded rows, in fp64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from feature_tables import features_of
from tiny_models import tiny

from ibdistill.config.methods import METHODS
from ibdistill.config.sections import DataConfig, ObjectiveConfig
from ibdistill.data import batches
from ibdistill.data.features import Features
from ibdistill.data.records import SEGMENTS
from ibdistill.data.sampler import Sampler
from ibdistill.objectives.distillation import Distillation
from ibdistill.objectives.teacher_answers import TeacherAnswer
from ibdistill.objectives.weights import means, step_weights, streams_of, tokenized_streams, total
from ibdistill.ops.head_loss.arguments import TeacherStream

LENGTHS = [(9, 3, 14), (4, 1, 5), (12, 2, 1), (6, 4, 9)]
"""(question, answer, rationale) tokens. The fourth record has no reasoning."""
LAYOUTS = {"t5": {"pad": 0, "start": 0}, "llama": {"pad": 0, "start": 3, "separator": 5}}
SHARES = {"rationale": 0.7, "answer": 0.3}


def features(streams) -> Features:
    made = features_of(LENGTHS)
    without = features_of([(q, a, r) if i < 3 else (q, 0, 0) for i, (q, a, r) in enumerate(LENGTHS)])
    tables = {"rationale": without.targets["explain"], "answer": without.targets["predict"]} | made.targets
    return Features(
        made.ids,
        made.groups,
        {stream: made.questions["predict"] for stream in streams},
        {segment: tables[segment] for stream in streams for segment in SEGMENTS[stream]},
    )


def logits_of(model, kind, question, target) -> torch.Tensor:
    """[target tokens, V]: what the model says of each token of a row's target, alone in its batch."""
    ids = torch.tensor([question.tolist()]), torch.tensor([target.tolist()])
    if kind == "t5":
        start = torch.cat([torch.zeros(1, 1, dtype=torch.long), ids[1][:, :-1]], 1)
        return model(input_ids=ids[0], decoder_input_ids=start).logits[0]
    prompt = [3, *question.tolist()]
    prompt = [5 if token == question[-1] else token for token in prompt]
    row = torch.tensor([[*prompt, *target.tolist()[:-1]]])
    return model(input_ids=row).logits[0, len(prompt) - 1 :]


def of_rows(model, kind, table: Features, stream: str) -> dict[str, list[torch.Tensor]]:
    """Segment -> log probabilities [tokens, V] of each record."""
    found = {segment: [] for segment in SEGMENTS[stream]}
    for row in range(len(table)):
        parts = [table.targets[segment][row] for segment in SEGMENTS[stream]]
        whole = np.concatenate(parts)
        logits = torch.zeros(0, model.config.vocab_size, dtype=torch.float64)
        if len(whole):
            logits = logits_of(model, kind, table.questions[stream][row], whole)
        split = torch.log_softmax(logits, -1).split([len(part) for part in parts])
        for segment, own in zip(found, split, strict=True):
            found[segment].append(own)
    return found


def cross_entropies(log_p: dict[str, list[torch.Tensor]], table: Features) -> dict[str, torch.Tensor]:
    """Segment -> mean over all target tokens."""
    found = {}
    for segment, rows in log_p.items():
        labels = [torch.from_numpy(table.targets[segment][i]).long() for i in range(len(table))]
        sums = [-own[range(len(own)), ids].sum() for own, ids in zip(rows, labels, strict=True)]
        found[segment] = sum(sums) / sum(map(len, labels))
    return found


def information(estimator: str, log_p: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """The mean over questions with both segments, the answer's pooled distribution as the target."""
    losses = []
    for answer, rationale in zip(log_p["answer"], log_p["rationale"], strict=True):
        if len(answer):
            p, e = answer.exp().amax(0).detach(), rationale.exp().amax(0)
            if estimator == "paper":
                losses.append(-(p * torch.log_softmax(e, -1)).sum())
            else:
                losses.append(-(p / p.sum() * (e / e.sum()).log()).sum())
    return sum(losses) / len(losses)


def student(kind: str):
    return tiny(kind, vocab_size=520).double().eval()


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize(
    ("method", "estimator"),
    [("cot", "paper"), ("cot+ib", "paper"), ("cot+ib", "normalized"), ("cot+ib+kd", "normalized"),
     ("cot+kd", "paper"), ("dss+cot", "paper")],
)  # fmt: skip
def test_loss_and_gradients_equal_the_formulas_on_single_rows(kind, method, estimator):
    model = student(kind)
    objective = ObjectiveConfig(
        method=method, estimator=estimator, alpha=0.3, beta=0.6, gamma=0.8, reason_share=0.2
    )
    streams = streams_of(objective)
    assert streams == tokenized_streams(objective)
    table = features(streams)
    plan = Sampler(table, DataConfig(), batch_size=4, seed=0)
    batch = batches.collate(table, plan.step(0), streams, **LAYOUTS[kind])
    width, answer = 7, None
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(520, width, dtype=torch.float64, generator=generator)
    states = {
        s: torch.randn(len(ids), width, generator=generator).double() for s, ids in batch.labels.items()
    }
    if METHODS[method].kd:
        targets = {segment: TeacherStream(hidden=own) for segment, own in states.items()}
        answer = TeacherAnswer(None, targets, head)
    weights = step_weights(objective, plan.counts(0))
    loss, terms = Distillation(model, objective)(batch, weights, answer)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    log_p = {stream: of_rows(model, kind, table, stream) for stream in streams}
    ce = cross_entropies(log_p["reason"], table)
    expected = sum(SHARES[segment] * value for segment, value in ce.items())
    if method == "dss+cot":
        pair = cross_entropies(log_p["predict"] | log_p["explain"], table)
        expected = 0.2 * expected + 0.8 * (0.3 * pair["predict"] + 0.7 * pair["explain"])
    if METHODS[method].mi:
        expected = expected + 0.6 * information(estimator, log_p["reason"])
    if METHODS[method].kd:
        order = [table.ids.index(name) for name in batch.question_ids]
        for segment, share in SHARES.items():
            log_q = torch.log_softmax(states[segment] @ head.T, -1)
            rows = torch.cat([log_p["reason"][segment][i] for i in order])
            divergence = (log_q.exp() * (log_q - rows)).sum() / len(rows)
            expected = expected + 0.8 * share * divergence
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-7, atol=1e-10)

    mean = means({name: float(value) for name, value in terms.items()}, plan.counts(0))
    assert mean["ce_answer"] == pytest.approx(ce["answer"].item(), rel=1e-9)
    assert total(objective, mean) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("method", ["cot+ib+kd", "dss+cot"])
def test_the_gradient_is_the_sum_over_any_micro_batches(kind, method):
    model = student(kind)
    objective = ObjectiveConfig(method=method, estimator="normalized", beta=0.6, alpha=0.3)
    streams = streams_of(objective)
    table = features(streams)
    plan = Sampler(table, DataConfig(), batch_size=4, seed=0)
    weights, wrapped = step_weights(objective, plan.counts(0)), Distillation(model, objective)
    head = torch.randn(520, 7, generator=torch.Generator().manual_seed(1)).double()
    places = torch.randn(4 * 20, 7, generator=torch.Generator().manual_seed(2)).double()

    def gradients(parts) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for rows in parts:
            batch = batches.collate(table, rows, streams, **LAYOUTS[kind])
            answer = None
            if METHODS[method].kd:
                hidden = {s: places[ids % 80] for s, ids in batch.labels.items()}
                targets = {segment: TeacherStream(hidden=own) for segment, own in hidden.items()}
                answer = TeacherAnswer(None, targets, head)
            wrapped(batch, weights, answer)[0].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients([[0, 1, 2, 3]])
    for parts in ([[3], [2, 0], [1]], [[0, 3], [1, 2]]):
        for name, gradient in gradients(parts).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_question_states_are_those_of_the_streams_question(kind):
    """vid and vib read them; for a decoder-only model they are prompt states."""
    objective = ObjectiveConfig(method="cot+ib", estimator="vid", alpha=0.3, beta=0.5)
    model, table = student(kind), features(("reason",))
    plan = Sampler(table, DataConfig(), batch_size=4, seed=0)
    batch = batches.collate(table, plan.step(0), ("reason",), **LAYOUTS[kind])
    counts = plan.counts(0)
    assert counts["question_tokens"] == len(batch.question_positions) == sum(q for q, _, _ in LENGTHS)
    wrapped = Distillation(model, objective, teacher_width=5).double()
    states = torch.randn(len(batch.question_positions), 5).double()
    weights = step_weights(objective, counts)
    assert weights["mi"] == 0
    loss, terms = wrapped(batch, weights, TeacherAnswer(states), counts["question_tokens"])
    own = []
    for i in [table.ids.index(name) for name in batch.question_ids]:
        question = table.questions["reason"][i]
        if kind == "t5":
            own.append(model.get_encoder()(torch.tensor([question.tolist()]))[0][0])
        else:
            row = torch.tensor([[3, *question.tolist()[:-1], 5]])
            own.append(model.get_decoder()(row)[0][0, 1:])
    error = states - (torch.cat(own) @ wrapped.vid.weight.T + wrapped.vid.bias)
    expected = 0.5 * (error**2).mean(1).sum()
    torch.testing.assert_close(terms["vid"], expected, rtol=1e-9, atol=0)
    ce = cross_entropies(of_rows(model, kind, table, "reason"), table)
    value = 0.3 * ce["answer"] + 0.7 * ce["rationale"] + 0.5 * expected / counts["question_tokens"]
    torch.testing.assert_close(loss, value, rtol=1e-9, atol=0)


def test_every_method_has_its_shares_and_terms():
    counts = dict.fromkeys([*itertools.chain(*SEGMENTS.values()), "explained"], 10)
    used = step_weights(ObjectiveConfig(method="dss+cot", alpha=0.25, reason_share=0.4), counts)
    assert used == pytest.approx(
        {"ce_predict": 0.015, "ce_explain": 0.045, "ce_answer": 0.01, "ce_rationale": 0.03, "mi": 0.0}
        | dict.fromkeys(("kd_predict", "kd_explain", "kd_answer", "kd_rationale"), 0.0)
    )
    used = step_weights(ObjectiveConfig(method="cot+kd", alpha=0.25, gamma=2.0), counts)
    assert used == pytest.approx(
        {"ce_answer": 0.025, "ce_rationale": 0.075, "kd_answer": 0.05, "kd_rationale": 0.15, "mi": 0.0}
    )
