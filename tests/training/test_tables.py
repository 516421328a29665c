"""The training data of a run in tables: the values of every kind of row, and ranks that make a table once."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from aligned_tokenizers import byte_level, save_teacher
from chat_tokenizers import smollm2
from harness import FORKED, TRAIN, WORKERS, as_arguments, launch, tiny

from ibdistill.config.load import load_settings
from ibdistill.data import arrow_tables, loading, stored_records, token_ids, tokenizers
from ibdistill.data.records import Record
from ibdistill.data.tasks import demo
from ibdistill.data.tokenizing import taught, tokenize
from ibdistill.training import prepare, run_folder, tables

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "3 + 4 ?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "and 5 ?"},
    {"role": "assistant", "content": "<think>7 + 4</think>7"},
]


def write(path: Path, conversations: bool = True) -> str:
    rows = [
        {
            "question": f"{i} + 4 ?" * (i % 3 + 1),
            "label": "7" if conversations else str(i),
            "rationale": "4 " * i,
        }
        for i in range(1, 30)
    ]
    rows += [{"question": "1 + 1 ?", "label": "2", "rationales": ["two", "1 1 is two", "so 2"]}] * 2
    rows += [{"messages": MESSAGES}] * (3 if conversations else 0)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


CASES = {
    "predict-explain": ({}, byte_level),
    "reason": ({"objective.method": "dss+cot", "data.max_rationale_tokens": 40}, byte_level),
    "only-reason": ({"objective.method": "cot", "data.max_rationale_tokens": 60}, byte_level),
    "chat": ({"objective.method": "dss+cot", "data.format": "chat", "data.max_question_tokens": 24}, smollm2),
    "mixture": ({"data.task": ["demo", "jsonl"], "data.subsample": 9}, byte_level),
    "aligned": ({"objective.method": "kd", "objective.alignment": "text"}, lambda: byte_level(words=80)),
}


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("case", CASES)
def test_a_table_holds_what_one_block_in_memory_does(case, world, tmp_path, monkeypatch, caplog):
    """In blocks of 4, which end within a question's rationales; each row is that of its record alone."""
    settings, tokenizer = CASES[case][0], CASES[case][1]()
    chat = settings.get("data.format") == "chat"
    path = write(tmp_path / "data.jsonl", conversations=chat)
    given = {"data.task": "jsonl", "data.path": path} | settings | {"data.cache_dir": str(tmp_path / "cache")}
    given |= {"data.missing_rationales": "predict_only"} if chat else {}
    if case == "aligned":
        teacher = save_teacher(tmp_path / "teacher", byte_level(words=200))
        given |= {"teacher.model": teacher, "teacher.placement": "replica"}
    config = load_settings(None, given)
    needs = {"needs_rationale": True}
    plain, streams = loading.load(config.data, **needs), prepare.weights.tokenized_streams(config.objective)
    prefixes = {name: loading.TASKS[name].prefixes for name in plain.test}
    expected = tokenize(plain.train, prefixes, tokenizer, config.data, streams=streams)
    monkeypatch.setattr(arrow_tables, "BLOCK", 4)
    caplog.clear()
    stored = tables.load(config.data, world, **needs)
    assert list(stored.train) == plain.train and stored.report == plain.report
    made = tables.tokenize(config, stored, tokenizer, world)
    warned = warnings(caplog)
    found, kept = made.features, taught(expected)
    assert len(arrow_tables.opened(next((tmp_path / "cache").glob("tokens-*[!k]"))).batches) > 2
    if case == "aligned":
        expected = made.alignment.with_questions(expected, plain.train, prefixes)
        assert set(found.teacher_questions) == {"predict", "explain"}
    expected = expected.take(kept.tolist())
    assert list(made.records.train) == [plain.train[i] for i in kept]
    assert list(found.ids) == expected.ids and found.cut == expected.cut
    assert found.groups.tolist() == expected.groups.tolist() and found.whole_prompts == expected.whole_prompts
    assert (found.samples is None) == (expected.samples is None)
    assert found.samples is None or found.samples.tolist() == expected.samples.tolist()
    for kind in ("questions", "targets", "teacher_questions"):
        mine, theirs = getattr(found, kind), getattr(expected, kind)
        assert list(mine) == list(theirs)
        for name, ragged in mine.items():
            assert [ragged[i].tolist() for i in range(len(ragged))] == [
                theirs[name][i].tolist() for i in range(len(kept))
            ]
    if not chat:
        for i, record in enumerate(made.records.train):
            ids = token_ids.question_ids([prefixes[record.task][streams[0]] + record.question], tokenizer)[0]
            assert found.first_questions[i].tolist() == ids
    assert made.described == run_folder.described([plain.train[i] for i in kept], expected)
    caplog.clear()
    again = tables.tokenize(config, tables.load(config.data, world, **needs), tokenizer, world)
    assert warnings(caplog) == warned
    assert again.described == made.described and again.records.report == made.records.report


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "4cc280ad4a2ce7b1"),
        ({"objective.method": "dss+cot", "data.max_rationale_tokens": 20}, "5a4cdbbf9dd66df4"),
    ],
    ids=["dss", "dss-cot"],
)
def test_a_run_of_the_commit_before_tables_goes_on(settings, digest, world, monkeypatch):
    """The digests in `inputs.json` as commit c5da7e4 wrote them, of the whole demo."""
    monkeypatch.setattr(demo, "load_demo", demo.load_demo.__wrapped__)
    monkeypatch.setattr(stored_records, "code", lambda: "whole demo")
    config = load_settings(None, {"data.subsample": 100} | settings)
    records = tables.load(config.data, world, needs_rationale=True)
    made = tables.tokenize(config, records, tokenizers.demo_tokenizer(), world)
    assert made.described == f"100 records, digest {digest}"
    valid = run_folder.described(records.valid["demo"])
    assert valid == "1000 records, digest 2760400b8d384232"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ["3 of 6 training records teach nothing, as they have no rationale; earlier turns of the assi"]),
        ({"data.loss_on": "last_turn"}, []),
        ({"objective.method": "dss", "data.missing_rationales": "predict_only"}, []),
    ],
)
def test_earlier_turns_without_a_rationale_are_counted(settings, said, world, tmp_path, caplog):
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps({"messages": MESSAGES})] * 3))
    (tmp_path / "valid.jsonl").write_text(json.dumps({"messages": MESSAGES[:1] + MESSAGES[3:]}))
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": MESSAGES[:1] + MESSAGES[3:]}))
    given = {"data.task": "jsonl", "data.path": str(tmp_path), "data.cache_dir": str(tmp_path / "cache")}
    given |= {"objective.method": "cot", "data.format": "chat", "data.max_question_tokens": 60}
    config = load_settings(None, given | settings)
    made = tables.tokenize(config, tables.load(config.data, world, needs_rationale=True), smollm2(), world)
    found = [message[: len(said[0])] for message in warnings(caplog) if "teach nothing" in message and said]
    assert found == said and len(made.features) == (6 if "objective.method" in settings else 3)


