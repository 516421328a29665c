"""An exported student's answers by the lines of transformers on its model card."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path


def answers_by_card(folder: Path, questions: Sequence[str]) -> list[tuple[str, str]]:
    """Label and rationale of each question, by the card's lines as they stand, run in the card's folder."""
    code = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[1]
    loading, asking = code.split('question = "..."\n')
    names, before = {}, os.getcwd()
    os.chdir(folder)
    try:
        exec(loading, names)
    finally:
        os.chdir(before)
    answers = []
    for question in questions:
        names["question"] = question
        exec(asking, names)
        answers.append((names["label"], names["rationale"]))
    return answers
