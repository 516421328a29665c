"""The activation with gate and dropout in Triton's interpreter, against single operations in float64."""

import os

import pytest
import torch
from gates_cases import make, results

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("set TRITON_INTERPRET=1 to run the kernels without a GPU", allow_module_level=True)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 1025)])
def test_values_and_gradients(shape, activation, gated, rate):
    ours, exact = results(make(shape, gated, torch.float32), activation, rate, "triton")
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_bfloat16_is_rounded_once(activation):
    ours, exact = results(make((5, 300), True, torch.bfloat16), activation, 0.1, "triton")
    for mine, true in zip(ours, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), true, rtol=2 * torch.finfo(mine.dtype).eps, atol=1e-5)
