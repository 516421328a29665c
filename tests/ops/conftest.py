"""Uninitialised memory is NaN in every test here, so that reading it can't go unnoticed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    def poison(allocate):
        def wrapped(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if torch.compiler.is_compiling():
                return out
            return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(77)

        return wrapped

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
