"""All tasks by name. A new data set is one file beside this one and one line here: see CONTRIBUTING."""

from __future__ import annotations

from ibdistill.data.tasks import asdiv, cqa, demo, gsm8k, jsonl, nli, svamp
from ibdistill.data.tasks.base import Task

TASKS: dict[str, Task] = {
    "demo": demo.DEMO,
    "demo_pretrain": demo.DEMO_PRETRAIN,
    "svamp": svamp.SVAMP,
    "asdiv": asdiv.ASDIV,
    "cqa": cqa.CQA,
    "gsm8k": gsm8k.GSM8K,
    "esnli": nli.ESNLI,
    "anli1": nli.ANLI1,
    "anli2": nli.ANLI2,
    "anli3": nli.ANLI3,
    "jsonl": jsonl.JSONL,
}
