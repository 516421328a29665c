"""Sampled answers: their scores against enumeration, their determinism, and the caches and engines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import types
from functools import partial
from statistics import mean

import numpy as np
import pytest
import torch
from tiny_models import byte_tokenizer, tiny

from ibdistill.config.evaluation_sections import EvaluationConfig
from ibdistill.config.sections import DataConfig
from ibdistill.data.records import Record
from ibdistill.evaluation import intervals, predictions, sampled, vllm_engine
from ibdistill.evaluation.sampled import Sample
from ibdistill.models import decoding
from ibdistill.models.decoding import Sampling
from ibdistill.runtime.distributed import World

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, device=CPU)
QUESTIONS = ["how many ?", "a", "and what of these , then ?", "so</s>is it", "7", "b b b b b"]
RECORDS = [Record(f"r{i}", "svamp", text, "1", "so", gold="1") for i, text in enumerate(QUESTIONS)]
DATA = DataConfig(task="svamp", max_label_tokens=6, max_rationale_tokens=6)


def tokenizer(**kwargs):
    found = byte_tokenizer(**kwargs)
    found.pad_token = found.eos_token
    return found


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_sets_with_a_right_sample(n, right):
    marks = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        sets = [any(chosen) for chosen in itertools.combinations(marks, k)]
        assert intervals.pass_at_k(n, right, k) == pytest.approx(mean(map(float, sets)), abs=1e-12)


def test_the_bootstrap_has_the_width_of_the_normal_interval():
    values = np.random.default_rng(1).random((400, 2)) * (1.0, 10.0)
    for column, (low, high) in zip(values.T, intervals.bootstrap(values), strict=True):
        half = 1.96 * column.std(ddof=1) / math.sqrt(len(column))
        assert (low, high) == pytest.approx((column.mean() - half, column.mean() + half), abs=0.12 * half)
    assert intervals.bootstrap([[0.5], [0.5]]) == [(0.5, 0.5)]


def test_scores_by_hand():
    def marked(text):
        return [Sample(c, c, c == "1", ended=c != "c", tokens=2) for c in text]

    samples = [[marked("10"), marked("00")], [marked("11"), marked("c0")]]  # right: 3 of 4, 0 of 4
    found = sampled.scores(samples, [1, 2])
    assert found["avg@2"] == found["pass@1"] == pytest.approx(3 / 8)
    assert found["pass@2"] == pytest.approx(1 / 2)  # no pair of the first question's four lacks a right one
    assert (found["avg@2_low"], found["avg@2_high"]) == (0, 0.75)
    half = 12.706 * math.sqrt(((1 / 4 - 3 / 8) ** 2 + (1 / 2 - 3 / 8) ** 2) / 2)
    assert found["avg@2_seeds_low"] == pytest.approx(3 / 8 - half)
    assert found["avg@2_seeds_high"] == pytest.approx(3 / 8 + half)
    assert (found["cut_off"], found["tokens"]) == (1 / 8, 2)
    assert "avg@2_seeds_low" not in sampled.scores(samples[:1], [1])


def test_top_p_draws_from_the_most_probable_tokens_in_the_right_shares():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    n = 4001
    numbers = torch.linspace(0, 1, n + 1)[:-1, None]
    for top_p, kept in ((0.4, [1]), (0.5, [1, 3]), (0.7, [1, 3]), (0.75, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])):
        draw = decoding._Draw(1.0, numbers, top_p)
        chosen = draw(None, probabilities.log().expand(n, -1)).argmax(-1)
        shares = torch.bincount(chosen, minlength=5) / n
        expected = torch.zeros(5)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        torch.testing.assert_close(shares, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("stream", ["predict", "reason"])
@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_samples_depend_on_seed_record_and_number_alone(world, model_type, stream):
    model, words = tiny(model_type).double().eval(), tokenizer()

    def draw(records=RECORDS, **overrides):
        config = EvaluationConfig(**{"samples": 3, "seeds": 2, "temperature": 2.0} | overrides)
        return sampled.sample(model, words, records, stream, DATA, config, world)

    found = draw()
    assert (len(found), len(found[0]), len(found[0][0])) == (2, len(RECORDS), 3)
    texts = [s.text for seed in found for own in seed for s in own]
    assert len(set(texts)) > len(texts) / 2
    assert draw(batch_size=1) == draw(batch_size=4) == found
    assert draw(records=RECORDS[::-2]) == [seed[::-2] for seed in found]
    assert draw(seeds=1, seed=1) == found[1:] and draw(seeds=1, samples=2) == [[o[:2] for o in found[0]]]
    assert draw(top_p=1e-6) == [[[s] * 3 for s in own] for own in greedy(model, words, stream)]


def greedy(model, words, stream):
    asked = predictions.questions(RECORDS, stream, words, DATA)
    limit = DATA.answer_limits()[stream]
    limits = {"max_question_tokens": DATA.max_question_tokens, "max_new_tokens": limit, "device": CPU}
    answers = decoding.decode(model, words, asked, **limits)
    return [
        [
            sampled._read(answer, record, stream, DATA, words)
            for answer, record in zip(answers, RECORDS, strict=True)
        ]
    ] * 2


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "t5"])
def test_a_static_cache_gives_the_same_answers(model_type):
    model, words = tiny(model_type).double().eval(), tokenizer()
    limits = {"max_question_tokens": 32, "max_new_tokens": 12, "device": CPU, "batch_size": 4}
    sampling = Sampling(2.0, decoding.draws(QUESTIONS, 12), 0.9)
    for drawn in (None, sampling):
        ours, static = (
            decoding.decode(model, words, QUESTIONS, **limits, sampling=drawn, cache=cache)
            for cache in ("dynamic", "static")
        )
        assert [a.ids for a in static] == [a.ids for a in ours]
        assert [a.confidence for a in static] == pytest.approx([a.confidence for a in ours], rel=1e-9)


class FakeVLLM(types.ModuleType):
    """The part of vLLM that the adapter uses, over a model of transformers."""

    def __init__(self, model):
        super().__init__("vllm")
        self.__spec__ = types.SimpleNamespace()
        self.asked = asked = []

        class SamplingParams(types.SimpleNamespace):
            pass

        class LLM:
            def __init__(self, *, model, skip_tokenizer_init, generation_config):
                assert skip_tokenizer_init and generation_config == "vllm"

            def generate(self, prompts, parameters):
                return [fake(p["prompt_token_ids"], own) for p, own in zip(prompts, parameters, strict=True)]

        @torch.no_grad()
        def fake(ids, own):
            asked.append(own)
            assert own.detokenize is False and own.logprobs == 1
            written, places = [], []
            while len(written) < own.max_tokens and written[-1:] != own.stop_token_ids:
                log_probs = model(torch.tensor([ids + written])).logits[0, -1].log_softmax(-1)
                best, token = int(log_probs.argmax()), int(log_probs.argmax())
                if own.temperature:
                    token = (best + own.seed) % len(log_probs)
                kept = {i: types.SimpleNamespace(logprob=float(log_probs[i])) for i in (token, best)}
                written, places = [*written, token], [*places, kept]
            output = types.SimpleNamespace(token_ids=written, logprobs=places)
            return types.SimpleNamespace(outputs=[output])

        self.SamplingParams, self.LLM = SamplingParams, LLM


@pytest.mark.parametrize("bos", [False, True])
def test_vllm_answers_as_we_do(monkeypatch, bos):
    model, words = tiny("llama").double().eval(), tokenizer(bos=bos)
    fake = FakeVLLM(model)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = vllm_engine.Engine("folder", model.config, ALONE)
    streams = ("predict", "explain", "reason")
    ours = predictions.evaluate(model, words, RECORDS, streams, DATA, ALONE)
    theirs = predictions.evaluate(model.config, words, RECORDS, streams, DATA, ALONE, 64, engine.decode)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.label, a.rationale, a.reasoned.rationale) == (b.label, b.rationale, b.reasoned.rationale)
        assert a.confidence == pytest.approx(b.confidence) and a.reasoned.tokens == b.reasoned.tokens
        assert a.first_confidence == pytest.approx(b.first_confidence)
    whole = [[1, 2, 3], [4]]
    limits = {"max_question_tokens": 32, "max_new_tokens": 5}
    decode = partial(decoding.decode, model, words, whole, device=CPU, **limits)
    assert [a.ids for a in engine.decode(None, words, whole, **limits)] == [a.ids for a in decode()]
    fake.asked.clear()
    draws = decoding.draws(["x", "y"], 5)
    engine.decode(None, words, whole, **limits, sampling=Sampling(0.5, draws, 0.9))
    assert [(p.temperature, p.top_p) for p in fake.asked] == [(0.5, 0.9)] * 2
    assert [p.seed / 2**24 for p in fake.asked] == draws[:, 0].tolist()
    assert engine.decode(None, words, [], **limits) == []


def test_what_vllm_is_refused_for(monkeypatch):
    with pytest.raises(ValueError, match="eval.engine is 'vllm', and vllm is not installed; install it"):
        vllm_engine.Engine("folder", tiny("llama").config, ALONE)
    monkeypatch.setitem(sys.modules, "vllm", FakeVLLM(None))
    with pytest.raises(ValueError, match="there are 2 ranks; start one process"):
        vllm_engine.Engine("folder", tiny("llama").config, dataclasses.replace(ALONE, size=2))
    with pytest.raises(ValueError, match="runs decoder-only models, and the student is a 't5' model"):
        vllm_engine.Engine("folder", tiny("t5").config, ALONE)


def test_samples_are_written_with_their_place(tmp_path):
    one = Sample("so 1", "1", True, ended=True, tokens=3)
    samples = {"predict": [[[one, one]], [[one, one]]]}
    sampled.write(tmp_path / "s.jsonl", samples, RECORDS[:1], seed=5)
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    places = [(row["id"], row["stream"], row["seed"], row["sample"]) for row in rows]
    assert places == [("r0", "predict", seed, j) for seed in (5, 6) for j in (0, 1)]
    assert rows[0]["text"] == "so 1" and rows[0]["correct"] is True
