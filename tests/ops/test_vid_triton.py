"""VID's Triton pass, in Triton's interpreter on a CPU, against autograd in float64."""

import os

import pytest
import torch
from test_vid import evaluate, make, rms

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("set TRITON_INTERPRET=1 to run the kernels without a GPU", allow_module_level=True)

from ibdistill.ops.cpu import products
from ibdistill.ops.vid.api import vid_loss
from ibdistill.ops.vid.reference import vid_loss_reference


@pytest.mark.parametrize("N, D, D_t", [(0, 3, 5), (1, 1, 1), (7, 3, 5), (16, 8, 32), (35, 4, 1030)])
@pytest.mark.parametrize("chunk_rows", [3, 20, 1000])
def test_equals_autograd(N, D, D_t, chunk_rows, generator):
    inputs = make(N, D, D_t, generator, torch.float32)
    got = evaluate(vid_loss, inputs, -1.7, impl="triton", chunk_bytes=chunk_rows * D_t * 4)
    want = evaluate(vid_loss_reference, [x.double() for x in inputs], -1.7)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(got[1], want[1], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)])
def test_subsets_of_inputs_requiring_grad(needs, generator):
    inputs = make(6, 3, 5, generator, torch.float32)
    needs = tuple(map(bool, needs))
    got = evaluate(vid_loss, inputs, 0.3, needs, impl="triton")
    torch.testing.assert_close(got, evaluate(vid_loss_reference, inputs, 0.3, needs))


def test_teacher_states_are_a_strided_view(generator):
    inputs = make(6, 3, 10, generator, torch.float32)
    for view in (inputs[1][:, :5], inputs[1][:, ::2]):
        case = [inputs[0], view, *(x[:5] for x in inputs[2:])]
        torch.testing.assert_close(vid_loss(*case, impl="triton"), vid_loss_reference(*case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager_in_its_own_dtype(dtype, generator, monkeypatch):
    # as on a GPU: products in the low dtype
    monkeypatch.setattr(products, "multiplies_natively", lambda *_: True)
    inputs = make(65, 24, 40, generator, dtype)
    truth = evaluate(vid_loss_reference, [x.double() for x in inputs], 1.3)
    eager = evaluate(vid_loss_reference, inputs, 1.3)
    ours = evaluate(vid_loss, inputs, 1.3, impl="triton", chunk_bytes=20 * 40 * 2)
    assert rms(ours[0], truth[0]) <= rms(eager[0], truth[0]) + 1e-3
    for a, b, t in zip(ours[1], eager[1], truth[1], strict=True):
        # Triton's interpreter cuts float32 to bfloat16 off where hardware rounds: twice the error
        assert t is None or (a.dtype == dtype and rms(a, t) <= rms(b, t) + 3e-3)


def test_bit_reproducible(generator):
    inputs = make(40, 8, 24, generator, torch.float32)
    runs = [evaluate(vid_loss, inputs, impl="triton", chunk_bytes=18 * 24 * 4) for _ in range(2)]
    for a, b in zip([runs[0][0], *runs[0][1]], [runs[1][0], *runs[1][1]], strict=True):
        assert a is None or torch.equal(a, b)


def test_refuses_float64(generator):
    with pytest.raises(ValueError, match="impl = 'triton' can't run: it has no float64"):
        vid_loss(*make(3, 2, 4, generator), impl="triton")
