"""The gradient of the head's weight in the Triton implementation: its values, and the bytes that it moves."""

import itertools
import os

import pytest
import torch
from head_loss_cases import make_head, make_stream
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")
from syncs import counted, no_kernels

from ibdistill.ops.head_loss import triton_weight
from ibdistill.ops.head_loss.api import MISettings, head_loss
from ibdistill.ops.head_loss.arguments import Call, Stream, TeacherDistributions, TeacherStream, Weights
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.head_loss.triton import compute
from ibdistill.ops.head_loss.triton_weight import GroupBuffer, adds_in_float32

in_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
    reason="set TRITON_INTERPRET=1 to run the kernels without a GPU",
)


@pytest.fixture
def wide_addmm():
    """torch's product of bfloat16 matrices that is added in float32, which exists for GPUs only."""

    def add(total, left, right, out_dtype, *, beta=1, alpha=1, out):
        assert total is out and out_dtype == out.dtype == torch.float32 and beta == alpha == 1
        return out.add_(left.float() @ right.float())

    def multiply(left, right, out_dtype, *, out):
        assert out_dtype == out.dtype == torch.float32
        return out.copy_(left.float() @ right.float())

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", add, "CPU")
    library.impl("mm.dtype_out", multiply, "CPU")
    adds_in_float32.cache_clear()
    yield
    library._destroy()
    adds_in_float32.cache_clear()


LENGTHS = [2, 3, 1, 0], [3, 9, 0, 2]
V = 37


@in_interpreter
@pytest.mark.parametrize(
    ("dtype", "D", "chunk_rows"),
    [
        (torch.bfloat16, 4, 5),
        (torch.bfloat16, 4, 20),
        (torch.bfloat16, 32, 5),
        (torch.float32, 4, 8),
        (torch.float32, 32, 8),
    ],
    ids=str,
)
def test_the_sum_of_kept_rows(generator, wide_addmm, dtype, D, chunk_rows):
    """D = 4: sums of several products; D = 32: one product of all rows."""
    streams = [make_stream(lengths, D, V, dtype=dtype, generator=generator) for lengths in LENGTHS]
    weight = make_head(D, V, dtype, generator=generator)[0].requires_grad_()
    settings = {"weights": Weights(0.7, 0.4, 1.3), "mi": MISettings()}
    size = chunk_rows * 48 * dtype.itemsize
    total, _ = head_loss(*streams, weight, **settings, impl="triton", chunk_bytes=size)
    (got,) = torch.autograd.grad(total, weight)
    double = [s._replace(hidden=s.hidden.double()) for s in streams]
    wanted = weight.detach().double().requires_grad_()
    total, _ = head_loss_reference(*double, wanted, **settings)
    (want,) = torch.autograd.grad(total, wanted)
    error = (got.double() - want).norm() / want.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), error


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("D", [4, 32])
def test_products_of_groups_add_up(generator, wide_addmm, monkeypatch, in_place, D):
    if not in_place:
        monkeypatch.setattr(triton_weight, "adds_in_float32", lambda *_: False)
    weight = torch.randn(V, D, generator=generator).bfloat16()
    counts = [3, 0, 5, 2, 4]
    buffer = GroupBuffer(weight, sum(counts), 5, 48, needs_weight=True)
    want = torch.zeros(V, D, dtype=torch.float64)
    for count in counts:
        buffer.place(count).fill_(9.0)  # logits that are walked over twice
        rows = buffer.place(count)
        rows.copy_(torch.randn(count, 48, generator=generator))
        hidden = torch.randn(count, D, generator=generator).bfloat16()
        want += rows[:, :V].double().T @ hidden.double()
        buffer.keep(hidden)
    got = buffer.weight_gradient()
    assert got.dtype == (torch.bfloat16 if D == 32 else torch.float32)
    rounded = 2e-2 if D == 32 or not in_place else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=rounded, atol=rounded)


def test_without_rows_or_without_a_gradient():
    weight = torch.ones(V, 4)
    assert not GroupBuffer(weight, 0, 5, 48, needs_weight=True).weight_gradient().any()
    buffer = GroupBuffer(weight, 9, 5, 48, needs_weight=False)
    buffer.place(5), buffer.keep(torch.ones(5, 4))
    assert buffer.weight_gradient() is None and len(buffer.buffer) == 5 and not buffer.filled


class Traffic(TorchDispatchMode):
    """Bytes that operations read from and write to matrices of the head's size, its own weight left out."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.moved = weight, 0

    def _size(self, x) -> int:
        mine = isinstance(x, torch.Tensor) and x.shape == self.weight.shape and x is not self.weight
        return x.numel() * x.element_size() if mine else 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.__name__.split(".")[0]
        if name in ("detach", "empty_like", "new_empty", "fill_"):  # tests fill empty memory
            return out
        read = args[1:] if name in ("copy_", "zero_") else args  # these do not read what they write
        self.moved += sum(map(self._size, read)) + self._size(out)
        return out


def moved_by(rows: int, D: int, V: int, *, with_teacher: bool) -> float:
    """Bytes per entry of the head that its gradient moves, in bfloat16, at the default memory for logits."""
    new = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    half = rows // 2
    cu = torch.tensor([0, *itertools.accumulate([half // 16] * 16)], dtype=torch.int32)
    labels = torch.empty(half, dtype=torch.int64, device="meta")
    streams = [Stream(new(half, D), labels, cu) for _ in range(2)]
    weight = new(V, D)
    targets = [TeacherStream(new(half, 32)) for _ in range(2)]
    teacher = TeacherDistributions(*targets, new(V, 32)) if with_teacher else None
    call = Call(*streams, Weights(1, 1, 1, 1, 1), None, teacher, 256 << 20, None)
    with counted(), no_kernels(), Traffic(weight) as traffic:
        compute(call, weight, None, [True, True, True, False])
    return traffic.moved / weight.numel()


def test_bytes_that_the_gradient_of_qwens_head_moves(monkeypatch):
    """Qwen2.5-0.5B with a distribution of a teacher's. Commit a36f4eb moved 82 bytes per entry: 11.2 GB."""
    monkeypatch.setattr(triton_weight, "adds_in_float32", lambda *_: True)
    assert moved_by(2304, 896, 151_936, with_teacher=True) == 4 + 2 * 8 + 6
    assert moved_by(1792, 896, 151_936, with_teacher=True) == 2
    monkeypatch.setattr(triton_weight, "adds_in_float32", lambda *_: False)
    # six products in bfloat16, written, read and added; the first is copied
    assert moved_by(2304, 896, 151_936, with_teacher=True) == 6 * 2 + (2 + 4) + 5 * (2 + 8) + 6