def test_bad_data_is_refused_and_leaves_no_table(world, tmp_path):
    path = write(tmp_path / "data.jsonl", conversations=False)
    cache = tmp_path / "cache"
    given = {"data.task": "jsonl", "data.path": path, "data.cache_dir": str(cache), "objective.method": "cot"}
    given |= {"data.max_rationale_tokens": 20, "data.answer_marker": "so"}
    config = load_settings(None, given)
    records = tables.load(config.data, world, needs_rationale=True)
    short = [record for record in records.train if len(record.rationale) > 30]
    few = tables.keep(loading.Loaded(short, records.valid, records.test, {}), config.data, world)
    assert list(few.train) == short
    with pytest.raises(ValueError, match="no training record is left: the rationale of each is longer than"):
        tables.tokenize(config, few, byte_level(), world)
    config.data.long_reasoning = "refuse"
    with pytest.raises(
        ValueError, match=r"train: \d+ of \d+ rationales of the reason stream are longer than 20"
    ):
        tables.tokenize(config, records, byte_level(), world)
    (tmp_path / "data.jsonl").write_text('{"question": "a"}')
    with pytest.raises(ValueError, match=r"data.jsonl:1: no 'label'"):
        tables.load(config.data, world, needs_rationale=True)
    assert not list(cache.glob("tokens-*[!k]")) and len(list(cache.glob("records-*[!k]"))) == 2


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_process_that_makes_the_records_table_holds_few_of_them(form, world, tmp_path, monkeypatch):
    """When the twelfth block of 8 is written, Python has few more records and rows of it than before."""
    rows = [{"question": f"{i} ?", "label": "x", "rationale": f"because {i}"} for i in range(200)]
    path, counts, calls = tmp_path / "data", [], itertools.count(1)
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    rows.clear()

    def held() -> list[int]:
        found = gc.get_objects()
        rows = sum(type(one) is dict and {"question", "rationale"} <= one.keys() for one in found)
        return [sum(type(one) is Record for one in found), 0 if form == "parquet" else rows]

    def written(*given):
        counts.extend(held() if next(calls) == 12 else [])
        return made(*given)

    settings = {"data.task": "jsonl", "data.path": str(path), "data.cache_dir": str(tmp_path / "cache")}
    config = load_settings(None, settings)
    monkeypatch.setattr(arrow_tables, "BLOCK", 8)
    made = pyarrow.record_batch
    monkeypatch.setattr(pyarrow, "record_batch", written)
    before = held()
    stored = tables.load(config.data, world, needs_rationale=True)
    assert len(stored.train) == 162 and stored.train[-1].rationale == "because 199"
    assert all(now <= then + 16 for now, then in zip(counts, before, strict=True)), (counts, before)


