"""Whether two answers have the same mathematical value, by `math-verify`, which reads LaTeX.

What a model writes is untrusted input. So of math-verify only the LaTeX grammar is used: its reader of plain
expressions hands the text to sympy's `parse_expr`, which evaluates it as Python. And a short text may ask
for endless work (`9^{9^{9^9}}`), so a process of its own does it, with a limit of time and of memory, and is
killed if need be; the answers then count as different.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

SECONDS = 5.0
"""The most time for one pair."""
START_SECONDS = 60.0
"""The most time for the process to start."""
LONGEST = 300
"""Answers of more characters are different from everything."""
_BYTES = 4 << 30


def check_installed() -> None:
    """Raise ValueError if math-verify is not there."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "eval.math_verify needs the package math-verify, which is not installed; pip install "
            "'ibdistill[math]', or leave the setting out"
        )


def equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether both texts of each pair (answer, gold) have the same value."""
    found, process = [], None
    try:
        for answer, gold in pairs:
            if answer.strip() == gold.strip() or max(len(answer), len(gold)) > LONGEST:
                found.append(answer.strip() == gold.strip())
                continue
            process = process or _start()
            verdict = _ask(process, answer, gold)
            if verdict is None:
                _end(process)
                process = None
            found.append(bool(verdict))
    finally:
        if process is not None:
            _end(process)
    return found


def serve() -> None:
    """The process: reads pairs as JSON lines, and writes a JSON line of true or false for each."""
    import logging
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # math-verify warns that its own limits are off
    verdicts, sys.stdout = sys.stdout, sys.stderr  # its grammar prints
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    form = [LatexExtractionConfig()]

    def parsed(text: str) -> list:
        return parse(f"${text.strip().strip('$')}$", extraction_config=form, parsing_timeout=None)

    print("true", file=verdicts, flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        try:
            same = bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))
        except Exception:  # of parser and algebra: anything, MemoryError included
            same = False
        print(json.dumps(same), file=verdicts, flush=True)


def _start() -> subprocess.Popen:
    """The process, ready for pairs."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if _line(process, START_SECONDS) is not True:
        _end(process)
        raise ValueError(
            "eval.math_verify: the process that compares answers does not start; see whether `python -c "
            "'import math_verify'` works, or leave the setting out"
        )
    return process


def _ask(process: subprocess.Popen, answer: str, gold: str) -> bool | None:
    """The verdict; None if the process died or took too long."""
    try:
        process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        return None
    return _line(process, SECONDS)


def _line(process: subprocess.Popen, seconds: float) -> bool | None:
    """What the process says next within so many seconds; None if it says nothing."""
    line, end = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        part = os.read(process.stdout.fileno(), 64) if ready else b""
        if not part:
            return None
        line += part
    return json.loads(line)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(OSError):  # what was not sent is not needed
        process.stdin.close()
