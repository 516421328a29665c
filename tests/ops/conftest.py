"""Uninitialised memory is NaN in every test here, so that reading it can't go unnoticed."""

import functools
import os
from dataclasses import replace
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
    make a table of numpy's types for every operation, in which it looks one up; describe the same few shapes
    anew for every value; and compute again in int64 what is added or multiplied in integers, to find an
    overflow of which it says nothing, as its option `debug` is off.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    scope = patch_language(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)  # by scalar types, as others cannot be a key
    interpreter._get_np_dtype = lambda kind: (look_up if kind.scalar.is_ptr() else known)(kind.scalar)
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    with pytest.MonkeyPatch.context() as patch:
        describe_shapes_once(patch, language.core)
        yield
    interpreter.interpreter_builder.options = options
    interpreter._patch_lang, interpreter._get_np_dtype = patch_language, look_up
    scope.restore()


def describe_shapes_once(patch: pytest.MonkeyPatch, core) -> None:
    """Let blocks and their types of the same shape share what describes it, which nobody changes."""
    of_types, of_tensors = {}, {}
    make_type, make_tensor, is_equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__

    def block_type(self, element_ty, shape):
        key = tuple([core._unwrap_if_constexpr(size) for size in shape])
        if key not in of_types:
            make_type(self, element_ty, shape)
            of_types[key] = self.shape, self.numel, str(self.shape)
        self.shape, self.numel, text = of_types[key]
        self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"

    def tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[key] = self.shape, self.numel
        self.shape, self.numel = of_tensors[key]
        self.handle, self.type, self.dtype = handle, type, type.scalar

    patch.setattr(core.block_type, "__init__", block_type)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(core.dtype, "__eq__", lambda self, other: self is other or is_equal(self, other))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(generator):
    """Two streams of every awkward length, and a head, in fp64."""
    predict = make_stream(PREDICT, D, V, generator=generator)
    explain = make_stream(EXPLAIN, D, V, generator=generator)
    return predict, explain, *make_head(D, V, generator=generator)
