"""One of the choices that a run has, with what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from plan.checkpoints import Checkpoint


@dataclass(frozen=True)
class Choice:
    """One way to run a plan, with what each rank and its GPU need for it."""

    placement: str
    file: str
    """The file of `deepspeed.config`."""
    checkpointing: bool
    micro_batch_size: int
    states: dict[str, int]
    """Bytes that are in use all the time, by part."""
    activations: dict[str, int]
    """Bytes that come and go, by part: the largest of these is added to the states."""
    host: int
    """Bytes of the host's memory that one rank needs."""
    room: int
    """Bytes of a GPU that tensors can have."""
    host_room: int
    """Bytes of the host's memory that there are for one rank."""
    traffic: dict[str, int]
    """Bytes of whole tensors per step, by collective; `teacher` stands for the teacher's all-gathers."""
    seconds: dict[str, float]
    """Predicted seconds per step, by part (`step_time.step_seconds`)."""
    checkpoint: Checkpoint

    @property
    def bytes(self) -> int:
        """Bytes of a GPU at the peak."""
        return sum(self.states.values()) + max(self.activations.values())

    @property
    def fits(self) -> bool:
        """Whether the memory of the GPU and that of the host suffice."""
        return self.bytes <= self.room and self.host <= self.host_room

    @property
    def step(self) -> float:
        """Predicted seconds per step."""
        return sum(self.seconds.values())

    @property
    def offloads(self) -> bool:
        """Whether optimizer states live in the host's memory."""
        return self.file.endswith("_offload")
