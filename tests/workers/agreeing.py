"""A run whose student answers its unlabelled questions rightly, which a student from scratch would not do
within seconds.

`python agreeing.py` takes the arguments of `ibdistill/train.py`; test_distributed runs it, through the
launcher or on two forked ranks (see ranks.py). With AGREEING_STOPS_AT in the environment rank 1 makes that
file and hangs, after it has answered the first refresh's questions in one stream and before the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from ibdistill import train
from ibdistill.data.tasks import demo
from ibdistill.evaluation import predictions
from ibdistill.models.decoding import Answer
from ibdistill.runtime import distributed


def answers_of_an_oracle(calls: list[int]) -> Callable:
    """A function in place of `predictions.decode`: to about three quarters of the unlabelled questions it
    gives the demo's own answer (the student's weights decide to which), to all other questions the student's.

    `calls`: the number of unlabelled questions of each call is appended.
    """
    honest = predictions.decode
    known = {
        prefix + record.question: text
        for record in demo._unlabelled()
        for prefix, text in (("predict: ", record.label), ("explain: ", record.rationale))
    }

    def decode(model, tokenizer, questions, **settings):
        if not questions or questions[0] not in known:
            return honest(model, tokenizer, questions, **settings)
        calls.append(len(questions))
        if (
            len(calls) == 2
            and os.environ.get("RANK") == "1"
            and (path := os.environ.get("AGREEING_STOPS_AT"))
        ):
            Path(path).touch()
            time.sleep(300)
        digits = int(sum(float(p.detach().double().abs().sum()) for p in model.parameters()) * 1e4)
        return [Answer(known[q] if (len(q) + digits) % 4 else "nothing", 1.0, 1.0) for q in questions]

    return decode


def main() -> None:
    predictions.decode = answers_of_an_oracle([])
    try:
        train.main()
    except SystemExit as end:
        distributed.exit_at_once(end.code)


if __name__ == "__main__":
    import ranks  # beside this script; tests that import this module have tests/ on their path instead

    ranks.run(main, ranks=(2,))
