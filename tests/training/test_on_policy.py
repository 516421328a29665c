"""On-policy text: which questions get it, what a step on it minimises, and that a resumed run repeats it."""

from __future__ import annotations

import json
import logging
import types

import numpy as np
import pytest
import torch
from experts import one_layer
from feature_tables import random_features
from harness import FORKED, TRAIN, WORKERS, as_arguments, launch, same, steps, tiny, weights

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.config.sections import DataConfig
from ibdistill.data.sampler import OnPolicySampler, Sampler
from ibdistill.models import forward
from ibdistill.training import on_policy, step_files

KILLED = str(WORKERS / "killed_in_sampling.py")

TAUGHT = {
    "objective.method": "kd",
    "teacher.placement": "replica",
    "teacher.model": "demo-teacher",
    "teacher.precision": "fp32",
    "student.dropout": 0.0,
    "run.term_gradients_every": 0,
    "run.save_every": 100,
    "on_policy.share": 0.5,
    "on_policy.max_tokens": 6,
}


@pytest.mark.parametrize(("share", "own"), [(0.5, 8), (1.0, 16), (0.3, 5)])
def test_every_batch_has_its_share_of_own_text(share, own):
    gold = random_features(50, seed=1)
    plan = OnPolicySampler(gold, DataConfig(), batch_size=16, seed=3, share=share)
    plain = Sampler(gold, DataConfig(), batch_size=16, seed=3)
    window = range(2, 6)
    wanted = plan.to_sample(window)
    texts = [np.arange(row % 5) for row in wanted]
    both = gold + gold.with_own_text(wanted, texts)
    plan.use(gold.with_own_text(wanted, texts), wanted, window, gold)
    seen = set()
    for step in range(8):
        rows, was = plan.step(step), plain.step(step)
        origin = np.where(rows < 50, rows, wanted[np.maximum(rows - 50, 0)])
        assert sorted(origin.tolist()) == sorted(was.tolist())  # the same questions
        assert (rows >= 50).sum() == (own if step in window else 0)
        seen |= set(origin[rows >= 50].tolist())
        counts = plan.counts(step)
        lengths = both.targets["explain"].lengths[rows]
        assert (
            counts["explain"] == lengths[rows < 50].sum() and counts["sampled"] == lengths[rows >= 50].sum()
        )
        assert counts["explained"] == (lengths[rows < 50] > 0).sum()
        assert counts["sampled_questions"] == (rows >= 50).sum() and counts["questions"] == 16
        parts = [plan.micro_batches(step, rank=r, world_size=2, micro_batch_size=4) for r in range(2)]
        assert sorted(np.concatenate([*parts[0], *parts[1]]).tolist()) == sorted(rows.tolist())
        assert all((np.diff((part >= 50).astype(int)) >= 0).all() for rank in parts for part in rank)
    assert seen == set(wanted.tolist())


@pytest.mark.parametrize(
    ("method", "share"), [("kd", 0.5), ("ib+kd", 0.25), ("cot+kd", 0.5), ("cot+kd", 1.0)]
)
def test_a_step_is_autograd_of_the_plain_formula(make_job, method, share):
    """CE and KD on the data's text, KD alone on own text, each question's text with the same weight."""
    mine = {"objective.method": method, "objective.estimator": "paper", "on_policy.share": share}
    job = make_job(**TAUGHT | mine | {"objective.beta": 0.0, "optim.micro_batch_size": 4})
    on_policy.refresh(job)
    n, objective = len(job.gold), job.config.objective
    text, label = ("explain", "predict") if method != "cot+kd" else ("rationale", "answer")
    replaced = {"explain": 0.5, "predict": 0.0} if method != "cot+kd" else {"rationale": 0.5, "answer": 0.5}
    counts, rows = job.sampler.counts(0), job.sampler.step(0)
    assert (rows >= n).sum() == round(share * 8)
    model, expected = job.engine.module.model, 0.0
    for micro, batch in job.micro_batches():
        states = forward.states(model, batch).targets
        theirs = job.teacher_answers.of(micro, batch)
        for segment in (label, text):
            log_p = torch.log_softmax(states[segment] @ model.lm_head.weight.T, -1)
            q = torch.softmax(theirs.targets[segment].hidden @ theirs.weight.T, -1)
            ce = torch.nn.functional.nll_loss(log_p, batch.labels[segment], reduction="none")
            kd = (q * (q.log() - log_p)).sum(-1)
            own = torch.repeat_interleave(torch.from_numpy(micro >= n), batch.cu[segment].diff().long())
            if segment == "predict":
                own = torch.zeros_like(own)  # labels stay the data's
            data = 0.5 * (1 - share if replaced[segment] else 1.0) / max(1, counts[segment])
            expected = expected + data * (ce + kd)[~own].sum()
            mixed = share * sum(replaced.values()) / max(1, counts["sampled"])
            expected = expected + mixed * kd[own].sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    total, got = 0.0, None
    factors = train.step_weights(objective, counts)
    terms = []
    for micro, batch in job.micro_batches():
        loss, more = job.engine.module(batch, factors, job.teacher_answers.of(micro, batch), 1)
        total, terms = total + loss, [*terms, more]
    got = torch.autograd.grad(total, parameters, allow_unused=True)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)
    assert all({"ce_sampled", "kd_sampled"} <= own.keys() for own in terms)
    train.train_step(job)
    job.state.step = 1
    scalars = train.monitor_log.losses(job.meter.close_interval(), job.config)
    assert scalars["loss/total"] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_text_depends_on_question_step_and_seed_alone(make_job, tmp_path):
    job = make_job(tmp_path / "a", **TAUGHT)
    with job.whole() as model:
        all_of_them = on_policy.sample(job, model, range(10))
        job.config.run.eval_batch_size = 3
        some = on_policy.sample(job, model, [2, 7])
        ranks = [types.SimpleNamespace(rank=r, size=2, device=job.world.device) for r in range(2)]
        shares = []
        for rank in ranks:
            job.world = rank
            shares += on_policy.sample(job, model, range(10))
        job.world, job.state.step = ranks[0], 5
        later = on_policy.sample(job, model, range(0, 10, 2))
    assert [all_of_them[2], all_of_them[7]] == some and sorted(shares) == all_of_them
    assert [text.record for text in all_of_them] == list(range(10))
    assert [text.ids for text in later] != [all_of_them[text.record].ids for text in later]
    assert all(1 <= len(text.ids) <= 6 for text in all_of_them)
    eos = job.tokenizer.eos_token_id
    for text in all_of_them:
        assert text.finished == (text.ids[-1] == eos and bool(text.text.strip()))
        assert text.id == job.records.train[text.record].id


