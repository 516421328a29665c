"""Data sets in miniature, and ways to read them: for the tests of formats, sources and tasks."""

import json
import os
import re
from pathlib import Path

import pytest

from ibdistill.config.sections import DataConfig
from ibdistill.data.loading import load
from ibdistill.data.tasks.registry import TASKS

DATA = Path(os.environ.get("IBDISTILL_DATA") or Path(__file__).parents[2] / "shared" / "data")
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder of real data (IBDISTILL_DATA)")


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def array(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def said(i, answer=None):
    return f"There are {i} and 1. The answer is ({i if answer is None else answer} - 1)."


def svamp(root, outputs, test_outputs=None):
    """The release's layout with one training record for each LLM output."""
    for split, n in (("train", len(outputs)), ("test", 2)):
        rows = [{"input": f"{split}: {i} less 1?", "label": f"( {i}.0 - 1.0 )"} for i in range(n)]
        array(root / f"svamp/svamp_{split}.json", rows)
    array(root / "svamp/llm/train_CoT_0.json", outputs)
    if test_outputs is not None:
        array(root / "svamp/llm/test_CoT_0.json", test_outputs)
    return root


def read(task, path=None, needs_rationale=False, **settings):
    data = DataConfig(task=task, path=None if path is None else str(path), **settings)
    splits = TASKS[task].read(task, data, needs_rationale=needs_rationale)
    return {split: list(part) for split, part in splits.items()}


def loaded(task, path=None, needs_rationale=True, **settings):
    data = DataConfig(task=task, path=None if path is None else str(path), **settings)
    return load(data, needs_rationale=needs_rationale)


def read_refused(message, *args, **settings):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(*args, **settings)


def load_refused(message, *args, **settings):
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded(*args, **settings)


def ids(records):
    return [record.id for record in records]
