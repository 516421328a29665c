"""One of the choices that a run has, with what it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One way to run it, on each GPU."""

    placement: str
    file: str
    """Of `deepspeed.config`."""
    checkpointing: bool
    micro_batch_size: int
    states: dict[str, int]
    """Part -> bytes that are there all the time."""
    activations: dict[str, int]
    """What comes and goes: the largest of these is added."""
    host: int
    """Bytes of the host's memory, of one rank."""
    room: int
    """Bytes that there are."""
    host_room: int
    """Of the host, for one rank."""
    traffic: dict[str, int]
    """Collective -> bytes a step, of whole tensors; `teacher` for its all-gathers."""
    seconds: dict[str, float]
    """Predicted, of a step by part."""

    @property
    def bytes(self) -> int:
        """At the peak."""
        return sum(self.states.values()) + max(self.activations.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.room and self.host <= self.host_room

    @property
    def step(self) -> float:
        """Predicted seconds of a step."""
        return sum(self.seconds.values())

    @property
    def offloads(self) -> bool:
        return self.file.endswith("_offload")
