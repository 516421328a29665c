"""The kernels of attention with a bias, in Triton's interpreter on a CPU, against autograd in float64."""

import os

import pytest
import torch
from biased_attention_cases import CASES, PACKED, evaluate, make, make_packed, packed_truth, truth

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("set TRITON_INTERPRET=1 to run the kernels without a GPU", allow_module_level=True)

from ibdistill.ops.biased_attention import biased_attention
from ibdistill.ops.biased_attention import triton as in_triton


@pytest.fixture(autouse=True)
def blocks_of_16(monkeypatch):
    """Small blocks, so that small cases have several."""
    monkeypatch.setattr(in_triton, "block_of", lambda width, itemsize: 16)


@pytest.mark.parametrize("case", CASES)
def test_equals_autograd(case, generator):
    inputs, mask, causal = make(case, generator, torch.float32)
    rate = 0.3 if CASES[case][3] % 2 else 0.0
    want = truth(case, inputs, mask, causal, rate, seed=3)
    torch.manual_seed(3)
    got = evaluate(biased_attention, inputs, mask=mask, causal=causal, rate=rate, impl="triton")
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("case", PACKED)
def test_packed_rows_equal_autograd_of_each_sequence(case, rate, generator):
    inputs, lengths, causal = make_packed(case, generator, torch.float32)
    want = packed_truth(case, inputs, rate, seed=3)
    torch.manual_seed(3)
    got = evaluate(biased_attention, inputs, lengths=lengths, causal=causal, rate=rate, impl="triton")
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 1024])
def test_however_the_batch_is_split_for_the_biass_gradient(programs, generator, monkeypatch):
    monkeypatch.setattr(in_triton, "PROGRAMS", programs)
    case = "fewer queries than keys"
    inputs, mask, causal = make(case, generator, torch.float32)
    runs = [evaluate(biased_attention, inputs, mask=mask, causal=causal, impl="triton") for _ in range(2)]
    for first, second, exact in zip(*runs, truth(case, inputs, mask, causal), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), exact, rtol=1e-4, atol=1e-5)


def test_float16_is_close(generator):
    # in bfloat16 the interpreter would multiply the bits as integers
    case = "an encoder's padding"
    inputs, mask, causal = make(case, generator, torch.float16)
    got = evaluate(biased_attention, inputs, mask=mask, causal=causal, impl="triton")
    for mine, exact, x in zip(got, truth(case, inputs, mask, causal), [inputs[0], *inputs], strict=True):
        assert mine.dtype == x.dtype
        assert (mine.double() - exact).norm() <= 0.002 * exact.norm()


def test_a_frozen_bias_costs_no_kernel(generator, monkeypatch):
    inputs, mask, causal = make("whole blocks", generator, torch.float32)
    monkeypatch.setattr(in_triton.kernels, "bias_kernel", None)
    out = biased_attention(*inputs[:3], inputs[3].detach(), impl="triton")
    want = truth("whole blocks", inputs, mask, causal)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()
    for mine, exact in zip(torch.autograd.grad(out, inputs[:3], upstream), want[1:4], strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)
