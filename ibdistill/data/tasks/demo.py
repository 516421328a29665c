"""The embedded demo corpus: word problems whose difficulty is a lexicon, made by a seeded generator.

    question   tom filled n0 shelves with n1 coins . bred n2 times . is n3 inches tall . how many coins now ?
    label      ( n0 * n1 ) * n2
    rationale  start n0 * n1 . bred means * n2 . tall means ignore n3 .
    quantities ("4", "2", "6", "10")

Two families. "chain" (78 %): a start, one to three events, up to two quantities to ignore.
"pair" (22 %): two people, one event, the question asks for the total or the difference.
Running values are integers in 1..300. Numbers come out mapped (`n<i>`, see `records.map_numbers`),
because a model this small would spend its capacity on spelling them.

From random weights, 300 labels give about 33 % with `finetune` and `dss` alike (one run each), so
there is a stand-in for T5's pretraining, the task `demo_pretrain`. 70 % are problems
of the same structure in explicit words (`plus`, `unrelated`, ...; both streams, since a decoder that
never wrote a rationale is worse off with `dss` than with `finetune`). 30 % are unlabelled questions
of the target lexicon with words cut out: the label fills them in, T5's span corruption, and the
rationale lists each quantity with the word before it. (Three pretraining seeds each: 69 % for `dss`
afterwards, 62 % with the whole question as the rationale, but a seed moves either by 7 points.)
Nothing in it explains a target verb.

Only `Random.random()` is drawn from: its sequence is promised never to change between Python
versions, that of `choice`, `sample` and `randint` is not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import TypeVar

from ibdistill.data.records import Record
from ibdistill.data.tasks import demo_words
from ibdistill.data.tasks.demo_words import LINKS, NAMES, OBJECTS, Lexicon

OPERATORS = "+-*/"
MAX_QUANTITIES = 8
MAX_SENTINELS = 4
PREFIXES = ("predict:", "explain:", "solve:", "steps:")
_SIZES = {"test": (2000, 777001), "valid": (1000, 4242), "train": (16000, 11)}
_UNLABELLED = (20000, 21)
_AUXILIARY = (10000, 22)
_RESTORED = 4286  # with all of the auxiliary problems: 30 %
_RESTORE_SEED = 23
_MAX_VALUE = 300
_T = TypeVar("_T")

Clause = tuple[str, str]  # a sentence of the question, its clause of the rationale


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
                expressions[-1] = f"{_wrap(expressions[-1])} {operator} {a}"
            case _:
                return None
    if len(expressions) == 2 and len(joined) == 1:
        return f"{_wrap(expressions[0])} {joined[0]} {_wrap(expressions[1])}"
    return expressions[0] if len(expressions) == 1 and not joined else None


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
        k = _between(rng, 2, 30)
        if rng.random() < 0.15:
            verb = _pick(rng, words.plus + words.minus)
            sentence = _pick(rng, words.others).format(
                k=k, other=other, verb=verb, thing=thing, another=another
            )
            key = "other"
        else:
            text, key = _pick(rng, words.irrelevant)
            sentence = text.format(k=k)
        sentences.insert(_between(rng, 0, len(sentences)), (sentence, f"{key} means ignore {k}"))
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
    label = f"{_wrap(label1)} {'+' if total else '-'} {_wrap(label2)}"
    return " . ".join([sentence for sentence, _ in first + second] + [ask]), label, " . ".join(clauses) + " ."


def _chain(rng: Random, words: Lexicon, name: str, thing: str, events: int) -> tuple[list[Clause], str, int]:
    """A start and its events. Returns (sentence, clause) pairs, the equation, its value in 1..300."""
    if events >= 2 and rng.random() < 0.25:
        size, count = _between(rng, 2, 12), _between(rng, 2, 6)
        sentence = _pick(rng, demo_words.GROUPS).format(name=name, thing=thing, size=size, count=count)
        label, value, events = f"{count} * {size}", count * size, events - 1
    else:
        value = _between(rng, 2, 30)
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
        label = f"{_wrap(label)} {operator} {k}"
    return told, label, value


def _event(rng: Random, value: int) -> tuple[str, int, int]:
    """An operator and a quantity that keep the running value an integer in 1..300, and that value."""
    while True:
        operator = _pick(rng, "+++---**//")
        k = _between(rng, 2, 30) if operator in "+-" else _between(rng, 2, 6)
        if operator == "/" and value % k:
            continue
        result = {"+": value + k, "-": value - k, "*": value * k, "/": value // k}[operator]
        if 0 < result <= _MAX_VALUE:
            return operator, k, result


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
        end = start + _between(rng, 1, 3)
        cut += [f"<extra_id_{sentinel}>", *words[start:end]]
        sentinel += 1
    return " ".join(text + words[end:]), " ".join(cut)


def _wrap(expression: str) -> str:
    return f"( {expression} )" if " " in expression else expression


def _operand(word: str) -> bool:
    return re.fullmatch(r"n?\d+", word) is not None


def _pick(rng: Random, items: Sequence[_T]) -> _T:
    return items[int(rng.random() * len(items))]


def _two(rng: Random, items: Sequence[_T]) -> tuple[_T, _T]:
    """Two different items."""
    i = int(rng.random() * len(items))
    j = int(rng.random() * (len(items) - 1))
    return items[i], items[j + (j >= i)]


def _between(rng: Random, low: int, high: int) -> int:
    """An integer in low..high, both included."""
    return low + int(rng.random() * (high - low + 1))