@pytest.mark.parametrize("unfinished", ["keep", "replace"])
def test_unfinished_texts_are_counted_and_kept_or_replaced(make_job, monkeypatch, unfinished):
    job = make_job(**TAUGHT | {"on_policy.share": 1.0, "on_policy.unfinished": unfinished})

    def texts(job, _, rows):
        return [on_policy.Text(int(row), "", [5, 6], "a", finished=i % 2 == 0) for i, row in enumerate(rows)]

    monkeypatch.setattr(on_policy, "sample", texts)
    scalars = on_policy.refresh(job)
    rows = job.sampler.to_sample(range(12))
    assert scalars["on_policy/texts"] == len(rows) == job.state.sampled
    assert scalars["on_policy/unfinished_share"] == pytest.approx(len(rows) // 2 / len(rows))
    own = sum(job.sampler.counts(step)["sampled_questions"] for step in range(12))
    assert own == 96 if unfinished == "keep" else 96 / 3 < own < 96 * 2 / 3


@pytest.mark.parametrize("method", ["kd", "cot+kd"])
def test_a_round_without_a_finished_text_is_the_data_s_alone_with_replace(
    make_job, tmp_path, caplog, monkeypatch, method
):
    """A limit of one token: no text ends with words. The steps are those of a run without own text."""
    monkeypatch.setattr(logging.getLogger("ibdistill"), "propagate", True)
    mine = {"on_policy.share": 1.0, "on_policy.unfinished": "replace", "on_policy.max_tokens": 1}
    mine |= {"objective.method": method, "objective.divergence": "reverse"}
    job = make_job(tmp_path / "own", **TAUGHT | mine)
    train.sample_own_text(job)
    plain = make_job(tmp_path / "plain", **TAUGHT | mine | {"on_policy.share": 0.0})
    steps(job, 2)
    steps(plain, 2)
    assert job.state.sampled == job.state.unfinished == 96 and job.sampler.counts(0)["sampled"] == 0
    for name, ours in weights(plain).items():
        torch.testing.assert_close(weights(job)[name], ours, rtol=1e-4, atol=1e-6)
    assert "100% of the student's own texts have no end" in caplog.text
    job.config.on_policy.unfinished = "keep"
    texts = [on_policy.Text(**row) for row in step_files.read(job.folder / "on_policy" / job.state.own_text)]
    on_policy.use(job, texts, job.state.step)
    train.train_step(job)  # texts of one token, or of an end alone
    assert job.sampler.counts(2)["sampled"] == 8 == job.sampler.counts(2)["sampled_questions"]


@pytest.mark.parametrize(("every", "start", "due"), [(1, 0, [0, 12]), (0.5, 0, [0, 6]), (1e-9, 0.9, [11])])
def test_sampling_comes_at_the_steps_that_the_settings_name(every, start, due):
    config = load_settings(None, TAUGHT | {"on_policy.every": every, "on_policy.start": start})
    config.optim.max_steps = 12
    state, sampler = types.SimpleNamespace(step=0), types.SimpleNamespace(steps_per_epoch=12)
    job = types.SimpleNamespace(config=config, state=state, sampler=sampler)
    found = []
    for state.step in range(12):
        found += [state.step] if on_policy.is_due(job) else []
    assert found == [step for step in due if step < 12]


@pytest.mark.parametrize(
    ("every", "stop", "cache"), [(0.25, 4, ""), (0.25, 3, ""), (2, 5, "cache"), (1e-3, 2, "")]
)
def test_a_run_that_is_interrupted_and_resumed_is_the_same(make_job, tmp_path, every, stop, cache):
    settings = TAUGHT | {"on_policy.every": every, "optim.max_steps": 16, "data.subsample": 64}

    def run(folder, until):
        own = settings | (
            {"teacher.cache": str(folder / cache), "teacher.cache_form": "states"} if cache else {}
        )
        job = make_job(folder, **own)
        while job.state.step < until:
            if on_policy.is_due(job):
                train.sample_own_text(job)
            train.train_step(job)
        if job.teacher_answers:
            job.teacher_answers.flush()
        job.checkpoints.save(job.engine, job.state)
        return job

    whole = run(tmp_path / "whole", 8)
    killed = run(tmp_path / "killed", stop)
    steps_after = killed.state.step
    if on_policy.is_due(killed):
        train.sample_own_text(killed)
    steps(killed, 1)  # after its checkpoint; the resumed run does not know of it
    resumed = run(tmp_path / "killed", 8)
    assert same(weights(whole), weights(resumed)) and steps_after == stop
    assert (whole.state.sampled, whole.state.own_text) == (resumed.state.sampled, resumed.state.own_text)
    assert whole.state.sampled > 0


@pytest.mark.parametrize("way", ["killed", "signal"])
def test_a_run_that_ends_between_two_blocks_goes_on_behind_the_last(make_job, tmp_path, monkeypatch, way):
    """Blocks of four texts: the resumed run decodes those alone that are not there."""
    settings = TAUGHT | {"on_policy.every": 0.25, "optim.max_steps": 16, "data.subsample": 64}
    settings["run.eval_batch_size"] = 1
    decode, decoded = on_policy.decoding.decode, []

    def counted(model, tokenizer, prompts, **rest):
        decoded.append(len(prompts))
        return decode(model, tokenizer, prompts, **rest)

    monkeypatch.setattr(on_policy.decoding, "decode", counted)

    def run(folder, until):
        job = make_job(folder, **settings)
        while job.state.step < until:
            if on_policy.is_due(job):
                train.sample_own_text(job)
            train.train_step(job)
        job.checkpoints.save(job.engine, job.state)
        return job

    whole, killed = run(tmp_path / "whole", 6), run(tmp_path / "broken", 4 if way == "signal" else 3)
    while not on_policy.is_due(killed):  # the killed one has its checkpoint a step before
        train.train_step(killed)
    append = step_files.append

    def and_killed(path, rows):
        append(path, rows)
        with path.open("ab") as file:
            file.write(b'\n[{"record": 1, "id": "cut off')
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if way == "killed":
            patched.setattr(step_files, "append", and_killed)
        else:
            patched.setattr(killed.stop, "exit_code", lambda: 85)
        with pytest.raises(KeyboardInterrupt if way == "killed" else SystemExit):
            train.sample_own_text(killed)
    folder = killed.folder / "on_policy"
    assert len(list(folder.glob("step-00000004-*.part"))) == 1
    decoded.clear()
    resumed = run(tmp_path / "broken", 6)
    assert decoded == [4]  # of eight
    assert same(weights(whole), weights(resumed)) and whole.state.own_text == resumed.state.own_text
    assert whole.state.sampled == resumed.state.sampled
    names = [{path.name for path in (tmp_path / n / "on_policy").iterdir()} for n in ("whole", "broken")]
    assert names[0] == names[1] and all(name.endswith(".jsonl") for name in names[0])


def test_blocks_of_other_weights_or_settings_are_not_used(make_job):
    job = make_job(**TAUGHT)
    with job.whole() as model:
        path, rows = on_policy._there(job, model)
        step_files.append(path, [{"record": 1}])
        assert rows == [] and on_policy._there(job, model) == (path, [{"record": 1}])
        job.config.on_policy.temperature = 0.9
        assert on_policy._there(job, model)[0] != path
        job.config.on_policy.temperature = 1.0
        bias = next(model.parameters())
        bias.data.view(-1)[0] += 1e-6
        other, rows = on_policy._there(job, model)
        assert other != path and rows == []


def test_a_damaged_or_missing_file_is_refused(make_job, tmp_path):
    job = make_job(**TAUGHT | {"optim.max_steps": 40})
    train.sample_own_text(job)
    train.train_step(job)
    job.checkpoints.save(job.engine, job.state)
    path = job.folder / "on_policy" / job.state.own_text
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == step_files.read(path) and rows[0].keys() == {"record", "id", "ids", "text", "finished"}
    path.write_text(path.read_text().replace('"record": ', '"record": 1', 1))
    with pytest.raises(ValueError, match="is damaged: the checkpoint was trained with its records"):
        make_job(**TAUGHT | {"optim.max_steps": 40})


def test_text_that_cannot_be_written_leaves_the_data_s(make_job, caplog):
    job = make_job(**TAUGHT)
    (job.folder / "on_policy").write_text("a file")
    train.sample_own_text(job)
    assert job.state.own_text == "" and job.sampler.counts(0).get("sampled", 0) == 0
    assert "the student's own text cannot be kept" in caplog.text
    train.train_step(job)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective.method": "dss", "teacher.placement": "none"}, r"take kd, ib\+kd, cot\+kd"),
        ({"objective.gamma": 0.0, "objective.method": "ib+kd"}, "with objective.gamma 0.0 has none"),
        (
            {"teacher.placement": "cache", "teacher.cache": "x"},
            "teacher.placement cache, whose answers are there before training, has none",
        ),
        ({"data.unlabelled": 40}, "data.unlabelled is set"),
        ({"optim.tokens_per_batch": 500, "optim.batch_size": 64}, "set optim.batch_size instead"),
        ({"on_policy.max_tokens": 33}, "on_policy.max_tokens is 33, .* at most 32 tokens"),
        ({"on_policy.start": 0.999}, "on_policy.start is 0.999: none of the .* steps"),
        ({"on_policy.share": 1.5}, r"on_policy.share is 1.5; it must be in \[0, 1\]"),
        ({"on_policy.every": 0}, "on_policy.every is 0.0; it must be above 0"),
    ],
)
def test_what_cannot_go_with_own_text_is_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, tiny(tmp_path, **TAUGHT) | more)


