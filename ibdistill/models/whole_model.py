"""The trained model in one piece, whatever ZeRO does to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from torch import nn

from ibdistill.models.merging import merged


class WholeModel:
    """Gives the trained model in one piece, for decoding and export, whatever ZeRO does to it.

    Under ZeRO-3 every rank collects a copy, one parameter at a time, and drops it afterwards.
    This takes the memory of one more student during an evaluation. In return decoding needs no
    all-gather per token, ranks may decode unequal shares, and the engine's hooks and trace are
    left alone.
    """

    def __init__(self, model: nn.Module, *, sharded: bool) -> None:
        """`sharded`: the engine will partition `model`, but has not done so yet."""
        self._model = model
        self._skeleton = _skeleton(model) if sharded else None

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, with adapters merged as in the export. Collective under ZeRO-3."""
        model = self._model if self._skeleton is None else self._collect()
        model = merged(model, in_place=self._skeleton is not None)
        model.eval()
        try:
            yield model
        finally:
            self._model.train()

    def _collect(self) -> nn.Module:
        model = copy.deepcopy(self._skeleton)
        state, whole = {}, {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if id(parameter) not in whole:  # a tied weight is one parameter under several names
                with deepspeed.zero.GatheredParameters([parameter]):
                    copied = parameter.detach().clone()
                whole[id(parameter)] = nn.Parameter(copied, parameter.requires_grad)
            state[name] = whole[id(parameter)]
        model.load_state_dict(state, strict=False, assign=True)
        # the skeleton's buffers, such as rotary frequencies, are still on the CPU, where the model was made
        return model.to(state[name].device)


def _skeleton(model: nn.Module) -> nn.Module:
    """The model's structure and buffers without its weights."""
    weights = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo=weights)
