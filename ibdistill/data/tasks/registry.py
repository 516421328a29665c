"""All tasks by name. A new data set is one file beside this one and one line here: see CONTRIBUTING."""

from __future__ import annotations

from importlib import import_module

from ibdistill.data.tasks.base import Task

_FILES = (
    "demo",
    "svamp",
    "asdiv",
    "cqa",
    "gsm8k",
    "nli",
    "jsonl",
)
"""The files beside this one. Each defines one task or several, under names in capitals."""

TASKS: dict[str, Task] = {
    task.name: task
    for file in _FILES
    for task in vars(import_module(f"ibdistill.data.tasks.{file}")).values()
    if isinstance(task, Task)
}