def test_two_ranks_killed_and_resumed_through_the_launcher(tmp_path):
    """Both models in ZeRO-3 and of one layer, a sampling every three steps in two blocks, a checkpoint every
    four; killed between the blocks of the third one."""
    settings = TAUGHT | {
        "data.subsample": 48,
        "optim.max_steps": 9,
        "optim.micro_batch_size": 2,
        "run.save_every": 4,
        "run.test_limit": 4,
        "run.eval_batch_size": 1,
        "run.report_to": [],
        "deepspeed.config": "zero3",
        "teacher.placement": "zero3",
        "objective.divergence": "k1",
        "on_policy.every": 0.5,
        "student.model": one_layer(tmp_path / "student"),
        "teacher.model": one_layer(tmp_path / "teacher", "demo-teacher"),
    }
    runs = {name: as_arguments(tiny(tmp_path / name, **settings)) for name in ("whole", "broken")}
    logs = {name: tmp_path / f"{name}.log" for name in ("whole", "broken", "resumed", "one")}
    assert launch([FORKED, "2", *runs["whole"]], log=logs["whole"]) == 0, logs["whole"].read_text()[-4000:]
    assert launch([KILLED, *runs["broken"]], ranks=2, log=logs["broken"]) != 0
    assert "step 6/9" in logs["broken"].read_text() and "step 7/9" not in logs["broken"].read_text()
    (part,) = (tmp_path / "broken/on_policy").glob("*.part")
    kept = len(step_files.pieces(part))
    assert launch([TRAIN, *runs["broken"]], ranks=2, log=logs["resumed"]) == 0, logs["resumed"].read_text()[
        -4000:
    ]
    again = logs["resumed"].read_text()
    assert f"on-policy text: {kept} of 12 are there from before" in again and kept == 8
    assert again.count("on-policy text: 12 of 12") == 1 and "on-policy text: 8 of 12\n" not in again
    assert "resumed from" in logs["resumed"].read_text()
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in runs]
    assert weights[0] == weights[1]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in runs]
    assert results[0]["on_policy"] == results[1]["on_policy"] and results[0]["on_policy"]["texts"] == 4 * 9
    names = [sorted(path.name for path in (tmp_path / name / "on_policy").iterdir()) for name in runs]
    assert names[0] == names[1] and len(names[0]) == 3  # a name holds a digest of the text
    one = as_arguments(
        tiny(tmp_path / "one", **settings | {"optim.max_steps": 3, "teacher.placement": "replica"})
    )
    assert launch([FORKED, "1", *one], log=logs["one"]) == 0, logs["one"].read_text()[-4000:]
    first = {name: tmp_path / name / "on_policy" / names[0][0] for name in ("whole", "one")}
    assert first["one"].exists() and first["one"].read_bytes() == first["whole"].read_bytes()
