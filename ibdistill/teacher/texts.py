"""What the teacher is asked and what it wrote: prompts, parsing, and the texts on disk.

    FOLDER/fingerprint.json      what wrote the texts, and how
           rank-R-RANDOM.jsonl   one record a line: the texts as they came, and what was read from them
           summary.json          the counts of the last complete pass
           warned.json           damaged lines that a reader has warned of

A line is a record, under a key made of its prompts, and every process appends to a file of its
own: a crash costs the batch under way, and neither ranks nor the elements of a job array need
locks.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ibdistill.config.fields import shown
from ibdistill.config.sections import Config
from ibdistill.data import token_ids
from ibdistill.data.records import STREAMS, Record, map_numbers
from ibdistill.data.tasks.registry import TASKS
from ibdistill.runtime.files import digest, refuse_special, write_json
from ibdistill.teacher.cache import FINGERPRINT, differences

logger = logging.getLogger("ibdistill")

FORMAT = "ibdistill-rationales-1"
WARNED = "warned.json"
QUESTION = "{question}"
Texts = dict[str, str]
"""What the teacher wrote about a record: `predict` and `explain`, or, to a template, `answer`."""


def read_template(config: Config) -> str:
    """The text of `teacher.template`; empty: there is none. Raises ValueError if it cannot be used."""
    given = config.teacher.template
    if not given:
        return ""
    text = given
    if QUESTION not in given:
        if not os.path.isfile(given):  # also of a text that is too long for a name
            raise ValueError(f"teacher.template is {shown(given)}: neither a text with {QUESTION} nor a file")
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"teacher.template is {shown(given)}, which cannot be read: {error}") from error
    if text.count(QUESTION) != 1:
        raise ValueError(
            f"teacher.template {shown(given)} has {QUESTION} {text.count(QUESTION)} times; put it once"
        )
    names = [config.data.task] if isinstance(config.data.task, str) else config.data.task
    if without := [name for name in names if TASKS[name].parse_llm is None]:
        raise ValueError(
            f"teacher.template: task {', '.join(without)} has no parser for such answers; leave it empty"
        )
    return text


def prompts_of(record: Record, template: str) -> Texts:
    """What the teacher is asked; with a template, about the question's own numbers (`map_numbers`)."""
    if template:
        return {"answer": template.replace(QUESTION, _unmapped(record).question)}
    return {stream: TASKS[record.task].prefixes[stream] + record.question for stream in STREAMS}


def template_prompt(
    record: Record, template: str, tokenizer: PreTrainedTokenizerBase, max_question_tokens: int
) -> str:
    """The prompt of `prompts_of` as the teacher's tokenizer gets it.

    Special tokens of the template are obeyed, and what the question spells is text. A question that is too
    long is cut, so that the template stays whole.
    """
    question = _unmapped(record).question
    return template.replace(QUESTION, token_ids.in_template(question, tokenizer, max_question_tokens))


def key_of(prompts: Texts) -> str:
    """Names a record's texts: 32 hexadecimal digits."""
    return digest(json.dumps(prompts, sort_keys=True).encode(), 16).hex()


def parse(texts: Texts, record: Record) -> tuple[str, str] | None:
    """(rationale, label) from what the teacher wrote; None: it has no rationale, or no label that could
    answer the question (an equation with a value, an option, a relation)."""
    task = TASKS[record.task]
    if "answer" not in texts:
        parts = texts["explain"].strip(), texts["predict"].strip()
    elif parts := task.parse_llm(texts["answer"]):
        parts = parts[0], parts[1]
        if record.quantities:
            mapped = map_numbers(replace(_unmapped(record), rationale=parts[0], label=parts[1]))
            parts = mapped.rationale, mapped.label
    if not parts or not all(parts):
        return None
    # A free label needs to equal itself, which an equation without a value does not.
    choices = task.choices(record) if task.choices else [parts[1]]
    could_be = any(task.is_correct(parts[1], replace(record, gold=choice)) for choice in choices)
    return parts if could_be else None


def read_texts(folder: Path) -> dict[str, Texts]:
    """All that is in a cache, by key.

    A line that a crash cut off, or that is damaged otherwise, is left out, so that its record is asked about
    again. The first reader names it in a warning and notes that in the folder, because the line stays there
    for all readers after it. Raises ValueError if a file cannot be read.
    """
    found: dict[str, Texts] = {}
    damaged: dict[str, str] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"teacher.rationale_cache {folder}: {path} cannot be read: {error}") from error
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line:
                continue
            try:
                key, texts = _checked(json.loads(line))
            except (ValueError, RecursionError) as error:
                damaged[f"{path.name}:{number}"] = str(error)[:200]
            else:
                found.setdefault(key, texts)
    _warn_once(folder, damaged)
    return found


def _warn_once(folder: Path, damaged: dict[str, str]) -> None:
    """Warn of the damaged lines, FILE:LINE -> what is wrong with it, that no reader has warned of before."""
    if not damaged:
        return
    path = folder / WARNED
    try:
        known = json.loads(path.read_bytes())
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError, RecursionError):
        known = {}
    new = {place: problem for place, problem in damaged.items() if known.get(place) != problem}
    for place, problem in new.items():
        logger.warning("%s/%s is ignored, and its record is asked about again: %s", folder, place, problem)
    if new:
        with suppress(OSError):  # the folder may be for reading only, and then each reader warns
            write_json(path, known | new)


def _checked(row: Any) -> tuple[str, Texts]:
    """Key and texts of a parsed line. Raises ValueError if it does not hold what `append` writes."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise ValueError("the line is no object with a key")
    texts = row.get("texts")
    if not isinstance(texts, dict) or texts.keys() not in ({"answer"}, set(STREAMS)):
        raise ValueError(f"its texts are neither those of {', '.join(STREAMS)} nor an answer")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"the text of {name} is {text!r}")
        text.encode()  # half of a surrogate pair would stop the run where it is written out
    return row["key"], texts


def open_cache(folder: Path, here: dict[str, Any]) -> None:
    """Make the cache, or check that it is of the same kind."""
    path = folder / FINGERPRINT
    refuse_special(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, here)
        there = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"teacher.rationale_cache {folder} cannot be written: {error}") from error
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict):
        raise ValueError(f"{path} is damaged; delete {folder} or choose another folder")
    if found := differences(there, here):
        raise ValueError(
            f"teacher.rationale_cache {folder} was written by something else: {found}. "
            "Choose another folder, or delete that one to have it written again"
        )


def append(path: Path, written: Sequence[tuple[Record, str, Texts]]) -> None:
    """Add (record, key, texts) to a process's own file, and see them on disk. Raises OSError."""
    lines = []
    for record, key, texts in written:
        rationale, label = parse(texts, record) or (None, None)
        read = {"rationale": rationale, "label": label}
        row = {"key": key, "id": record.id, "question": record.question, **read, "texts": texts}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def _unmapped(record: Record) -> Record:
    """The record with its own numbers again in question and gold label."""

    def fill(text: str) -> str:
        return re.sub(r"\bn(\d+)\b", lambda m: dict(enumerate(record.quantities)).get(int(m[1]), m[0]), text)

    return replace(record, question=fill(record.question), gold=fill(record.gold), quantities=())
