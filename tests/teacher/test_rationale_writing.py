"""The teacher's text: what it writes, how it is read, kept, shared over ranks, resumed and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experts import by_heart, demo_records, taught
from harness import ROOT, as_arguments, full_disk, kill_session, launch, start, tiny
from miniatures import lines
from tiny_models import byte_tokenizer
from tokenizers.normalizers import Replace

from ibdistill.config.load import load_settings
from ibdistill.data import loading, tokenizers
from ibdistill.data.records import Record, map_numbers
from ibdistill.data.tasks import demo
from ibdistill.data.tasks.jsonl import parse_text
from ibdistill.evaluation import predictions
from ibdistill.models import decoding
from ibdistill.models.decoding import Answer, Sampling
from ibdistill.objectives import distillation
from ibdistill.runtime.distributed import StopRequest
from ibdistill.teacher import writing
from ibdistill.teacher.texts import open_cache, parse, prompts_of, read_texts
from ibdistill.training import pseudo_labels
from ibdistill.training.prepare import prepare

WRITE = str(ROOT / "ibdistill" / "write_rationales.py")
N = 10


@pytest.fixture(scope="module")
def expert(tmp_path_factory) -> Path:
    return by_heart(tmp_path_factory.mktemp("expert") / "model", taught(demo_records(N)))


@pytest.mark.parametrize("form", ["states", "topk"])
def test_agreement_with_the_labels_is_what_greedy_decoding_would_give(make_job, tmp_path, expert, form):
    """Both for the expert, which knows all labels but three, and for a teacher that knows none."""
    settings = {"data.subsample": N, "optim.batch_size": N, "objective.method": "kd"}
    settings |= {"teacher.placement": "replica", "teacher.precision": "fp32", "teacher.cache_form": form}
    for model in (str(expert), "demo-teacher"):
        overrides = {"teacher.model": model, "teacher.cache": str(tmp_path / Path(model).name)}
        job = make_job(tmp_path / f"run-{Path(model).name}", **settings, **overrides)
        rows, batch = job.micro_batches()[0]
        counts = distillation.teacher_accuracy(job.teacher_answers.of(rows, batch), batch)
        with job.teacher_answers.teacher.text_model(job.tokenizer) as teacher:
            said = predictions.evaluate(
                teacher, job.tokenizer, job.records.train, ["predict"], job.config.data, job.world
            )
        right = sum(prediction.label == prediction.record.label for prediction in said)
        assert (counts["teacher_right"], counts["teacher_asked"]) == (right, N)
        assert (right > 0) == (model == str(expert)) and right < N


@pytest.fixture
def asked(expert, tmp_path):
    """Settings under which the expert writes about the records that it knows."""
    return tiny(tmp_path / "run") | {
        "data.subsample": N,
        "data.max_label_tokens": 32,
        "data.max_rationale_tokens": 64,
        "teacher.model": str(expert),
        "teacher.placement": "replica",
        "teacher.precision": "fp32",
        "teacher.rationales": "all",
        "teacher.rationale_cache": str(tmp_path / "texts"),
        "teacher.write_batch_size": 2,
        "optim.max_steps": 1,
    }


def write(world, settings, **overrides):
    loaded = load_settings(None, settings | overrides)
    records = loading.load(loaded.data, needs_rationale=False).train
    records += pseudo_labels.questions(loaded.data, "taught")
    return writing.write(loaded, records, world, StopRequest())


def texts(folder) -> dict[str, dict[str, str]]:
    return read_texts(Path(folder))


def test_it_writes_what_it_knows_and_agree_keeps_what_is_right(world, asked):
    records, said = demo_records(N), taught(demo_records(N))
    written = write(world, asked, **{"data.label_source": "teacher"})
    own = "demo/train/teacher_"
    assert written.counts == {f"{own}asked": 10, f"{own}parsed": 9, f"{own}agrees": 7, f"{own}kept": 9}
    assert written.records == said[:2] + said[3:]  # its labels, right or wrong; not the unreadable one
    assert write(world, asked).records == records[:2] + records[3:]  # its rationales, the true labels
    agreeing = write(world, asked, **{"teacher.keep": "agree", "data.label_source": "teacher"})
    assert agreeing.records == records[3:] and agreeing.counts[f"{own}kept"] == 7


def test_lines_and_provenance_can_be_read_by_people(world, asked, tmp_path, expert):
    write(world, asked)
    rows = [
        json.loads(line) for f in (tmp_path / "texts").glob("*.jsonl") for line in f.read_text().splitlines()
    ]
    rows = {row["id"]: row for row in rows}
    for record, said in zip(demo_records(N), taught(demo_records(N)), strict=True):
        row = rows[record.id]
        assert row["question"] == record.question
        assert row["texts"] == {"predict": said.label, "explain": said.rationale}
        readable = said.label != "n0 + *"
        assert (row["rationale"], row["label"]) == (
            (said.rationale, said.label) if readable else (None, None)
        )
    found = json.loads((tmp_path / "texts/fingerprint.json").read_text())
    assert len(found["teacher"]) == 16 and found["template"] == "prefixes" and found["temperature"] == 0
    summary = json.loads((tmp_path / "texts/summary.json").read_text())
    assert summary == {
        "teacher.model": str(expert),
        "counts": {
            f"demo/train/teacher_{k}": n for k, n in dict(asked=10, parsed=9, agrees=7, kept=9).items()
        },
    }


def test_nothing_is_asked_twice_and_a_torn_line_is_asked_again(world, asked, tmp_path, monkeypatch):
    first = write(world, asked)
    path = next((tmp_path / "texts").glob("*.jsonl"))
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    questions = []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *a, **k: (questions.extend(a[2]), decode(*a, **k))[1])
    again = write(world, asked)
    assert again.records == first.records
    lost = json.loads(content.splitlines()[-1])["question"]
    assert sorted(questions) == [f"explain: {lost}", f"predict: {lost}"]
    questions.clear()
    offline = write(world, asked, **{"teacher.placement": "cache"})
    assert offline.records == first.records and not questions and offline.teacher is None
    path.unlink()
    with pytest.raises(
        ValueError, match=r"lacks 9 of 10 records; let the teacher write in another placement"
    ):
        write(world, asked, **{"teacher.placement": "cache"})


DAMAGED = [
    "[1]",
    '"text"',
    "3",
    "null",
    "{}",
    "\\ud83d",
    "[" * 100_000,
    '{"key": "k"}',
    '{"key": 3, "texts": {}}',
]
DAMAGED += ['{"key": "k", "texts": null}', '{"key": "k", "texts": {"predict": "1"}}']
DAMAGED += ['{"key": "k", "texts": {"predict": "1", "explain": null}}']
DAMAGED += ['{"key": "k", "texts": {"predict": "1", "explain": "\\ud83d"}}']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named_and_left_out_and_the_others_are_read(tmp_path, caplog, line):
    good = [json.dumps({"key": k, "texts": {"predict": "1", "explain": k}}) for k in ("a", "b")]
    path = tmp_path / "rank-00000-x.jsonl"
    path.write_text("\n".join([good[0], line, good[1], ""]))
    assert texts(tmp_path) == {k: {"predict": "1", "explain": k} for k in ("a", "b")}
    # pytest listens to loggers that do not propagate too; one that is made to would be heard twice
    (warning,) = caplog.messages
    assert f"{path}:2 is ignored, and its record is asked about again: " in warning and len(warning) < 500
    assert texts(tmp_path).keys() == {"a", "b"}  # another start, another element of a job array
    assert len(caplog.messages) == 1


def test_each_damaged_line_is_warned_of_once_even_where_the_note_is_lost(tmp_path, caplog):
    paths = [tmp_path / f"rank-0000{rank}-x.jsonl" for rank in (0, 1)]
    paths[0].write_text("{\n")
    texts(tmp_path)
    paths[1].write_text("[]\n{\n")  # a second file with the same damage, and another one
    texts(tmp_path)
    places = [message.split(" is ignored")[0] for message in caplog.messages]
    assert places == [f"{paths[0]}:1", f"{paths[1]}:1", f"{paths[1]}:2"]
    paths[0].write_text("[3]\n")  # another damage in the place of one that is known
    texts(tmp_path)
    assert len(caplog.messages) == 4 and f"{paths[0]}:1 is ignored" in caplog.messages[3]
    (tmp_path / "warned.json").write_text("[" * 100_000)
    texts(tmp_path)
    assert len(caplog.messages) == 4 + 3
    texts(tmp_path)
    assert len(caplog.messages) == 4 + 3


@pytest.mark.parametrize("content", ["[]", "null", "3", '["teacher"]', "{", "[" * 100_000])
def test_a_damaged_fingerprint_of_texts_is_refused(tmp_path, content):
    (tmp_path / "fingerprint.json").write_text(content)
    with pytest.raises(ValueError, match="fingerprint.json is damaged; delete .* or choose another folder"):
        open_cache(tmp_path, {"teacher": "a"})
    os.mkfifo(tmp_path / "rank-0.jsonl")
    with pytest.raises(ValueError, match="rank-0.jsonl is a named pipe, a device or a socket"):
        open_cache(tmp_path, {"teacher": "a"})


def test_a_folder_in_place_of_a_file_of_texts_is_named(tmp_path):
    (tmp_path / "rank-00000-x.jsonl").mkdir()
    with pytest.raises(ValueError, match="rank-00000-x.jsonl cannot be read"):
        texts(tmp_path)


def test_a_full_disk_ends_the_writing_and_the_same_command_goes_on(world, asked, tmp_path):
    with full_disk(3000), pytest.raises(ValueError, match="texts takes no more texts: File too large; free"):
        write(world, asked)
    kept = texts(tmp_path / "texts")
    assert 0 < len(kept) < N
    written = write(world, asked)
    assert written.counts["demo/train/teacher_parsed"] == 9
    assert texts(tmp_path / "texts").items() >= kept.items()


def test_a_decoder_only_teacher_writes_what_it_knows(world, asked, tmp_path):
    said = taught(demo_records(N))
    model = by_heart(tmp_path / "decoder", said, preset="demo-student-decoder", steps=120)
    written = write(world, asked, **{"teacher.model": str(model), "data.label_source": "teacher"})
    assert written.records == said[:2] + said[3:]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"teacher.model": "demo-teacher"}, 'teacher is "[0-9a-f]{16}" there and "preset demo-teacher" here'),
        ({"teacher.precision": "bf16"}, 'precision is "fp32" there and "bf16" here'),
        (
            {"teacher.temperature": 0.5},
            "seed is absent there and 0 here; temperature is 0.0 there and 0.5 here",
        ),
        ({"data.max_label_tokens": 31}, "max_label_tokens is 32 there and 31 here"),
    ],
)
def test_a_cache_of_something_else_is_refused(world, asked, changed, difference):
    write(world, asked)
    with pytest.raises(ValueError, match=f"written by something else: {difference}"):
        write(world, asked, **changed)


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (lambda t: None, False),
        (lambda t: setattr(t, "chat_template", "{{ messages }}"), False),  # prompts are not made with it
        (lambda t: t.add_tokens(["<new>"]), True),
        (lambda t: setattr(t, "bos_token", "0"), True),
        (lambda t: setattr(t.backend_tokenizer, "normalizer", Replace("+", "-")), True),
    ],
)
def test_a_cache_knows_the_tokenizer_of_its_teacher(asked, tmp_path, change, is_another):
    tokenizer, prints = byte_tokenizer(), []
    for name, edit in (("here", lambda t: None), ("there", change)):
        edit(tokenizer)
        shutil.copytree(asked["teacher.model"], tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        config = load_settings(None, asked | {"teacher.model": str(tmp_path / name)})
        prints.append(writing.fingerprint(config, ""))
    here, there = prints
    assert {n for n in here if here[n] != there[n]} == ({"tokenizer"} if is_another else set())


def test_a_cache_of_another_vocabulary_is_refused(asked, tmp_path):
    config = load_settings(None, asked)
    here = writing.fingerprint(config, "")
    vocabulary = tokenizers.demo_tokenizer().get_vocab()
    assert vocabulary != byte_tokenizer().get_vocab()
    shutil.copytree(config.teacher.model, tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    other = load_settings(None, asked | {"teacher.model": str(tmp_path / "other")})
    open_cache(tmp_path / "texts", here)
    with pytest.raises(
        ValueError, match="written by something else: tokenizer is .* delete that one to have"
    ):
        open_cache(tmp_path / "texts", writing.fingerprint(other, ""))
    before_digests = {name: value for name, value in here.items() if name != "tokenizer"}
    open_cache(tmp_path / "old", before_digests)
    with pytest.raises(ValueError, match="tokenizer is absent there"):
        open_cache(tmp_path / "old", here)


def test_only_what_is_missing_is_asked_for(world, asked, tmp_path, monkeypatch):
    rows = [{"question": f"q {i} ?", "label": f"{i}", "rationale": "own"} for i in range(4)]
    del rows[1]["rationale"], rows[2]["label"]
    rows[3] = {"question": "q 3 ?"}
    lines(tmp_path / "data/train.jsonl", rows)
    lines(tmp_path / "data/test.jsonl", rows[:1])
    lines(tmp_path / "data/valid.jsonl", rows[:1])

    def decode(model, tokenizer, questions, **kwargs):
        return [Answer(f"to {q.split(': ')[1]}" if "explain" in q else "1", 1.0, 1.0) for q in questions]

    monkeypatch.setattr(decoding, "decode", decode)
    mine = asked | {"data.task": "jsonl", "data.path": str(tmp_path / "data"), "data.subsample": 1.0}
    mine |= {"teacher.rationales": "missing", "data.label_source": "teacher"}
    found = [(r.label, r.rationale, r.gold) for r in write(world, mine).records]
    assert found == [("0", "own", "0"), ("1", "to q 1 ?", "1"), ("1", "own", ""), ("1", "to q 3 ?", "")]
    kept = write(world, mine, **{"teacher.keep": "agree"})
    assert [r.question for r in kept.records] == ["q 0 ?", "q 1 ?"]  # nothing to agree with for the others
    with pytest.raises(ValueError, match=r"train.jsonl:3: no 'label'"):
        write(world, mine, **{"data.label_source": "gt"})


def test_an_unlabelled_record_is_never_held_out(tmp_path):
    rows = [{"question": f"q {i} ?", **({"label": "1"} if i % 2 else {})} for i in range(40)]
    lines(tmp_path / "data/train.jsonl", rows)
    lines(tmp_path / "data/test.jsonl", rows[1:2])
    settings = {"data.task": "jsonl", "data.path": str(tmp_path / "data"), "data.label_source": "teacher"}
    settings |= {"teacher.rationales": "all", "teacher.placement": "replica", "teacher.model": "demo-teacher"}
    loaded = loading.load(load_settings(None, settings).data, needs_rationale=False)
    assert len(loaded.valid["jsonl"]) == 2 and all(r.gold for r in loaded.valid["jsonl"])
    assert sum(not r.label for r in loaded.train) == 20 and len(loaded.train) == 38


def test_unreadable_answers_stop_the_run_with_two_examples(world, asked, monkeypatch):
    rounds = []

    def decode(model, tokenizer, questions, **kwargs):
        rounds.append(len(questions))
        return [Answer("n0 +" if "predict" in q else "so", 1.0, 1.0) for q in questions]

    monkeypatch.setattr(decoding, "decode", decode)
    message = (
        r"10 of 10 answers of .* \(100%\) have no rationale and label, more than teacher.max_unparsed 0.5"
    )
    with pytest.raises(ValueError, match=message) as caught:
        write(world, asked)
    assert (
        len(re.findall(r"asked '.*?' it wrote \{'predict': 'n0 \+', 'explain': 'so'\}", str(caught.value)))
        == 2
    )
    rounds.clear()
    with pytest.raises(ValueError, match=r"64 of 64 answers"):  # long before all 300 are there
        write(world, asked, **{"data.subsample": 300, "teacher.rationale_cache": asked["run.dir"] + "/more"})
    assert sum(rounds) == 2 * 64
    with pytest.raises(ValueError, match="leaves none of the 10 records that the teacher was asked about"):
        write(world, asked, **{"teacher.max_unparsed": 1.0})


def test_a_template_is_filled_with_the_questions_own_numbers_and_parsed_by_the_task(
    world, asked, monkeypatch, tmp_path
):
    record = map_numbers(Record("a", "svamp", "He had 8 , gave 3 .", "( 8 - 3 )", "", "( 8 - 3 )"))
    prompt = prompts_of(record, "Q: {question}\nA:")
    assert prompt == {"answer": "Q: He had 8 , gave 3 .\nA:"}
    answer = {"answer": "8 less 3 is 5. The answer is (8 - 3).\n\nQ: next"}
    assert parse(answer, record) == ("n0 less n1 is 5.", "(n0 - n1)")
    assert parse({"answer": "8 less 3"}, record) is None

    seen = []

    def decode(model, tokenizer, questions, **kwargs):
        seen.append((kwargs["as_written"], kwargs["max_new_tokens"]))
        return [Answer(f"{q} is 1. The answer is yes.", 1.0, 1.0) for q in questions]

    monkeypatch.setattr(decoding, "decode", decode)
    lines(tmp_path / "data.jsonl", [{"question": f"q{i}", "label": "yes"} for i in range(30)])
    (tmp_path / "prompt.txt").write_text("Why {question}?")
    mine = asked | {"data.task": "jsonl", "data.path": str(tmp_path / "data.jsonl"), "data.subsample": 3}
    found = write(world, mine, **{"teacher.template": str(tmp_path / "prompt.txt")}).records
    assert {r.rationale for r in found} == {f"Why {r.question}? is 1." for r in found}
    assert set(seen) == {(True, 96)}
    (tmp_path / "latin.txt").write_bytes(b"Why {question}? \xe9")
    for template, message in (
        ("what?", "neither a text with {question} nor a file"),
        ("\x1b[31m" + "x" * 100_000, r"teacher.template is '\\x1b.{20,80}: neither a text with"),
        (str(tmp_path / "latin.txt"), "which cannot be read: 'utf-8' codec can't decode"),
        ("{question} {question}", "has {question} 2 times; put it once"),
    ):
        with pytest.raises(ValueError, match=message):
            write(world, mine, **{"teacher.template": template})
    with pytest.raises(ValueError, match="task demo has no parser for such answers"):
        write(world, asked, **{"teacher.template": "{question}"})


@pytest.mark.parametrize(
    ("task", "question", "label", "good"),
    [
        ("cqa", "Where?\nAnswer Choices:\n(a) bank\n(b) river", "Bank.", True),
        ("cqa", "Where?\nAnswer Choices:\n(a) bank\n(b) river", "sea", False),
        ("esnli", "p</s>h", "Neutral", True),
        ("esnli", "p</s>h", "maybe", False),
        ("svamp", "He had 8 .", "8 - 3", True),
        ("svamp", "He had 8 .", "8 -", False),
        ("jsonl", "He had 8 .", "eight", True),
        ("jsonl", "He had 8 .", " ", False),
    ],
)
def test_a_label_must_be_one_that_could_answer_the_question(task, question, label, good):
    record = Record("a", task, question, "other", "", "other")
    parts = parse({"predict": label, "explain": "because"}, record)
    assert parts == (("because", label) if good else None)
    assert parse({"predict": label, "explain": ""}, record) is None


def test_text_of_any_task_is_parsed():
    assert parse_text("It rains. The answer is an umbrella.\nQ: so?") == ("It rains.", "an umbrella")
    assert parse_text("It rains. Answer: wet") == ("It rains.", "wet")
    assert parse_text("The answer is wet.") is None and parse_text("It rains.") is None


def test_draws_follow_the_tempered_probabilities_and_nothing_else():
    """Each row's own number chooses its token; shares equal softmax(scores / T), to 3 standard errors."""
    scores = torch.tensor([1.0, -0.5, 0.0, -torch.inf])
    n, temperature = 20_000, 0.7
    draws = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    draw = decoding._Draw(temperature, draws)
    chosen = draw(None, scores.expand(n, 4)).argmax(-1)
    expected = torch.softmax(scores / temperature, -1)
    shares = torch.bincount(chosen, minlength=4) / n
    assert (shares - expected).abs().le(3 * (expected * (1 - expected) / n).sqrt()).all(), shares
    one = decoding._Draw(temperature, draws[5:6])(None, scores[None]).argmax(-1)
    assert one == chosen[5]


