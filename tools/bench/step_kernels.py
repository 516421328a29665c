"""Kernels that a step launches on a GPU, and its memory, counted on fake tensors without a GPU.

    python tools/bench/step_kernels.py

The forward and backward pass of 64 questions in bfloat16 in the dry run of the planner (`planning.dryrun`),
which takes the forms of the layers for a GPU. An operation counts as one kernel, or as none if it only gives
a view. An attention of torch's and a norm count as one each way, and so does the head loss, which is one
operation here. The optimizer is not counted. Memory is the most at any time above the model states and
without what the head loss holds inside.
"""

from __future__ import annotations

from ibdistill.config.sections import ObjectiveConfig, StudentConfig
from ibdistill.planning.dryrun import Lengths, Skeleton, student_step

MODELS = ("google-t5/t5-base", "google/t5-v1_1-base", "Qwen/Qwen2.5-0.5B")


def main(
    questions: int = 64,
    label: int = 16,
    rationale: int = 128,
    lengths: tuple[int, ...] = (128, 512, 1024),
    models: tuple[str, ...] = MODELS,
) -> None:
    """Print the table; lengths are of the question, in tokens."""
    print(f"{questions} questions, label {label}, rationale {rationale}, bf16, fake tensors")
    print(
        f"| {'model':20} | kernels | GiB at {', '.join(map(str, lengths))} question tokens |\n|---|---|---|"
    )
    for name in models:
        skeleton = Skeleton(name, "student.model", None, "bf16", StudentConfig())
        steps = [
            student_step(skeleton, Lengths(questions, length, label, rationale), ObjectiveConfig())
            for length in lengths
        ]
        peaks = ", ".join(f"{step.peak / 2**30:.1f}" for step in steps)
        print(f"| {name:20} | {steps[0].kernels:7} | {peaks} |")


if __name__ == "__main__":
    import fire

    fire.Fire(main)