def test_data_that_changes_while_it_is_read_is_refused(world, tmp_path, monkeypatch):
    path, made = Path(write(tmp_path / "data.jsonl", conversations=False)), loading.streamed
    given = {"data.task": "jsonl", "data.path": str(path), "data.cache_dir": str(tmp_path / "cache")}
    config = load_settings(None, given)

    def streamed(*args, **kwargs):
        found = made(*args, **kwargs)
        with path.open("a") as file:
            file.write("\n{}")
        return found

    monkeypatch.setattr(loading, "streamed", streamed)
    with pytest.raises(ValueError, match=r"data.path '.*' changed while it was read; start the run again"):
        tables.load(config.data, world, needs_rationale=True)
    assert not list((tmp_path / "cache").glob("records-*[!k]"))


def test_two_ranks_make_a_table_once_and_the_next_run_reads_it(tmp_path):
    """Through the launcher, at the default of everything about tables but their folder; a warning about the
    data shows which ranks have tokenized it."""
    losses, cache = [], tmp_path / "cache"
    settings = {"data.cache_dir": str(cache), "data.max_rationale_tokens": 12, "optim.max_steps": 3}
    settings |= {"run.report_to": '["jsonl"]', "run.export": False, "run.test_limit": 2, "run.eval_limit": 2}
    for run, command in (("first", TRAIN), ("second", FORKED)):
        log, launched = tmp_path / f"{run}.log", command == TRAIN
        arguments = as_arguments(tiny(tmp_path / run, **settings))
        code = launch(
            [command, *([] if launched else ["2"]), *arguments], log=log, ranks=2 if launched else None
        )
        said = log.read_text()
        assert code == 0, said[-4000:]
        assert said.count("tokenizing 100 training records") == launched
        assert said.count("is there already") == (0 if launched else 2)
        assert len(re.findall(r"train: \d+ of 100 rationales are longer than 12 tokens", said)) == 1
        assert "[rank 1] train:" not in said
        rows = map(json.loads, (tmp_path / run / "metrics.jsonl").open())
        losses.append([row["loss/total"] for row in rows if "loss/total" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert len(list(cache.glob("*/table.arrow"))) == 2


def test_nodes_of_other_data_are_noticed(tmp_path):
    """Two ranks that are the first of a node each, with a folder of tables for each node."""
    for host, rows in (("0", 30), ("1", 30), ("2", 31)):
        (tmp_path / host).mkdir()
        lines = [
            json.dumps({"question": "n0 ?" * i, "label": "n0", "rationale": "so"}) for i in range(1, rows)
        ]
        (tmp_path / host / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "4").mkdir()
    tested = np.random.default_rng(0).permutation(29)[0]  # of 29 records three are for tests
    lines = (tmp_path / "0" / "data.jsonl").read_text().split("\n")
    lines[tested] = lines[tested].replace("so", "else")
    (tmp_path / "4" / "data.jsonl").write_text("\n".join(lines))
    log = tmp_path / "log"
    assert launch([str(WORKERS / "node_tables.py"), str(tmp_path)], log=log) == 0, log.read_text()[-4000:]
    alike, differ, failed, tests = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(4)]
    assert alike == ["", ""]
    assert differ[0] == differ[1] and differ[0].startswith("the records or their tokens differ between")
    train = [re.sub(r", all splits \w+", "", value) for value in re.findall(r"'(.*?)'", tests[0])]
    assert tests[0].startswith("the records or their tokens differ between") and len(set(train)) == 1
    assert failed[0] == failed[1] and "does not exist" in failed[0]