def test_a_sampled_text_does_not_depend_on_its_batch(expert):
    from ibdistill.data import tokenizers
    from ibdistill.models import families

    tokenizer = tokenizers.load_tokenizer(str(expert), "teacher.model")
    model = families.load_model(str(expert), tokenizer, setting="teacher.model").eval()
    questions = ["predict: " + record.question for record in demo_records(N)]
    draws = torch.rand(N, 12, generator=torch.Generator().manual_seed(1))
    limits = {"max_question_tokens": 200, "max_new_tokens": 12, "device": torch.device("cpu")}
    found = decoding.decode(model, tokenizer, questions, sampling=Sampling(3.0, draws), **limits)
    alone = [
        decoding.decode(model, tokenizer, [q], sampling=Sampling(3.0, draws[i : i + 1]), **limits)[0]
        for i, q in enumerate(questions)
    ]
    assert [a.text for a in found] == [a.text for a in alone]
    assert [a.text for a in found] != [a.text for a in decoding.decode(model, tokenizer, questions, **limits)]


def test_a_job_trains_on_what_the_teacher_wrote(world, asked):
    """The student has another tokenizer than the teacher: only text passes between them."""
    job = prepare(
        load_settings(None, asked | {"student.tokenizer": "train", "student.vocab_size": 200}), world
    )
    assert job.teacher_answers is None and len(job.features) == 9
    assert job.records.report["demo/train/teacher_parsed"] == 9
    row = job.tokenizer.decode(job.features.targets["explain"][0], skip_special_tokens=True)
    assert row == taught(demo_records(N))[0].rationale
    job.board.close()
    job.engine.destroy()


