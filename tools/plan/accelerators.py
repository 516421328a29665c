"""What the planner knows about GPUs, from their makers' data sheets; nothing here was measured.

Peaks are those of dense bf16 products: the sheets' figures "with sparsity" are halved. A link's rate is that
of one direction, since a ring is bound by what a rank sends; NVLink's sheets give both directions together.
`network_gbs` is the share of one GPU in its node's network, in the maker's reference machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ibdistill.runtime.hardware import GIB


@dataclass(kw_only=True, frozen=True)
class Accelerator:
    """Rates of one GPU and of its links. GB are 10^9 bytes."""

    memory_gib: float
    """Memory, GiB. Sheets say GB and mean about GiB."""
    bandwidth_gbs: float
    """Memory bandwidth, GB/s."""
    tflops: float
    """Peak rate of dense bf16 products, 10^12 operations per second."""
    fp32_tflops: float
    """Peak rate of fp32 products in full precision, which is torch's default, 10^12 operations per second."""
    link_gbs: float
    """Rate of the link to another GPU of the node, in one direction, GB/s."""
    network_gbs: float
    """Rate of the link to another node, in one direction, the share of one GPU, GB/s."""
    source: str
    """Where the figures are from."""
    usable: float = 0.92
    """Share of the memory that tensors can have; the rest is for the driver's context, NCCL's buffers and
    fragmentation. This is an assumption."""
    utilization: float = 0.4
    """Share of the peak that a step's products reach. This is an assumption; a run logs its `speed/mfu`."""
    launch_us: float = 6.0
    """Time in which the host launches one kernel through torch, microseconds. This is an assumption."""
    host_memory_gib: float = 512.0
    """A node's memory, GiB. This is an assumption where the source names no machine."""
    host_gbs: float = 25.0
    """Rate of the link to the host's memory, GB/s. This is an assumption; PCIe 4.0 x16 could reach 32."""
    storage_gbs: float = 2.0
    """Rate at which all ranks together write to the shared file system, GB/s. This is an assumption."""
    local_gbs: float = 2.0
    """Rate at which a node's ranks together write to its own disk (`run.local_dir`), GB/s. This is an
    assumption."""

    def products(self, precision: str) -> float:
        """The rate that a step's products reach in `fp32` or `bf16`, operations per second."""
        return 1e12 * self.utilization * (self.tflops if precision == "bf16" else self.fp32_tflops)

    def room(self) -> int:
        """Bytes that tensors can have."""
        return int(self.memory_gib * GIB * self.usable)


ACCELERATORS = {
    "a100-40g": Accelerator(
        memory_gib=40,
        bandwidth_gbs=1555,
        tflops=312,
        fp32_tflops=19.5,
        link_gbs=300,
        network_gbs=25,
        host_memory_gib=1024,
        source="NVIDIA A100 data sheet (SXM); DGX A100 data sheet: eight 200 Gb/s adapters",
    ),
    "a100-80g": Accelerator(
        memory_gib=80,
        bandwidth_gbs=2039,
        tflops=312,
        fp32_tflops=19.5,
        link_gbs=300,
        network_gbs=25,
        host_memory_gib=2048,
        source="NVIDIA A100 data sheet (SXM); DGX A100 data sheet: eight 200 Gb/s adapters",
    ),
    "h100-80g": Accelerator(
        memory_gib=80,
        bandwidth_gbs=3350,
        tflops=989,
        fp32_tflops=67,
        link_gbs=450,
        network_gbs=50,
        host_memory_gib=2048,
        source="NVIDIA H100 data sheet (SXM); DGX H100 data sheet: eight 400 Gb/s adapters",
    ),
    "h200-141g": Accelerator(
        memory_gib=141,
        bandwidth_gbs=4800,
        tflops=989,
        fp32_tflops=67,
        link_gbs=450,
        network_gbs=50,
        host_memory_gib=2048,
        source="NVIDIA H200 data sheet (SXM); DGX H200 data sheet: eight 400 Gb/s adapters",
    ),
    "l40s-48g": Accelerator(
        memory_gib=48,
        bandwidth_gbs=864,
        tflops=362,
        fp32_tflops=91.6,
        link_gbs=32,
        network_gbs=12.5,
        source="NVIDIA L40S data sheet (PCIe 4.0 x16); network: 100 Gb/s per GPU, an assumption",
    ),
    "l4-24g": Accelerator(
        memory_gib=24,
        bandwidth_gbs=300,
        tflops=121,
        fp32_tflops=30.3,
        link_gbs=32,
        network_gbs=12.5,
        source="NVIDIA L4 data sheet (PCIe 4.0 x16); network: 100 Gb/s per GPU, an assumption",
    ),
}
_OVERRIDES = {f.name for f in dataclasses.fields(Accelerator)} - {"source"}


def accelerator(name: str, overrides: dict[str, Any]) -> Accelerator:
    """A GPU by name, with some of its figures replaced.

    Raises ValueError for an unknown GPU or figure, and names the known ones; also for a figure out of range.
    """
    if name not in ACCELERATORS:
        flags = ", ".join(f"--rates.{field}" for field in sorted(_OVERRIDES))
        raise ValueError(
            f"--gpu is {name!r}; known are {', '.join(ACCELERATORS)}. For another one take the nearest and "
            f"give its figures: {flags}"
        )
    for field, value in overrides.items():
        if field not in _OVERRIDES:
            raise ValueError(f"unknown figure rates.{field}; there are {', '.join(sorted(_OVERRIDES))}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"rates.{field} is {value!r}; it must be a number above 0")
    given = {field: float(value) for field, value in overrides.items()}
    for field in {"usable", "utilization"} & given.keys():
        if given[field] > 1:
            raise ValueError(f"rates.{field} is {given[field]}; it must be in (0, 1]")
    source = ACCELERATORS[name].source + "".join(f"; {f} {v:g} given" for f, v in given.items())
    return dataclasses.replace(ACCELERATORS[name], **given, source=source)
