"""OUT/report.md: a table that a person can read and send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accept.checks import CHECKS
from accept.lines import FAILED, INFO, NOT_RUN, PASSED, read_lines
from ibdistill.runtime import files
from ibdistill.runtime.version import version

FILE = "report.md"


def write(out: Path, on_cpu: bool) -> None:
    """Write the report of all lines so far."""
    lines = read_lines(out)
    title = "# Dry run on a CPU: nothing was accepted" if on_cpu else "# Acceptance on GPUs"
    facts = ", ".join(f"{key} {value}" for key, value in version().items())
    parts = [
        title,
        "",
        facts,
        "",
        *(f"- {text}" for text in summary(lines, on_cpu)[0].splitlines()),
        "",
        "| check | cases | seconds |",
        "|---|---|---|",
    ]
    for check in CHECKS:
        mine = [line for line in lines if line["check"] == check.name]
        seconds = next((x["values"]["seconds"] for x in mine if x["case"] == "time"), "")
        parts.append(f"| {check.name} | {_counted(mine)} | {seconds} |")
    parts += ["", "| check | case | result | |", "|---|---|---|---|"]
    for line in lines:
        if line["case"] != "time":
            cells = (line["check"], line["case"], line["status"], line["message"])
            parts.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    files.write_atomically(out / FILE, "\n".join(parts) + "\n")


def summary(lines: list[dict[str, Any]], on_cpu: bool) -> tuple[str, int]:
    """The result in a few lines, and the exit code that goes with it."""
    failed = [
        f"{line['check']}: {line['case']}: {line['message']}" for line in lines if line["status"] == FAILED
    ]
    left_out = [f"{x['check']}: {x['case']}: {x['message']}" for x in lines if x["status"] == NOT_RUN]
    untouched = [c.name for c in CHECKS if c.name not in {line["check"] for line in lines}]
    parts = [f"FAILED {text}" for text in failed] + [f"not run {text}" for text in left_out]
    parts += [f"not run {name}: not yet begun" for name in untouched]
    if on_cpu:
        passed = sum(line["status"] == PASSED for line in lines)
        parts.append(
            f"dry run on a CPU: {passed} cases passed, {len(failed)} failed; this says nothing of GPUs"
        )
        return "\n".join(parts), 1 if failed else 0
    if failed:
        return "\n".join([*parts, f"not accepted: {len(failed)} cases failed"]), 1
    # what needs more GPUs than there are is no part of what these can show
    beyond = [x for x in lines if x["status"] == NOT_RUN and x["values"].get("too few GPUs")]
    if untouched or len(beyond) < len(left_out):
        return "\n".join([*parts, "not accepted: not all was run"]), 4
    where = " on these GPUs, which are too few for some checks" if beyond else ""
    return "\n".join([*parts, f"accepted{where}"]), 0


def _counted(lines: list[dict[str, Any]]) -> str:
    """How many cases had which result."""
    counts = {
        s: sum(x["status"] == s and x["case"] != "time" for x in lines)
        for s in (PASSED, FAILED, INFO, NOT_RUN)
    }
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "not yet begun"


def _cell(text: str) -> str:
    """Text for a table's cell: one line, cut, with bars escaped."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    return text if len(text) <= 400 else text[:397] + "..."
