"""What the tests of `ops.gates` share."""

import torch
from torch.nn import functional as F

from ibdistill.ops.dropout_hash import ROW, draw, factor, keep
from ibdistill.ops.gates.api import activate

FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: F.relu(x),
}


def reference(gate, up, activation, rate, seed):
    """`activate` in single operations, with the mask that `activate` draws after this seed."""
    torch.manual_seed(seed)
    word, level, _ = draw(rate, gate.device)
    out = FORMULAS[activation](gate) * (1 if up is None else up)
    if not level:
        return out
    n = gate.numel()
    mask = keep(word, torch.arange(-(-n // ROW))[:, None], torch.arange(ROW), level).flatten()[:n]
    assert 0 < mask.sum() < n or n < 20
    return out * mask.view(gate.shape) * factor(level)


def results(inputs, activation, rate, impl):
    """[out, gradients] of ours, and of the reference in float64."""
    torch.manual_seed(11)
    up = inputs[1] if len(inputs) > 1 else None
    upstream = torch.randn(inputs[0].shape, dtype=torch.float64)
    torch.manual_seed(4)
    out = activate(inputs[0], up, activation=activation, rate=rate, impl=impl)
    ours = [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = reference(exact[0], exact[1] if len(exact) > 1 else None, activation, rate, seed=4)
    return ours, [out, *torch.autograd.grad(out, exact, upstream)]


def make(shape, gated, dtype):
    generator = torch.Generator().manual_seed(0)
    values = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(1 + gated)]
    return [x.to(dtype).requires_grad_() for x in values]
