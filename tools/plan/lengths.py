"""How long the questions, labels and rationales of a plan are, and how that is known.

The planner gives every question of a batch one length. Where the data is given, that is the length of the
longest training record: the longest of a batch sets the width to which all are padded, and a run must survive
its widest batch. So the predicted seconds are those of the slowest step; the mean length is shown beside it.
Without data the limits of the settings count, which are longer than most data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ibdistill.config.methods import METHODS
from ibdistill.config.sections import Config
from ibdistill.data import loading, stored_records, tokenizers
from ibdistill.data.arrow_tables import blocks
from ibdistill.data.records import Record
from ibdistill.objectives import weights
from plan.stored import Stored

TOKENS_PER_WORD = 1.5
"""Assumed where no tokenizer is at hand. English prose takes 1.3 to 1.4, text with many numbers more."""
NAMES = ("question", "label", "rationale")


@dataclass(frozen=True)
class MeasuredLengths:
    """The tokens of every question and target of a plan, end tokens included."""

    question: int
    label: int
    rationale: int
    source: str
    """Where the numbers are from, for the reader."""
    stored: Stored | None = None
    """The tables of the data; None where the number of records is unknown."""


def settle(config: Config, given: dict[str, Any]) -> MeasuredLengths:
    """The lengths of a plan: those `given` by `--tokens.NAME`, else the data's, else the limits of `config`.
    `--tokens.records` says how many training records there are, where the data is not read.

    Raises ValueError for an unknown name or a length below 1, and as reading the data does.
    """
    for name, value in given.items():
        if name not in (*NAMES, "records"):
            raise ValueError(f"unknown length tokens.{name}; there are {', '.join(NAMES)}, and records")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"tokens.{name} is {value!r}; it must be a whole number of at least 1")
    given = dict(given)
    records = given.pop("records", 0)
    found = {name: getattr(config.data, f"max_{name}_tokens") for name in NAMES}
    source = "the limits data.max_*_tokens; give data.path and they are measured"
    streams = weights.tokenized_streams(config.objective)
    stored = Stored.of(records, streams, found | given) if records else None
    if config.data.path and given.keys() != set(NAMES):
        found, source, stored = measure(config)
    if given:
        source = f"{', '.join(given)} as given" + ("" if given.keys() == set(NAMES) else f"; else {source}")
    return MeasuredLengths(**(found | given), source=source, stored=stored)


def measure(config: Config) -> tuple[dict[str, int], str, Stored]:
    """The longest question, label and rationale of the training records, how they were counted, and the
    tables of all records."""
    data, streams = config.data, weights.tokenized_streams(config.objective)
    loaded = loading.streamed(data, needs_rationale=METHODS[config.objective.method].explains)
    records, tokenizer, tokens = loaded.train, _at_hand(config), {name: [] for name in NAMES}
    for block in blocks(records):
        texts = [[_asked(record, streams) for record in block]]
        texts += [[record.label for record in block], [record.rationale for record in block]]
        for name, own in zip(NAMES, texts, strict=True):
            limit = getattr(data, f"max_{name}_tokens")
            tokens[name] += [min(count, limit) for count in _count(own, tokenizer)]
    found = {name: max(counts) for name, counts in tokens.items()}
    average = {name: mean(counts) for name, counts in tokens.items()}
    means = [f"{count:.0f}" for count in average.values()]
    parts = records, *loaded.valid.values(), *loaded.test.values()
    size = sum(len(stored_records.encoded(record)) + 8 for part in parts for record in part)
    how = (
        "tokens of the student's tokenizer"
        if tokenizer
        else f"words x {TOKENS_PER_WORD:g}, no tokenizer at hand"
    )
    source = f"the longest of {len(records)} records of data.path (mean {' / '.join(means)}), {how}"
    return found, source, Stored.of(len(records), streams, average, size)


def _asked(record: Record, streams: Sequence[str]) -> str:
    """The question with the longest of its prefixes."""
    prefixes = loading.TASKS[record.task].prefixes
    return max((prefixes[stream] for stream in streams), key=len) + record.question


def _count(texts: list[str], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens of each text, end token included."""
    if tokenizer is None:
        return [round(TOKENS_PER_WORD * len(text.split())) + 1 for text in texts]
    return [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _at_hand(config: Config) -> PreTrainedTokenizerBase | None:
    """The student's tokenizer if it is on this machine; planning never asks the network for one."""
    name = config.student.tokenizer or config.student.model
    if not config.student.tokenizer and name.startswith("demo-"):
        return tokenizers.demo_tokenizer()
    try:
        if Path(name).is_dir():
            return tokenizers.load_tokenizer(name, "student.tokenizer")
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
