"""How long a step would take at given rates.

Seconds are predictions: products at `utilization` of the peak or at the speed at which weights can be read,
whichever is slower; transfers as rings, at the slowest link on their way. Overlapped transfers cost what
exceeds the products beside them. The host launches kernels ahead of the GPU; where launching them all takes
longer than all else, the rest is waited for. Latencies of transfers are left out, so many small collectives
over many nodes look cheaper here than they are; data loading and evaluations come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from ibdistill.planning.evaluation_memory import Decoding
from ibdistill.planning.footprint import WIDTH, Sizes
from plan.accelerators import Accelerator
from plan.costs import Operations


@dataclass(frozen=True)
class Load:
    """Everything that takes time in one rank's step."""

    operations: Operations
    micro_batches: int
    student_bytes: int
    """Bytes of the student's weights, unsharded."""
    teacher_bytes: int
    """Bytes of the teacher's weights, unsharded; 0 without a teacher."""
    reduced: float
    """Bytes per step that are sent for gradients."""
    gathered: float
    """Bytes per step that are sent for the student's parameters."""
    teacher_gathered: float
    """Bytes per step that are sent for the teacher's parameters."""
    updated: int
    """Parameters that this rank's optimizer updates."""
    overlaps_reduction: bool
    overlaps_gathers: bool
    """Stage 3 gathers ahead; stages 1 and 2 gather after the update, when there is nothing beside it."""
    launches: int = 0
    """Kernels that the host launches per step."""
    moved: float = 0.0
    """Bytes per micro-batch that are moved beside the products, where `utilization` does not cover them."""
    exchanged: float = 0.0
    """Bytes per step that are sent within attention, where ranks share sequences."""


@dataclass(frozen=True)
class Rates:
    """Rates of one rank, in operations per second and bytes per second."""

    products: float
    """Products of the student and of the head."""
    teacher_products: float
    memory: float
    link: float
    teacher_link: float
    launch: float = 0.0
    """Seconds in which the host launches a kernel."""
    overlap: bool = True
    """Whether transfers and products can go on at the same time."""
    exchange_link: float = 1.0

    @classmethod
    def of(
        cls,
        gpu: Accelerator,
        ranks: int,
        on_node: int,
        placement: str,
        precision: str,
        teacher_precision: str,
        shared: int = 1,
    ) -> Rates:
        """The rates of a GPU in a job of so many ranks, of which `shared` neighbours share a sequence. A ring
        over nodes is as fast as the network."""
        link = (gpu.link_gbs if ranks <= on_node else gpu.network_gbs) * 1e9
        teacher_link = gpu.link_gbs * 1e9 if placement == "zero3_node" else link
        if placement == "cpu_offload":  # shares come over the bus before they are gathered
            teacher_link = min(teacher_link, gpu.host_gbs * 1e9)
        products, theirs = gpu.products(precision), gpu.products(teacher_precision)
        exchange_link = (gpu.network_gbs if on_node % shared else gpu.link_gbs) * 1e9
        rates = products, theirs, gpu.bandwidth_gbs * 1e9, link, teacher_link, gpu.launch_us / 1e6
        return cls(*rates, exchange_link=exchange_link)


def step_seconds(load: Load, rates: Rates) -> dict[str, float]:
    """Predicted seconds per step by part, which add up to the step. See the module's docstring.

    A part named `... wait` is what a transfer takes beyond the products beside it.
    """
    micro, work = load.micro_batches, load.operations
    student = micro * max(work.student / rates.products, 3 * load.student_bytes / rates.memory)
    teacher = micro * max(work.teacher / rates.teacher_products, load.teacher_bytes / rates.memory)
    student += micro * load.moved / rates.memory
    head = micro * work.head / rates.products
    parts = {"student": student, "head": head, "teacher": teacher}
    reduce, gather = load.reduced / rates.link, load.gathered / rates.link
    theirs = load.teacher_gathered / rates.teacher_link
    beside = 0.0
    if rates.overlap and load.overlaps_reduction:
        beside, reduce = beside + reduce, 0.0
    if rates.overlap and load.overlaps_gathers:
        beside, gather = beside + gather, 0.0
    parts["gradients wait"] = reduce + max(0.0, beside - student - head)
    parts["parameters wait"] = gather
    parts["exchange wait"] = load.exchanged / rates.exchange_link  # the next product needs what comes
    parts["teacher wait"] = max(0.0, theirs - teacher) if rates.overlap else theirs
    # reads and writes master and moments, reads the gradient, writes the weight
    parts["optimizer"] = 28 * load.updated / rates.memory
    return parts


def sampling_seconds(
    sampled: Decoding, sizes: Sizes, precision: str, rates: Rates, question: int, texts: float
) -> float:
    """Predicted seconds of a step in which a rank samples `texts` of own text, on average.

    `sampled`: of as many texts as are decoded at once. They read their prompts of `question` tokens with 2
    operations per weight and token. Then each token of theirs takes a pass over all weights and, on average,
    half of the keys and values that there are at the end, or longer where products or launches do.
    """
    weights_read = sum(n for n, _ in sizes)
    products = 2 * weights_read * sampled.texts / rates.products
    moved = (WIDTH[precision] * weights_read + sampled.cache / 2) / rates.memory
    token = max(moved, products, sampled.kernels * rates.launch)
    return texts / sampled.texts * (question * products + sampled.tokens * token)


def with_launches(parts: dict[str, float], load: Load, rates: Rates) -> dict[str, float]:
    """The same seconds, and those that launching the step's kernels takes beyond them."""
    return parts | {"launch wait": max(0.0, load.launches * rates.launch - sum(parts.values()))}


def bound(parts: dict[str, float]) -> str:
    """The part that takes longest."""
    return max(parts, key=parts.__getitem__)


def efficiency(parts: dict[str, float]) -> float:
    """Share of the step in which products are computed; 1 would be perfect scaling."""
    return sum(parts[name] for name in ("student", "head", "teacher")) / sum(parts.values())
