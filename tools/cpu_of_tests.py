"""A plugin of pytest: the CPU seconds of each test, with all processes that it starts, forks and daemons too.

    PYTHONPATH=tools python -m pytest -p cpu_of_tests --cpu-of-tests FILE [-n 3] [tests/...]

FILE gets a line per test: CPU seconds, wall-clock seconds, its name, divided by tabs. A fixture counts for
the test that it is made for first. Each process of pytest moves into a control group of its own, whose
counter is read, so this needs Linux and root.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-of-tests", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Meter(config.option.cpu_of_tests.resolve()))


class _Meter:
    def __init__(self, file: Path) -> None:
        is_first = not (_ROOT / "cgroup.controllers").exists()  # version 1 has a hierarchy per controller
        self._group = (_ROOT / "cpuacct" if is_first else _ROOT) / f"pytest-{os.getpid()}"
        self._counter = self._group / ("cpuacct.usage" if is_first else "cpu.stat")
        self._file = file
        try:
            self._group.mkdir()
            (self._group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            raise pytest.UsageError(f"--cpu-of-tests cannot make a control group: {error}") from error

    def pytest_unconfigure(self) -> None:
        with suppress(OSError):  # a daemon may be left in it
            (self._group.parent / "cgroup.procs").write_text(str(os.getpid()))
            self._group.rmdir()

    def _used(self) -> float:
        """Seconds of all processes of the group, also of those that have ended."""
        words = self._counter.read_text().split()
        return int(words[0]) / 1e9 if len(words) == 1 else int(words[words.index("usage_usec") + 1]) / 1e6

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        used, start = self._used(), time.perf_counter()
        try:
            return (yield)
        finally:
            line = f"{self._used() - used:.3f}\t{time.perf_counter() - start:.3f}\t{item.nodeid}\n"
            with self._file.open("a") as file:  # one write, so that lines of several processes do not mix
                file.write(line)
