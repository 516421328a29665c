"""`ask.py` as a command: an argument, the standard input, a file, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, alone
from tiny_models import byte_tokenizer, tiny

from ibdistill import ask
from ibdistill.config.sections import Config, DataConfig
from ibdistill.models import export
from ibdistill.models.prompt import FILE

SCRIPT = ROOT / "ibdistill/ask.py"
QUESTIONS = ["how many ?", "and now"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run with an exported student of random weights."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    limits = {"max_question_tokens": 64, "max_label_tokens": 4, "max_rationale_tokens": 6}
    config = Config(data=DataConfig(task="svamp", **limits))
    export.write(tiny("llama"), tokenizer, folder / "student", config)
    (folder / "config.yaml").write_text("data: {task: svamp}\n")
    return folder


def says(monkeypatch, capsys, *arguments, typed: str = "", expect: int = 0) -> str:
    """What the command prints, the error after the output."""
    monkeypatch.setattr(sys, "argv", ["ask.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert ask.main() == expect
    printed = capsys.readouterr()
    return printed.out + printed.err * (expect == 2)


def test_all_ways_of_asking_give_the_same_answers(run_folder, tmp_path, monkeypatch, capsys):
    by_argument = [says(monkeypatch, capsys, run_folder, text) for text in QUESTIONS]
    assert all(text.startswith("rationale: ") and "\nlabel: " in text for text in by_argument)
    assert by_argument[0] == says(monkeypatch, capsys, run_folder / "student", QUESTIONS[0])
    typed = f"{QUESTIONS[0]}\n\n   \n{QUESTIONS[1]}"  # without a line break at the end
    assert says(monkeypatch, capsys, run_folder, typed=typed) == "".join(f"{a}\n" for a in by_argument)
    rows = [{"id": 5, "text": QUESTIONS[0], "label": "x"}, {"text": QUESTIONS[1]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--ask.questions", tmp_path / "q.jsonl", "--ask.question_field", "text", "--ask.device", "cpu"]
    printed = says(monkeypatch, capsys, run_folder, *given)
    written = tmp_path / "new/a.jsonl"
    assert "2 answers" in says(monkeypatch, capsys, run_folder, *given, "--ask.out", written)
    assert written.read_text() == printed
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [(a.get("id"), a["question"]) for a in answers] == [(5, QUESTIONS[0]), (None, QUESTIONS[1])]
    assert [ask.as_text(a) + "\n" for a in answers] == by_argument
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(run_folder)],
        input=QUESTIONS[0].encode() + b"\n\xff\n",
        capture_output=True,
        env=alone(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith(by_argument[0]) and done.stdout.count(b"label: ") == 2


def test_a_reasoning_is_printed_with_its_answer():
    said = {"label": "7", "rationale": "so", "reasoned": {"label": None, "rationale": "hm"}}
    assert ask.as_text(said).split("\n") == [
        *("rationale: so", "label: 7", "reasoned:"),
        *("  rationale: hm", "  label: (the reasoning has no answer)"),
    ]


def test_what_the_student_does_not_read_of_a_question_is_said(run_folder, monkeypatch, capsys, caplog):
    long, fits = "how many " * 40, "how many " * 3
    says(monkeypatch, capsys, run_folder, fits)
    assert not caplog.messages
    says(monkeypatch, capsys, run_folder, typed=f"{fits}\n{long}\n")
    assert [message for message in caplog.messages if message.startswith("asked")] == [
        f"asked: 1 of 1 {stream} questions are longer than 64 tokens and were cut"
        for stream in ("predict", "explain")
    ]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_conversation_ends_cleanly(run_folder, monkeypatch, capsys, end):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def typed(prompt):
        assert prompt == "question: "
        raise end

    monkeypatch.setattr(sys, "argv", ["ask.py", str(run_folder)])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    assert ask.main() == 0
    assert capsys.readouterr().out == "\n"


def test_an_output_that_takes_nothing_is_no_traceback(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ask.py", str(run_folder), "how many ?"])
    read, write = os.pipe()
    os.close(read)
    for place, code in (("/dev/full", 2), (write, 0)):
        with open(place, "w") as output:
            monkeypatch.setattr(sys, "stdout", output)
            assert ask.main() == code
    monkeypatch.setattr(sys, "stdout", None)
    assert ask.main() == 0
    assert capsys.readouterr().err == "error: the answers cannot be written: No space left on device\n"


def test_an_answer_is_no_command_to_the_terminal(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(ask.asking, "ask", lambda *_: [{"rationale": "\x1b[2J", "label": "\u00e9\r7"}])
    assert says(monkeypatch, capsys, run_folder, "why") == "rationale: \\x1b[2J\nlabel: \u00e9\\r7\n"


def test_what_it_refuses(run_folder, tmp_path, monkeypatch, capsys):
    def refuses(message, *arguments):
        assert message in says(monkeypatch, capsys, *arguments, expect=2)

    refuses("give a STUDENT: a run folder, or the folder of an exported student")
    refuses("unexpected arguments ('c',)", "a", "b", "c")
    refuses("'demo-student' is a preset", "demo-student", "why")
    refuses(f"has no {FILE}", tmp_path, "why")
    refuses("none', a folder that does not exist", tmp_path / "none", "why")
    refuses(r"'a\udcff' is no text in UTF-8", run_folder, "a\udcff")
    refuses("the question is empty", run_folder, "  ")
    refuses("ask.out is 'a', which holds the answers to ask.questions", run_folder, "--ask.out", "a")
    refuses("there is no such file", run_folder, "--ask.questions", tmp_path / "none")
    refuses("ask.device", run_folder, "why", "--ask.device", "tpu")
    path = tmp_path / "q.jsonl"
    given = [run_folder, "--ask.questions", path]
    for content, message in {
        "": "is empty: there are no questions to answer",
        "[1]": "has no field 'question'",
        '{"text": "a"}': "the questions stand under ask.question_field",
        '{"question": " "}': "q.jsonl:1: the question is empty; leave the line out",
        '{"question": [1]}': "it must be text or a number",
    }.items():
        path.write_text(content)
        refuses(message, *given)
    path.write_text('{"question": "a"}')
    refuses("are both given; take one of them", run_folder, "why", *given[1:])
    refuses("which cannot be written: ", *given, "--ask.out", tmp_path / "q.jsonl/a")
    out_is_a_folder = ["no/student", *given[1:], "--ask.out", tmp_path]
    refuses(f"ask.out is '{tmp_path}', which is a folder; name a file in it", *out_is_a_folder)
    (tmp_path / "config.yaml").write_text("{}")
    refuses("is a run without a student", tmp_path, "why")
