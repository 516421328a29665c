"""Ask a trained student:

    python ibdistill/ask.py STUDENT "Ann has 12 pens and gives 5 away. How many are left?"
    python ibdistill/ask.py STUDENT                              # questions from the standard input, by line
    python ibdistill/ask.py STUDENT --ask.questions FILE.jsonl --ask.out ANSWERS.jsonl

STUDENT: a run folder, or the folder that `train.py` exported to it, anywhere. It is asked in the ids of its
training, which the folder keeps in `prompt.json`, and says what it was taught: label, rationale, or its
reasoning with the answer. Exit codes: 0 done, also at the end of the input and after Ctrl-C; 2 bad input.
"""

from __future__ import annotations

from ibdistill.config import fields
from ibdistill.config.evaluation_sections import Asking
from ibdistill.runtime import startup

if __name__ == "__main__":
    startup.answer_help(lambda: f"{__doc__}{fields.describe(Asking)}")

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ibdistill.config import command_line
from ibdistill.config.evaluation_sections import AskConfig
from ibdistill.data.json_rows import field_text, read_rows, shown
from ibdistill.models import asking
from ibdistill.models.asking import Said, Student
from ibdistill.runtime import files
from ibdistill.training import run_folder

Answer = Callable[[], None]


def main() -> int:
    """Answer what the command line asks; the result is the exit code."""
    transformers_logging.disable_progress_bar()
    try:
        given = command_line.parse(sys.argv[1:], positions=2)
        answer = prepare(given.positions, fields.from_flat(Asking, given.settings).ask)
        answer()
        print(end="", flush=True)
    except BrokenPipeError:  # whoever reads the answers has seen enough
        _give_up_output()
    except OSError as error:
        _give_up_output()
        print(f"error: the answers cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(startup.for_terminal(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


def _give_up_output() -> None:
    """What still waits to be printed is lost, so that Python does not fail over it again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare(positions: list[str], config: AskConfig) -> Answer:
    """Load all that is needed; what is returned answers. Raises ValueError for what the user can mend."""
    if not positions:
        raise ValueError("give a STUDENT: a run folder, or the folder of an exported student")
    source, *questions = positions
    if questions and config.questions:
        raise ValueError(
            f"the question {fields.shown(questions[0])} and ask.questions are both given; take one of them"
        )
    if questions and not questions[0].strip():
        raise ValueError("the question is empty; give its text, or leave it out to be asked for it")
    if config.out and not config.questions:
        raise ValueError(
            f"ask.out is {fields.shown(config.out)}, which holds the answers to ask.questions; give both"
        )
    rows = read_questions(Path(config.questions), config.question_field) if config.questions else []
    if config.out:
        if Path(config.out).is_dir():
            raise ValueError(f"ask.out is {fields.shown(config.out)}, which is a folder; name a file in it")
        files.check_can_hold(Path(config.out).parent, "ask.out", config.out)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("ask.device is 'cuda', and torch finds no GPU here; take auto or cpu")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if config.device == "auto" else config.device)
    student = asking.load(Path(run_folder.student_folder(source)), device)
    if config.questions:
        return lambda: answer_file(student, rows, config)
    if questions:
        return lambda: print(as_text(asking.ask(student, questions)[0]))
    return lambda: converse(student)


def converse(student: Student) -> None:
    """Answer the lines of the standard input until it ends; blank ones are passed over."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    typed = sys.stdin.isatty()
    while True:
        try:
            question = input("question: " if typed else "")
        except EOFError:
            if typed:
                print()
            return
        if question.strip():
            print(as_text(asking.ask(student, [question])[0]), end="\n\n", flush=True)


def answer_file(student: Student, rows: list[dict[str, Any]], config: AskConfig) -> None:
    """Write one JSON object per question, to `ask.out` or the standard output."""
    said = asking.ask(student, [row["question"] for row in rows], config.batch_size)
    lines = [json.dumps(row | own, ensure_ascii=False) + "\n" for row, own in zip(rows, said, strict=True)]
    if not config.out:
        sys.stdout.write("".join(lines))
        return
    try:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(Path(config.out), "".join(lines))
    except OSError as error:
        raise ValueError(
            f"ask.out is {fields.shown(config.out)}, which cannot be written: {error.strerror}"
        ) from error
    print(f"{len(lines)} answers: {config.out}")


def read_questions(path: Path, field: str) -> list[dict[str, Any]]:
    """`question`, and `id` where a row has one, of each row. Raises ValueError with `FILE:LINE`."""
    if not path.is_file():
        raise ValueError(f"ask.questions is {fields.shown(str(path))}, and there is no such file")
    found = []
    for where, row in read_rows(path):
        if not isinstance(row, dict) or field not in row:
            raise ValueError(
                f"{where}: {shown(row)} has no field {field!r}; the questions stand under ask.question_field"
            )
        try:
            text = field_text(row, field)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not text.strip():
            raise ValueError(f"{where}: the question is empty; leave the line out")
        found.append({**({"id": row["id"]} if "id" in row else {}), "question": text})
    if not found:
        raise ValueError(f"{path} is empty: there are no questions to answer")
    return found


def as_text(said: Said) -> str:
    """An answer for a terminal: one line per part, and no control characters."""
    lines = []
    for name in ("rationale", "label", "reasoned"):
        if name == "reasoned" and name in said:
            lines += ["reasoned:", *(f"  {line}" for line in as_text(said[name]).split("\n"))]
        elif name in said:
            value = said[name]
            lines.append(f"{name}: {'(the reasoning has no answer)' if value is None else value}")
    return startup.for_terminal("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
