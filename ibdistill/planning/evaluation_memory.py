"""Bytes that an evaluation and the export hold beside the model states."""

from __future__ import annotations

from ibdistill.models.merging import adapted_layers
from ibdistill.planning.dryrun import Skeleton
from ibdistill.runtime.hardware import DTYPES


def copied_bytes(student: Skeleton, precision: str, stage: int, *, in_4bit: bool = False) -> int:
    """Bytes on each rank of the copies that `models.whole_model` makes of a student, at most.

    ZeRO `stage` 3 collects the whole student, and weights in 4 bits become whole again. Otherwise the weights
    that have adapters are copied. They are merged in fp32, one layer at a time (`models.merging`): the
    weight, the product of its adapters, and that product scaled, with 4 bytes per element each.
    """
    layers = adapted_layers(student.model)
    weights = [layer.get_base_layer().weight.numel() for layer in layers]
    copied = sum(p.numel() for layer in layers for p in layer.parameters())
    if stage == 3 or in_4bit:
        copied = sum(n for n, _ in student.sizes())
    return DTYPES[precision].itemsize * copied + 3 * 4 * max(weights, default=0)
