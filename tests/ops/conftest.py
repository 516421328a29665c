"""Uninitialised memory is NaN in every test here, so that reading it can't go unnoticed."""

import functools
import os
from types import SimpleNamespace

import pytest
import torch
from head_loss_cases import EXPLAIN, PREDICT, D, V, make_head, make_stream


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


@pytest.fixture(scope="session", autouse=True)
def interpreter_patches_once():
    """Let Triton's interpreter replace the functions of its language once.

    It would replace them anew for every launch and for every call from one kernel to another, which takes
    much of the time of small kernels. Once is enough, since everything is interpreted here. It would also
    make a table of numpy's types for every operation, in which it looks one up.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    scope = replace(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)  # by scalar types, as others cannot be a key
    interpreter._get_np_dtype = lambda kind: (look_up if kind.scalar.is_ptr() else known)(kind.scalar)
    yield
    interpreter._patch_lang, interpreter._get_np_dtype = replace, look_up
    scope.restore()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(generator):
    """Two streams of every awkward length, and a head, in fp64."""
    predict = make_stream(PREDICT, D, V, generator=generator)
    explain = make_stream(EXPLAIN, D, V, generator=generator)
    return predict, explain, *make_head(D, V, generator=generator)
