"""Print the results of finished runs side by side: python tools/compare_runs.py RUN..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = ("run", "method", "task", "accuracy %", "rationale BLEU", "steps", "tokens", "train s")


def rows(folder: Path) -> list[tuple[str, ...]]:
    """One row a task of a run. Raises ValueError if the run has no result."""
    path = folder / "result.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no result.json: no run, or not finished")
    result = json.loads(path.read_text())
    return [
        (
            folder.name,
            result["method"],
            task,
            f"{100 * scores['accuracy']:.1f}",
            f"{scores['rationale_bleu']:.1f}" if "rationale_bleu" in scores else "-",
            str(result["steps"]),
            str(result["tokens"]),
            f"{result['seconds']:.0f}",
        )
        for task, scores in result["test"].items()
    ]


def table(lines: list[tuple[str, ...]]) -> str:
    """Columns of equal width; text to the left, numbers to the right."""
    lines = [COLUMNS, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(folders: list[str]) -> None:
    try:
        print(table([row for folder in folders for row in rows(Path(folder))]))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
