"""What a run must remember besides weights, optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Rides in the client state of DeepSpeed's checkpoints."""

    step: int = 0
    """Optimizer steps taken or skipped, which is also the position in the order of batches."""
    tokens: int = 0
    """Tokens trained on, over all ranks, without padding."""
    seconds: float = 0.0
    """Seconds of training, over all starts of the run."""
    skipped: int = 0
    """Steps skipped for a non-finite loss or gradient."""
    skipped_in_row: int = 0
    """How many of the last steps in a row were skipped."""
    best_step: int = -1
    """Step of the best evaluation on the validation split; -1: there was none."""
    best_score: float = float("-inf")
    """Mean validation accuracy over tasks at `best_step`."""
    stale_evaluations: int = 0
    """Evaluations on the validation split since `best_step`."""
    own_text: str = ""
    """The file of the student's own text in force (`on_policy`); empty: there is none."""
    sampled: int = 0
    """Texts that the student has sampled for its own training."""
    unfinished: int = 0
    """How many of them were empty, or reached their limit without an end."""
    pseudo: str = ""
    """The file of the pseudo-labelled records in force (`pseudo_labels`); empty: there are none."""
