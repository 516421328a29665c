"""Word problems in a given lexicon, from a seeded generator: the demo corpus is made of them.

Two families. "chain" (78 %): a start, one to three events, up to two quantities to ignore.
"pair" (22 %): two people, one event, the question asks for the total or the difference.
Running values are integers in 1..300. Numbers come out mapped (`n<i>`, see `records.map_numbers`),
because a model this small would spend its capacity on spelling them.

Only `Random.random()` is drawn from: its sequence is promised never to change between Python
versions, that of `choice`, `sample` and `randint` is not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import TypeVar

from ibdistill.data.records import Record
from ibdistill.data.tasks import demo_words
from ibdistill.data.tasks.demo_words import LINKS, NAMES, OBJECTS, Lexicon

_MAX_VALUE = 300
_T = TypeVar("_T")

Clause = tuple[str, str]
"""A sentence of the question, and its clause of the rationale."""


def generate(n: int, seed: int, words: Lexicon, name: str, ban: Collection[str] = ()) -> list[Record]:
    """`n` different problems in the given lexicon, none of whose questions is in `ban`.

    `name` is `TASK/SPLIT`, the beginning of each record's id.
    """
    rng = Random(seed)
    task = name.partition("/")[0]
    seen = set(ban)
    records: list[Record] = []
    while len(records) < n:
        make = _pair if rng.random() < 0.2 else _chain_problem
        question, label, rationale = make(rng, words)
        quantities = [word for word in question.split() if word.isdigit()]
        # Numbers are mapped by value, so a problem must not use one twice.
        if len(set(quantities)) < len(quantities):
            continue
        slots = {quantity: f"n{i}" for i, quantity in enumerate(quantities)}
        question, label, rationale = (
            " ".join([slots.get(word, word) for word in text.split()])
            for text in (question, label, rationale)
        )
        if question in seen:
            continue
        seen.add(question)
        slotted = Record(f"{name}/{len(records)}", task, question, label, rationale, label, tuple(quantities))
        records.append(slotted)
    return records


def _chain_problem(rng: Random, words: Lexicon) -> tuple[str, str, str]:
    """One person's quantity through one to three events. Returns question, label, rationale."""
    name, other = _two(rng, NAMES)
    thing, another = _two(rng, OBJECTS)
    told, label, _ = _chain(rng, words, name, thing, _pick(rng, (1, 1, 2, 2, 2, 3, 3)))
    clauses = [clause for _, clause in told]
    sentences = [(sentence, "") for sentence, _ in told]
    for _ in range(_pick(rng, (0, 0, 1, 1, 2))):
        k = between(rng, 2, 30)
        if rng.random() < 0.15:
            verb = _pick(rng, words.plus + words.minus)
            sentence = _pick(rng, words.others).format(
                k=k, other=other, verb=verb, thing=thing, another=another
            )
            key = "other"
        else:
            text, key = _pick(rng, words.irrelevant)
            sentence = text.format(k=k)
        sentences.insert(between(rng, 0, len(sentences)), (sentence, f"{key} means ignore {k}"))
    # In the order of the text: a random order would be noise that no student could predict.
    clauses += [clause for _, clause in sentences if clause]
    question = _pick(rng, demo_words.ASK_ONE).format(name=name, thing=thing)
    return " . ".join([sentence for sentence, _ in sentences] + [question]), label, " . ".join(clauses) + " ."


def _pair(rng: Random, words: Lexicon) -> tuple[str, str, str]:
    """Two people, one event on one of them, their total or difference. Returns question, label, rationale."""
    name, other = _two(rng, NAMES)
    thing = _pick(rng, OBJECTS)
    total = rng.random() < 0.5
    while True:
        events = _pick(rng, (0, 1))
        first, label1, value1 = _chain(rng, words, name, thing, events)
        second, label2, value2 = _chain(rng, words, other, thing, 1 - events)
        if total or value1 > value2:
            break
    ask = _pick(rng, demo_words.ASK_TOTAL if total else demo_words.ASK_DIFFERENCE).format(
        name=name, thing=thing
    )
    clauses = [clause for _, clause in first + second] + [
        "together means +" if total else "more than means -"
    ]
    label = f"{wrapped(label1)} {'+' if total else '-'} {wrapped(label2)}"
    return " . ".join([sentence for sentence, _ in first + second] + [ask]), label, " . ".join(clauses) + " ."


def _chain(rng: Random, words: Lexicon, name: str, thing: str, events: int) -> tuple[list[Clause], str, int]:
    """A start and its events. Returns (sentence, clause) pairs, the equation, its value in 1..300."""
    if events >= 2 and rng.random() < 0.25:
        size, count = between(rng, 2, 12), between(rng, 2, 6)
        sentence = _pick(rng, demo_words.GROUPS).format(name=name, thing=thing, size=size, count=count)
        label, value, events = f"{count} * {size}", count * size, events - 1
    else:
        value = between(rng, 2, 30)
        sentence = _pick(rng, words.starts).format(name=name, thing=thing, k=value)
        label = str(value)
    told = [(sentence, f"start {label}")]
    for _ in range(events):
        operator, k, value = _event(rng, value)
        if operator in "+-":
            key = _pick(rng, words.plus if operator == "+" else words.minus)
            sentence = f"{key} {k}" + (f" {thing}" if rng.random() < 0.5 else "")
        else:
            text, key = _pick(rng, words.times if operator == "*" else words.divided)
            sentence = text.format(k=k)
        if rng.random() < 0.3:
            sentence = f"{_pick(rng, LINKS)} {sentence}"
        told.append((sentence, f"{key} means {operator} {k}"))
        label = f"{wrapped(label)} {operator} {k}"
    return told, label, value


def _event(rng: Random, value: int) -> tuple[str, int, int]:
    """An operator and a quantity that keep the running value an integer in 1..300, and that value."""
    while True:
        operator = _pick(rng, "+++---**//")
        k = between(rng, 2, 30) if operator in "+-" else between(rng, 2, 6)
        if operator == "/" and value % k:
            continue
        result = {"+": value + k, "-": value - k, "*": value * k, "/": value // k}[operator]
        if 0 < result <= _MAX_VALUE:
            return operator, k, result


def wrapped(expression: str) -> str:
    """The expression in parentheses, unless it is one operand."""
    return f"( {expression} )" if " " in expression else expression


def _pick(rng: Random, items: Sequence[_T]) -> _T:
    return items[int(rng.random() * len(items))]


def _two(rng: Random, items: Sequence[_T]) -> tuple[_T, _T]:
    """Two different items."""
    i = int(rng.random() * len(items))
    j = int(rng.random() * (len(items) - 1))
    return items[i], items[j + (j >= i)]


def between(rng: Random, low: int, high: int) -> int:
    """An integer in low..high, both included."""
    return low + int(rng.random() * (high - low + 1))
