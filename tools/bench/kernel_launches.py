"""The launches of Triton kernels in real calls, recorded on a CPU in place of running them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch


class Launch(NamedTuple):
    """One kernel with the arguments of a real call."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """Stands in for a kernel: notes the launch, runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, num_warps: int, num_stages: int | None = None, **constants):
            names = [p.name for p in self.kernel.params]
            arguments = dict(zip(names, args, strict=False)) | constants
            options = {"num_warps": num_warps} | ({"num_stages": num_stages} if num_stages else {})
            self.launches.append(Launch(self.kernel, arguments, options))

        return launch


def record(
    V: int, dtype: torch.dtype, lengths: tuple[int, ...] = (3, 3), lanes: int = 32, D: int = 16
) -> dict[str, list[Launch]]:
    """Case -> the launches of one call of it, with questions of these lengths in both streams."""
    from ibdistill.ops import launch
    from ibdistill.ops.cpu import products
    from ibdistill.ops.head_loss import triton_group, triton_plan, triton_teacher
    from ibdistill.ops.head_loss.arguments import (
        Call,
        MISettings,
        Stream,
        TeacherDistributions,
        TeacherStream,
        Weights,
    )
    from ibdistill.ops.head_loss.triton import compute
    from ibdistill.ops.vid import api
    from ibdistill.ops.vid import triton as vid_triton

    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    labels = torch.zeros(sum(lengths), dtype=torch.int64)
    hidden = Stream(torch.zeros(sum(lengths), D, dtype=dtype), labels, cu)
    logits = Stream(torch.zeros(sum(lengths), V, dtype=dtype), labels, cu)
    weight = torch.zeros(V, D, dtype=dtype)
    signal = TeacherStream(hidden.hidden)
    white = TeacherDistributions(signal, signal, weight)
    cases: dict[str, tuple[Any, ...]] = {
        "logits, CE + paper, max": (logits, MISettings(), None),
        "logits, CE + normalized, mean": (logits, MISettings("normalized", "mean"), None),
        "head, CE": (hidden, None, None),
        "head, CE + paper, max": (hidden, MISettings(), None),
        "head, CE + normalized, max": (hidden, MISettings("normalized"), None),
        "head, CE + paper, mean": (hidden, MISettings("paper", "mean"), None),
        "head, CE + normalized, max, teacher": (hidden, MISettings("normalized", pair="teacher"), white),
    }
    few = TeacherStream(None, labels[:, None], torch.ones(len(labels), 1))
    cases["head, CE + paper, max + KD top k"] = (hidden, MISettings(), TeacherDistributions(few, few))
    for divergence in ("forward", "reverse", "jsd"):
        teacher = dataclasses.replace(white, divergence=divergence)
        cases[f"head, CE + KD {divergence}"] = (hidden, None, teacher)
        cases[f"head, CE + paper, max + KD {divergence}"] = (hidden, MISettings(), teacher)
    out = {}
    capped = dataclasses.replace(white, softcap=30.0)
    cases["head, soft-capped, CE + paper, max + KD"] = (hidden, MISettings(), capped)
    modules = (triton_plan, triton_group, triton_teacher, vid_triton)
    with recorded(*modules) as launches, mock.patch.object(launch, "LANES", lanes):
        for case, (stream, mi, teacher) in cases.items():
            cap = None if teacher is None else teacher.softcap
            call = Call(stream, stream, Weights(1, 1, 1, 1, 1), mi, teacher, 32 << 20, cap)
            head = None if case.startswith("logits") else weight
            compute(call, head, None, [True, True, head is not None, False])
            out[case], launches[:] = list(launches), []
        # as on a GPU: the product in the states' dtype
        with mock.patch.object(products, "multiplies_natively", lambda *_: True):
            for case, width in (("VID, D_t = 1024", 1024), ("VID, D_t = 768", 768)):
                vector, states = torch.zeros(width), torch.zeros(sum(lengths), width, dtype=dtype)
                arguments = (hidden.hidden, torch.zeros(width, D, dtype=dtype), vector, vector, states)
                api.compute(*arguments, vid_triton.absorb, 32 << 20, [True] * 4)
                out[case], launches[:] = list(launches), []
    return out


def record_attention(dtype: torch.dtype = torch.bfloat16, T: int = 96, D: int = 64) -> list[Launch]:
    """The launches of T5's self-attention in training, in an encoder and in a decoder, of padded rows and of
    packed ones, each once."""
    from ibdistill.ops.biased_attention import api, kernels
    from ibdistill.ops.packed_attention import as_mask

    query = torch.zeros(2, T, 3, D, dtype=dtype).transpose(1, 2).requires_grad_()
    bias, mask = torch.zeros(3, 2 * T - 1, requires_grad=True), torch.ones(2, T, dtype=torch.bool)
    with recorded(kernels) as launches, mock.patch.object(api, "choose", lambda *_: "triton"):
        for seen, causal in ((mask, False), (None, True)):
            out = api.biased_attention(query, query, query, bias, mask=seen, causal=causal, rate=0.1)
            out.backward(torch.zeros_like(out))
        row, lengths = query[:1], as_mask(torch.tensor([T]))
        for causal in (False, True):
            out = api.biased_attention(row, row, row, bias, lengths=lengths, causal=causal, rate=0.1)
            out.backward(torch.zeros_like(out))
    return list({key_of(x): x for x in launches}.values())


def record_gates(dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """The launches of the activations of T5's and Llama's feed-forward layers in training."""
    from ibdistill.ops.gates import api
    from ibdistill.ops.gates import triton as gates_triton

    gate = torch.zeros(2, 1024, dtype=dtype, requires_grad=True)
    with recorded(gates_triton) as launches, mock.patch.object(api, "choose", lambda *_: "triton"):
        for activation, up, rate in (("gelu", gate, 0.1), ("silu", gate, 0.0), ("relu", None, 0.1)):
            out = api.activate(gate, up, activation=activation, rate=rate)
            out.backward(torch.zeros_like(out))
    return launches


@contextlib.contextmanager
def recorded(*modules: Any) -> Iterator[list[Launch]]:
    """The launches of the modules' kernels, none of which run."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                recorder = Recorder(getattr(module, name), launches)
                stack.enter_context(mock.patch.object(module, name, recorder))
        yield launches


def key_of(launch: Launch) -> tuple:
    """Launches with the same key are one compilation."""
    return launch.kernel.__name__, str(constants_of(launch)), shapes_of(launch)


def constants_of(launch: Launch) -> dict[str, Any]:
    return {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}


def shapes_of(launch: Launch) -> tuple:
    """What the compiler tells two launches with the same constants apart by."""
    key = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            key.append((str(value.dtype), value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not parameter.is_constexpr and not parameter.do_not_specialize:
            key.append((value % 16 == 0, value == 1))
    return tuple(key)
