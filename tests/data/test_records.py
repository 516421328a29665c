"""Number mapping: what counts as one number, and that every text of a record uses the same names."""

import pytest

from ibdistill.data.records import Record, map_numbers


def mapped(question, label="", rationale=""):
    return map_numbers(Record("t/train/0", "t", question, label, rationale, gold=label))


def test_all_texts_use_the_questions_numbers():
    record = mapped("A pack costs 76 dollars, 25 off.", "( 76.0 - 25.0 )", "76 - 25 is 51.")
    assert record.question == "A pack costs n0 dollars, n1 off."
    assert record.label == record.gold == "( n0 - n1 )"
    assert record.rationale == "n0 - n1 is 51."  # 51 is not in the question
    assert record.quantities == ("76", "25")


@pytest.mark.parametrize(
    ("question", "expected", "quantities"),
    [
        ("1,200 and 1200", "n0 and n0", ("1200",)),
        ("2.50 and 2.5 and 25", "n0 and n0 and n1", ("2.5", "25")),
        ("$0.50 or 50", "$n0 or n1", ("0.5", "50")),
        ("007 is 7", "n0 is n0", ("7",)),
        ("0 and 0.0 and 00", "n0 and n0 and n0", ("0",)),
        ("He has 3.", "He has n0.", ("3",)),
        ("3, 4,5", "n0, n1,n2", ("3", "4", "5")),
        ("1/2 of -3", "n0/n1 of -n2", ("1", "2", "3")),
        ("15th of v2 at 2.5kg or 1,200kg", "15th of v2 at 2.5kg or 1,200kg", ()),
        ("version 1.2.3", "version 1.2.3", ()),
        ("12,3456", "n0,n1", ("12", "3456")),
        ("\u0663 apples", "\u0663 apples", ()),
        ("none", "none", ()),
    ],
)
def test_what_a_number_is(question, expected, quantities):
    record = mapped(question)
    assert (record.question, record.quantities) == (expected, quantities)
