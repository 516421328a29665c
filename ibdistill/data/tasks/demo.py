"""The embedded demo corpus: word problems whose difficulty is a lexicon, made by a seeded generator.

    question   tom filled n0 shelves with n1 coins . bred n2 times . is n3 inches tall . how many coins now ?
    label      ( n0 * n1 ) * n2
    rationale  start n0 * n1 . bred means * n2 . tall means ignore n3 .
    quantities ("4", "2", "6", "10")

`demo_problems` makes the problems, `demo_words` has the words.

From random weights, 300 labels give about 33 % with `finetune` and `dss` alike (one run each), so
there is a stand-in for T5's pretraining, the task `demo_pretrain`. 70 % are problems
of the same structure in explicit words (`plus`, `unrelated`, ...; both streams, since a decoder that
never wrote a rationale is worse off with `dss` than with `finetune`). 30 % are unlabelled questions
of the target lexicon with words cut out: the label fills them in, T5's span corruption, and the
rationale lists each quantity with the word before it. (Three pretraining seeds each: 69 % for `dss`
afterwards, 62 % with the whole question as the rationale, but a seed moves either by 7 points.)
Nothing in it explains a target verb.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from random import Random

from ibdistill.config.sections import DataConfig
from ibdistill.data.answer_rules import same_text, same_value
from ibdistill.data.records import Record
from ibdistill.data.tasks import demo_words
from ibdistill.data.tasks.base import Example, Task
from ibdistill.data.tasks.demo_problems import between, generate, wrapped
from ibdistill.data.tasks.demo_words import LINKS, NAMES, OBJECTS

OPERATORS = "+-*/"
MAX_QUANTITIES = 8
MAX_SENTINELS = 4
PREFIXES = ("predict:", "explain:", "solve:", "steps:")
_SIZES = {"test": (2000, 777001), "valid": (1000, 4242), "train": (16000, 11)}
"""Split -> number of problems, seed; in the order in which they are made."""
_UNLABELLED = (20000, 21)
_AUXILIARY = (10000, 22)
_RESTORED = 4286  # with all of the auxiliary problems: 30 %
_RESTORE_SEED = 23


def read_demo(task: str, data: DataConfig, *, needs_rationale: bool) -> dict[str, list[Example]]:
    """The generated records, whose numbers are mapped already."""
    return {
        split: [Example(record, record.id) for record in records]
        for split, records in load_demo(task, data.demo_test_seed).items()
    }


def load_demo(task: str, test_seed: int = _SIZES["test"][1]) -> dict[str, list[Record]]:
    """The records of `demo` (train, valid, test) or `demo_pretrain` (train), made on first use.

    The splits share no question, with each other or with the unlabelled text. `test_seed` gives
    other test problems, with everything else as it is.
    Raises ValueError for another task.
    """
    if task == "demo":
        splits = {split: list(_corpus()[split]) for split in ("train", "valid", "test")}
        size, seed = _SIZES["test"]
        if test_seed != seed:
            ban = _questions(*_corpus().values(), _unlabelled())
            splits["test"] = generate(size, test_seed, demo_words.TARGET, "demo/test", ban)
        return splits
    if task == "demo_pretrain":
        return {"train": list(_pretraining())}
    raise ValueError(f"task {task!r} is not a demo task; choose from demo, demo_pretrain")


def unlabelled(n: int) -> list[Record]:
    """The first `n` questions outside all splits, without label and rationale.

    `gold` is there to measure how good pseudo-labels are; training on it would defeat them.

    Raises:
        ValueError: more than there are.
    """
    if not 0 <= n <= _UNLABELLED[0]:
        raise ValueError(f"the demo corpus has 0 to {_UNLABELLED[0]} unlabelled questions, not {n}")
    return [replace(record, label="", rationale="") for record in _unlabelled()[:n]]


def vocabulary() -> list[str]:
    """Every word that a demo text may contain, stream prefixes and sentinels included, sorted."""
    texts = [*NAMES, *OBJECTS, *LINKS, *demo_words.GROUPS, *demo_words.CLAUSE_WORDS]
    texts += [*demo_words.ASK_ONE, *demo_words.ASK_TOTAL, *demo_words.ASK_DIFFERENCE]
    for words in (demo_words.TARGET, demo_words.AUXILIARY):
        texts += [*words.starts, *words.plus, *words.minus, *words.others]
        texts += [text for group in (words.times, words.divided, words.irrelevant) for text, _ in group]
    spoken = {word for text in texts for word in text.split() if not word.startswith("{")}
    slots = {f"n{i}" for i in range(MAX_QUANTITIES)}
    sentinels = {f"<extra_id_{i}>" for i in range(MAX_SENTINELS)}
    return sorted(spoken | slots | sentinels | set(PREFIXES) | set(OPERATORS) | {"(", ")", ".", "?"})


def implied_label(rationale: str) -> str | None:
    """The equation that a demo rationale spells out; None where it spells out none. Never raises.

    `start n0 . bred means * n1 . tall means ignore n2 .` implies `n0 * n1`.
    """
    expressions: list[str] = []
    joined: list[str] = []
    for clause in rationale.strip().removesuffix(".").split(" . "):
        match clause.split():
            case ["start", a] if _operand(a):
                expressions.append(a)
            case ["start", a, "*", b] if _operand(a) and _operand(b):
                expressions.append(f"{a} * {b}")
            case ["together", "means", "+"] | ["more", "than", "means", "-"] as words:
                joined.append(words[-1])
            case [_, "means", "ignore", _]:
                pass
            case [_, "means", "+" | "-" | "*" | "/" as operator, a] if _operand(a) and expressions:
                expressions[-1] = f"{wrapped(expressions[-1])} {operator} {a}"
            case _:
                return None
    if len(expressions) == 2 and len(joined) == 1:
        return f"{wrapped(expressions[0])} {joined[0]} {wrapped(expressions[1])}"
    return expressions[0] if len(expressions) == 1 and not joined else None


@cache
def _corpus() -> dict[str, tuple[Record, ...]]:
    """The splits, each kept free of the questions of those before it."""
    corpus: dict[str, tuple[Record, ...]] = {}
    for split, (size, seed) in _SIZES.items():
        ban = _questions(*corpus.values())
        corpus[split] = tuple(generate(size, seed, demo_words.TARGET, f"demo/{split}", ban))
    return corpus


@cache
def _unlabelled() -> tuple[Record, ...]:
    """Problems outside all splits. Most runs need none, and making them takes as long as the splits."""
    size, seed = _UNLABELLED
    return tuple(generate(size, seed, demo_words.TARGET, "demo/unlabelled", _questions(*_corpus().values())))


def _questions(*parts: Sequence[Record]) -> set[str]:
    return {record.question for part in parts for record in part}


@cache
def _pretraining() -> tuple[Record, ...]:
    """All auxiliary problems, then questions to restore."""
    size, seed = _AUXILIARY
    rng = Random(_RESTORE_SEED)
    records = generate(size, seed, demo_words.AUXILIARY, "demo_pretrain/train")
    for i, record in enumerate(_unlabelled()[:_RESTORED]):
        words = record.question.split()
        damaged, spans = _cut_spans(words, rng)
        quantities = " . ".join(f"{words[j - 1]} {w}" for j, w in enumerate(words) if _operand(w)) + " ."
        records.append(
            Record(f"demo_pretrain/restore/{i}", "demo_pretrain", damaged, spans, quantities, gold=spans)
        )
    return tuple(records)


def _cut_spans(words: list[str], rng: Random) -> tuple[str, str]:
    """T5's span corruption of about 15 % of the words, in spans of one to three.

    Returns the text with sentinels in the place of the spans, and the spans behind their
    sentinels. The end-of-sequence token takes the place of T5's closing sentinel.
    """
    spans = min(MAX_SENTINELS, max(1, round(len(words) * 0.075)))
    starts = {int(rng.random() * (len(words) - 3)) for _ in range(spans)}
    text: list[str] = []
    cut: list[str] = []
    end = sentinel = 0
    for start in sorted(starts):
        if start < end:
            continue
        text += [*words[end:start], f"<extra_id_{sentinel}>"]
        end = start + between(rng, 1, 3)
        cut += [f"<extra_id_{sentinel}>", *words[start:end]]
        sentinel += 1
    return " ".join(text + words[end:]), " ".join(cut)


def _operand(word: str) -> bool:
    return re.fullmatch(r"n?\d+", word) is not None


def spelled_equation(rationale: str, record: Record) -> list[str]:
    """The equation that the rationale spells out, if it does."""
    label = implied_label(rationale)
    return [] if label is None else [label]


def same_value_or_text(prediction: str, record: Record) -> bool:
    """The rule of `demo_pretrain`, some of whose labels are restored words: one text, or else one value."""
    return same_text(prediction, record) or same_value(prediction, record)


DEMO = Task(
    name="demo",
    read=read_demo,
    is_correct=same_value,
    implied=spelled_equation,
    prefixes={"reason": "explain: predict: "},
    answer_marker="predict:",  # these are the words that the demo's tokenizer knows
    arithmetic=True,
    generated=True,
)
DEMO_PRETRAIN = Task(
    name="demo_pretrain",
    read=read_demo,
    is_correct=same_value_or_text,
    implied=spelled_equation,
    prefixes={"predict": "solve: ", "explain": "steps: ", "reason": "steps: solve: "},
    answer_marker="solve:",
    arithmetic=True,
    generated=True,
)