def test_taught_questions_join_the_labelled_records_with_the_teachers_answers(world, asked, monkeypatch):
    """The answers may be right or wrong. The labelled records keep theirs; what has no answer is left out."""
    names = [f"demo/unlabelled/{i}" for i in range(N)]
    questions = [
        replace(r, id=name, label="", rationale="") for name, r in zip(names, demo_records(N), strict=True)
    ]
    monkeypatch.setattr(demo, "unlabelled", lambda n: questions[:n])
    settings = asked | {"data.subsample": 4, "data.taught": N, "data.label_source": "teacher"}
    job = prepare(load_settings(None, settings | {"teacher.rationales": "missing"}), world)
    said = [replace(r, id=name) for name, r in zip(names, taught(demo_records(N)), strict=True)]
    assert list(job.records.train) == demo_records(4) + said[:2] + said[3:] and len(job.features) == 13
    job.board.close()
    job.engine.destroy()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data.taught": 5},
            "data.taught is 5: questions whose labels the teacher has to write; set teacher",
        ),
        (
            {"data.taught": "x.jsonl", "data.label_source": "teacher"},
            "data.taught is 'x.jsonl'; for task 'demo' it is a number of questions to generate",
        ),
        ({"teacher.placement": "none"}, "teacher.rationales all needs an online teacher"),
        ({"teacher.placement": "cache", "teacher.rationale_cache": ""}, "folder in teacher.rationale_cache"),
        (
            {"teacher.rationales": "none", "data.label_source": "teacher", "objective.method": "kd"},
            "data.label_source is 'teacher'; set teacher.rationales",
        ),
        ({"teacher.max_unparsed": 1.5}, "teacher.max_unparsed is 1.5; it must be in \\[0, 1\\]"),
        ({"teacher.model": "/no/such"}, "teacher.model is '/no/such': no model .* there is no such folder"),
        (
            {"teacher.model": "t5-mini"},
            "the preset .t5-mini., which has no text to write: its weights are random",
        ),
    ],
)
def test_contradictions_are_named(world, asked, settings, message):
    with pytest.raises(ValueError, match=message):
        write(world, asked, **settings)


