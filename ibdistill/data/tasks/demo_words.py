"""The words of the demo corpus.

The lexicon is the difficulty of the demo task: which of 126 verbs and phrases means which
operation (or none) can only be learned from examples. That is what a rationale spells out
("bred means * n2") and a label alone does not. The auxiliary lexicon says the same things
with one explicit word each; a student is pretrained on it and never sees a target verb
explained there.
"""

from __future__ import annotations

from dataclasses import dataclass

NAMES = tuple("tom mia ben ana leo zoe max ivy".split())
OBJECTS = tuple("apples coins books shells stamps pens eggs toys".split())
LINKS = ("then", "later", "next")
GROUPS = (
    "{name} had {count} boxes with {size} {thing}",
    "{name} filled {count} shelves with {size} {thing}",
    "{name} worked {count} days making {size} {thing}",
)
ASK_ONE = ("how many {thing} now ?", "how many {thing} left ?", "count {thing} of {name} .")
ASK_TOTAL = ("how many {thing} together ?", "total {thing} ?")
ASK_DIFFERENCE = ("how many more {thing} has {name} ?", "difference of {thing} ?")
CLAUSE_WORDS = ("start", "means", "ignore", "together", "more", "than")


@dataclass(frozen=True)
class Lexicon:
    """The exchangeable words of a problem.

    A verb stands before its quantity and is its own key in the rationale. A phrase is a
    pair (text with `{k}` for the quantity, key in the rationale).
    """

    starts: tuple[str, ...]
    """Sentences that introduce the first quantity."""
    plus: tuple[str, ...]
    """Verbs that add."""
    minus: tuple[str, ...]
    """Verbs that take away."""
    times: tuple[tuple[str, str], ...]
    """Phrases that multiply."""
    divided: tuple[tuple[str, str], ...]
    """Phrases that divide."""
    irrelevant: tuple[tuple[str, str], ...]
    """Phrases whose quantity is to be ignored."""
    others: tuple[str, ...]
    """Sentences about another person or thing, to be ignored; `{verb}` is any plus or minus verb."""


TARGET = Lexicon(
    starts=(
        "{name} had {k} {thing}",
        "{name} owned {k} {thing}",
        "{name} began with {k} {thing}",
        "{name} has {k} {thing}",
    ),
    plus=tuple(
        """found bought got received picked collected gathered won earned borrowed discovered caught made
        inherited fetched unpacked acquired obtained harvested gained baked crafted built knitted mined hunted
        imported rented salvaged recovered retrieved scored amassed stocked claimed snatched scooped attracted
        welcomed adopted summoned grabbed loaded hoarded netted reaped secured ordered purchased
        produced""".split()
    ),
    minus=tuple(
        """lost sold used dropped spent broke wasted donated misplaced discarded ruined returned buried traded
        burned ate smashed surrendered forfeited shipped exported mailed lent scrapped trashed melted drowned
        crushed gifted abandoned released shredded tossed spilled offered handed delivered removed deleted
        cracked torched dumped posted threw sank auctioned recycled pawned sacrificed squandered""".split()
    ),
    times=(
        ("grew {k} fold", "grew"),
        ("wizard multiplied by {k}", "multiplied"),
        ("ended with {k} times", "ended"),
        ("swapped each for {k}", "swapped"),
        ("each became {k}", "became"),
        ("scaled up by {k}", "scaled"),
        ("cut each into {k}", "cut"),
        ("bred {k} times", "bred"),
        ("cloned {k} times", "cloned"),
        ("expanded {k} fold", "expanded"),
        ("boosted by {k}", "boosted"),
        ("copied until {k} times", "copied"),
        ("swelled {k} fold", "swelled"),
        ("magnified {k} times", "magnified"),
    ),
    divided=(
        ("shared among {k} people", "shared"),
        ("kept one of {k} piles", "piles"),
        ("shrank {k} fold", "shrank"),
        ("packed in sets of {k}", "packed"),
        ("split into {k} shares", "split"),
        ("thief left one in {k}", "thief"),
        ("portioned for {k} people", "portioned"),
        ("reduced {k} fold", "reduced"),
        ("bundled by {k}", "bundled"),
        ("sliced to one in {k}", "sliced"),
        ("rationed over {k} weeks", "rationed"),
        ("dwindled {k} fold", "dwindled"),
    ),
    irrelevant=(
        ("trip took {k} minutes", "trip"),
        ("turned {k} years", "turned"),
        ("shop opens at {k}", "shop"),
        ("walked {k} miles", "walked"),
        ("was {k} degrees", "degrees"),
        ("bus number {k}", "bus"),
        ("waited {k} hours", "waited"),
        ("room with {k} windows", "room"),
        ("slept {k} hours", "slept"),
        ("read page {k}", "read"),
        ("lives on floor {k}", "floor"),
        ("song for {k} minutes", "song"),
        ("street with {k} houses", "street"),
        ("is {k} inches tall", "tall"),
        ("train at {k}", "train"),
        ("ran {k} laps", "ran"),
        ("paid {k} cents", "paid"),
        ("cousin aged {k}", "cousin"),
        ("door code {k}", "door"),
        ("phoned {k} friends", "phoned"),
    ),
    others=("{other} {verb} {k} {thing}", "also {verb} {k} {another}"),
)

AUXILIARY = Lexicon(
    starts=("{name} has {k} {thing}",),
    plus=("plus",),
    minus=("minus",),
    times=(("times {k}", "times"),),
    divided=(("divided by {k}", "divided"),),
    irrelevant=(("{k} unrelated", "unrelated"),),
    others=("other {k} unrelated",),
)
