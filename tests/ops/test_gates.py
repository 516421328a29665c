"""The activation with gate and dropout in torch, against single operations in float64."""

import pytest
import torch
from gates_cases import make, results

from ibdistill.ops.gates import activate


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5, 7), (2, 1025)])
def test_values_and_gradients(shape, activation, gated, rate):
    ours, exact = results(make(shape, gated, torch.float64), activation, rate, "auto")
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_dtypes_are_rounded_once(dtype):
    for gated in (False, True):
        ours, exact = results(make((9, 64), gated, dtype), "silu", 0.1, "auto")
        for mine, true in zip(ours, exact, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(
                mine.double(), true, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(torch.float32).eps
            )


def test_only_the_inputs_are_kept_and_of_a_relu_only_the_result():
    gate, up = make((8, 32), True, torch.float32)
    for given, tensors in ((dict(activation="gelu"), 2), (dict(activation="relu", up=None), 1)):
        sizes = {}
        keep = lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t  # noqa: E731, B023
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = activate(gate, **{"up": up, "rate": 0.1} | given)
        assert sum(sizes.values()) == tensors * out.nbytes + 8  # the seed
        assert (out.data_ptr() in sizes) == (tensors == 1)


def test_bad_arguments_are_named():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"up must be torch.float32 \[3, 4\] as gate is, not .* \[4, 3\]"):
        activate(x, x.T, activation="silu")
    with pytest.raises(ValueError, match="activation"):
        activate(x, activation="swish")
