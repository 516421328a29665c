"""Which ibdistill made a file: the version of the package and the git commit of its code."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import ibdistill

UNKNOWN = "unknown"


@cache
def commit(folder: Path = Path(ibdistill.__file__).parent) -> str:
    """The short git commit of the code in `folder`, with `-dirty` behind it if tracked files differ from it.

    `unknown` where git, the repository or the file `__init__.py` in it is missing: an installed package may
    lie within the repository of somebody else. Never raises, since no run should end for this.
    """
    # a git hook sets variables that would point git to another repository
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--exclude=*") or UNKNOWN
    except (OSError, ValueError, subprocess.SubprocessError):
        return UNKNOWN


def version() -> dict[str, str]:
    """`version` and `commit`, for a result file."""
    return {"version": ibdistill.__version__, "commit": commit()}
