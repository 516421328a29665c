"""LLM text to rationale and label, by every task's parser."""

import pytest

from ibdistill.data.tasks.registry import TASKS

NEXT = "\n\nQ: Tom has 2 dogs. How many?\nA: He has 2. The answer is (2)."
REASON = "He had 8 and gave 3 away."


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("svamp", f" {REASON} The answer is (8 - 3).", (REASON, "(8 - 3)")),
        ("svamp", f"{REASON} The answer is (8 - 3).{NEXT}", (REASON, "(8 - 3)")),
        ("svamp", f"{REASON}\nThe answer is ((8 - 3) * 2) = 10 dollars.", (REASON, "((8 - 3) * 2)")),
        ("svamp", f"{REASON} The answer is (8 - 3) * (2).", (REASON, "(8 - 3) * (2)")),
        ("svamp", "\u00e9 \U0001f600 The answer is (8 \u2212 3).", ("\u00e9 \U0001f600", "(8 \u2212 3)")),
        ("svamp", f"{REASON} The answer is -(8 - 3).", None),  # a part of it is another answer
        ("svamp", f"{REASON} The answer is 2 * (8 - 3).", None),
        ("svamp", f"{REASON} The answer is (8 - 3) / 2.", None),
        ("svamp", f"{REASON} The answer is (8 - 3) \u2212 1.", None),
        ("svamp", f"{REASON} The answer is (8 - 3) - as he ate them.", (REASON, "(8 - 3)")),
        ("asdiv", f"{REASON} The answer is (8 - 3).", (REASON, "(8 - 3)")),
        ("svamp", REASON, None),  # no marker
        ("svamp", f"{REASON} The answer is 5.", None),  # no equation
        ("svamp", f"{REASON} The answer is (8 - x).", None),
        ("svamp", f"{REASON} The answer is (8) apples (red).", None),
        ("svamp", f"{REASON} The answer is (5). The answer is (6).", None),
        ("svamp", "The answer is (8 - 3).", None),  # no rationale
        ("svamp", f"{REASON} The answer is", None),
        ("svamp", "Q: again The answer is (1).", None),
        ("svamp", "", None),
        ("svamp", "\x00", None),
        ("svamp", f"{REASON} The answer is (__import__('os').system('x')).", None),
        ("svamp", f"{REASON} The answer is {'(' * 100_000}", None),
        ("cqa", "Money is kept there. So the answer is (b) bank.", ("Money is kept there.", "bank")),
        ("cqa", "Money. So the answer is (b) bank.\n\nQ: Why?\nSo the answer is (a) x.", ("Money.", "bank")),
        ("cqa", "Money. So the answer is (b) bank, or (c) safe.", ("Money.", "bank, or")),  # as the release
        ("cqa", "Money. So the answer is (b) bank.\nThat is all.", ("Money.", "bank")),
        ("cqa", "Money. So the answer is bank.", None),
        ("cqa", "Money. So the answer is (b).", None),
        ("cqa", "Money. So the answer is (b) x. So the answer is (c) y.", None),
        ("cqa", "Money. The answer is (b) bank.", None),
        ("cqa", "", None),
        ("esnli", "A dog is an animal. Answer: entailment", ("A dog is an animal.", "entailment")),
        ("esnli", "A dog.\nAnswer: Neutral.\nPremise: x\nAnswer: entailment", ("A dog.", "neutral")),
        ("esnli", "A dog. Answer: contradiction because", ("A dog.", "contradiction")),
        ("esnli", "A dog. Answer: it is not possible to tell", None),
        ("esnli", "A dog. Answer: entailments", None),
        ("esnli", "Answer: entailment", None),
        ("esnli", "A dog.", None),
        ("anli1", "No year. So the answer is neutral.", ("No year.", "neutral")),
        ("anli2", "No year. The answer is Neutral", ("No year.", "neutral")),
        ("anli3", "The answer is odd. So the answer is neutral. Premise:", ("The answer is odd.", "neutral")),
        ("anli1", "No year. So the answer is yes.", None),
        ("anli1", "Premise: x So the answer is neutral.", None),
        ("jsonl", "So. The answer is 2 + 3 = 5. The answer is 5.", ("So. 2 + 3 = 5.", "5")),
        ("jsonl", "So. The answer is 2 + 3 = 5 apples. The answer is 6.", None),
        ("jsonl", "So. The answer is a cat. The answer is a cat.", None),  # only amounts are compared
        ("jsonl", r"We add. The answer is $\boxed{5}$.", ("We add.", "5")),
        ("gsm8k", "24 + 48 = 72. The answer is $1,200.", ("24 + 48 = 72.", "1,200")),
        ("gsm8k", "24 + 48 = 72.\n#### 72", ("24 + 48 = 72.", "72")),
        ("gsm8k", "Cold. So the answer is -3.5 degrees.", ("Cold.", "-3.5")),
        ("gsm8k", "Cold. The answer is nothing.", None),
        ("gsm8k", "Cold. The answer is \u22123.", ("Cold.", "-3")),
        ("gsm8k", "Debt. The answer is -$3.", ("Debt.", "-3")),
        ("gsm8k", "Half. The answer is .5", ("Half.", "0.5")),
        ("gsm8k", "Part. The answer is 3/4 of a cup.", ("Part.", "0.75")),
        ("gsm8k", "He ate. The answer is 10 - 4 = 6.", ("He ate.", "6")),
        ("gsm8k", "Rich. So the answer is $1.5 million.", ("Rich.", "1500000")),
        ("gsm8k", "Days. The answer is 3-4 days.", None),
        ("gsm8k", "Late. The answer is 5:30.", None),
        ("gsm8k", "Wrong. The answer is 10 - 4 = 7.", None),
        ("gsm8k", "2+2=4\n#### 4\n\n3+4=7\n#### 7", ("2+2=4", "4")),
        ("gsm8k", "2+2=4\n#### 4\nThe answer is 7.", ("2+2=4", "4")),
        ("gsm8k", "2+2=4 #### 4 #### 5", None),
        ("gsm8k", "2+2=4. The answer is 4.\n#### 4", ("2+2=4.", "4")),
        ("gsm8k", "2+2=4. The answer is 4. #### 4.0", ("2+2=4.", "4")),
        ("gsm8k", "2+2=4. The answer is 7.\n#### 4", None),
        ("jsonl", "It rains. #### umbrella\nIt shines. The answer is hat.", ("It rains.", "umbrella")),
        ("jsonl", "It rains. #### umbrella #### hat", None),
        ("jsonl", "It rains. Answer: umbrella.\nAnswer: hat", None),
    ],
)  # fmt: skip
def test_parse_llm(task, text, expected):
    assert TASKS[task].parse_llm(text) == expected
