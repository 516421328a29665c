"""`python -m ibdistill` says what there is to run."""

from __future__ import annotations

import ibdistill
from ibdistill.runtime.version import commit

ENTRY_POINTS = {
    "ibdistill/train.py": "distil a student, or continue an interrupted run",
    "ibdistill/evaluate_student.py": "score a trained student, or its predictions, on a task",
    "ibdistill/ask.py": "ask a trained student: one question, a conversation, or a file",
    "ibdistill/write_rationales.py": "let the teacher write the rationales of a run, and nothing else",
}


def main() -> None:
    """Print the entry points, one line each."""
    print(f"ibdistill {ibdistill.__version__}, commit {commit()}\n")
    for path, purpose in ENTRY_POINTS.items():
        print(f"    python {path:30}  {purpose}")
    print(
        "\nSeveral GPUs: `deepspeed --num_gpus N` instead of `python`. Settings: --help behind any of them."
    )


if __name__ == "__main__":
    main()