def test_a_signal_ends_the_writing_between_two_batches(world, asked, tmp_path):
    loaded = load_settings(None, asked)
    stop = StopRequest()
    stop.exit_code = lambda: 85
    with pytest.raises(SystemExit) as caught:
        writing.write(loaded, loading.load(loaded.data, needs_rationale=False).train, world, stop)
    assert caught.value.code == 85 and len(texts(tmp_path / "texts")) == 2
    assert len(write(world, asked).records) == 9


def test_jobs_share_the_records(world, asked, tmp_path):
    loaded = load_settings(None, asked)
    records = loading.load(loaded.data, needs_rationale=False).train
    sizes = []
    for part in range(3):
        writing.write(loaded, records, world, StopRequest(), part=(part, 3))
        sizes.append(len(texts(tmp_path / "texts")) - sum(sizes))
    assert sum(sizes) == N and max(sizes) < N
    seen = Counter(
        json.loads(line)["key"]
        for f in (tmp_path / "texts").glob("*.jsonl")
        for line in f.read_text().splitlines()
    )
    assert set(seen.values()) == {1}
    assert len(write(world, asked, **{"teacher.placement": "cache"}).records) == 9


def test_a_killed_writer_goes_on_where_it_stopped(world, asked, tmp_path):
    n = 16
    settings = asked | {"data.subsample": n, "teacher.write_batch_size": 1, "teacher.max_unparsed": 1.0}
    folder = tmp_path / "texts"
    process = start([WRITE, *as_arguments(settings)], ranks=1, log=tmp_path / "log")
    deadline = time.monotonic() + 300
    while not (folder.is_dir() and len(texts(folder)) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.02)
    kill_session(process)
    there = texts(folder)
    assert 3 <= len(there) < n
    questions = []
    decode = decoding.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "decode", lambda *a, **k: (questions.extend(a[2]), decode(*a, **k))[1])
        resumed = write(world, settings)
    assert len(questions) == 2 * (n - len(there))
    undisturbed = write(world, settings, **{"teacher.rationale_cache": str(tmp_path / "other")})
    assert resumed.records == undisturbed.records
    assert texts(folder) == texts(tmp_path / "other")


@pytest.fixture(scope="module")
def two_ranks(expert, tmp_path_factory) -> Path:
    """Text and steps of two ranks with a sharded teacher (see workers/writers.py)."""
    folder = tmp_path_factory.mktemp("writers")
    arguments = [str(ROOT / "tests/workers/writers.py"), str(folder), str(expert)]
    assert launch(arguments, log=folder / "log") == 0, (folder / "log").read_text()[-4000:]
    return folder


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_two_ranks_with_a_sharded_teacher_write_what_one_process_writes(world, asked, two_ranks, temperature):
    """5 records in batches of 2: the last round has one for rank 0 and none for rank 1."""
    from workers.writers import SAMPLED, SETTINGS

    folder = asked["run.dir"] + "/one"
    mine = asked | SETTINGS | (SAMPLED if temperature else {})
    write(world, mine, **{"teacher.rationale_cache": folder})
    ours = texts(folder)
    assert texts(two_ranks / f"texts-{temperature}") == ours and len(ours) == 5
    written = [
        len(f.read_text().splitlines()) for f in sorted((two_ranks / f"texts-{temperature}").glob("*.jsonl"))
    ]
    assert written == [3, 2]
    lengths = {len(t["explain"].split()) for t in ours.values()}
    assert len(lengths) > 1  # they end at different times


def test_scoring_works_after_writing(two_ranks):
    """One loaded teacher writes, then scores: its answers are those of a teacher that never wrote, and the
    prefetch trace completes again."""
    for rank in torch.load(two_ranks / "facts.pt"):
        assert rank["complete"] and rank["unchanged"] and rank["same_teacher"]
        assert rank["error"] == 0.0, rank
        assert not rank["linear_replaced"]
