"""What `head_loss.py` measures: the same loss in every implementation, on the same inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ibdistill.ops.head_loss.api import MISettings, Stream, Weights, head_loss, logits_loss
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.vid.api import vid_loss
from ibdistill.ops.vid.reference import vid_loss_reference


class Sizes(NamedTuple):
    """What is measured."""

    B: int
    predict: int
    explain: int
    D: int
    V: int
    D_t: int
    dtype: torch.dtype
    device: str
    entry: str
    mi: MISettings | None

    @property
    def tokens(self) -> int:
        return self.B * (self.predict + self.explain)


def make(sizes: Sizes):
    """Streams and head, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    B, D, V, device = sizes.B, sizes.D, sizes.V, sizes.device
    streams = []
    for length in (sizes.predict, sizes.explain):
        hidden = torch.randn(B * length, D, generator=generator).to(device, sizes.dtype).requires_grad_()
        labels = torch.randint(V, (B * length,), generator=generator).to(device)
        streams.append(Stream(hidden, labels, torch.arange(0, B * length + 1, length, dtype=torch.int32)))
    weight = (0.05 * torch.randn(V, D, generator=generator)).to(device, sizes.dtype).requires_grad_()
    return *streams, weight


def eager(
    predict: Stream, explain: Stream, weight, *, weights: Weights, mi: MISettings | None, B: int, given: bool
):
    """What a trainer writes: one product, cross entropies, pool, cross entropy. Equal lengths, no loops."""
    losses, pooled = [], []
    for stream in (predict, explain):
        logits = stream.hidden if given else stream.hidden @ weight.T
        losses.append(torch.nn.functional.cross_entropy(logits, stream.labels, reduction="sum"))
        if mi is not None:
            p = torch.softmax(logits, -1).view(B, -1, logits.shape[-1])
            pooled.append(p.max(1).values if mi.pool == "max" else p.mean(1))
    total = weights.ce_predict * losses[0] + weights.ce_explain * losses[1]
    if mi is None:
        return total
    target, estimate = pooled[0].detach(), pooled[1]
    if mi.estimator == "paper":
        return total + weights.mi * torch.nn.functional.cross_entropy(estimate, target, reduction="sum")
    target, estimate = target / target.sum(-1, keepdim=True), estimate / estimate.sum(-1, keepdim=True)
    return total - weights.mi * (target * estimate.log()).sum()


def implementations(sizes: Sizes) -> dict:
    """Name -> a function that computes the total, and what it is differentiated for."""
    torch._dynamo.reset()
    return _vid(sizes) if sizes.entry == "vid" else _head(sizes)


def _head(sizes: Sizes) -> dict:
    predict, explain, weight = make(sizes)
    B, mi, given = sizes.B, sizes.mi, sizes.entry == "logits"
    weights = Weights(1 / len(predict.labels), 1 / len(explain.labels), 0.1 / B)
    if given:
        predict, explain = (
            s._replace(hidden=(s.hidden @ weight.T).detach().requires_grad_()) for s in (predict, explain)
        )

    def ours(impl):
        if given:
            return lambda: logits_loss(predict, explain, weights=weights, mi=mi, impl=impl)[0]
        return lambda: head_loss(predict, explain, weight, weights=weights, mi=mi, impl=impl)[0]

    def plain(function):
        return lambda: function(predict, explain, weight, weights=weights, mi=mi, B=B, given=given)

    out = {"eager": plain(eager), "compile": plain(torch.compile(eager)), "torch": ours("torch")}
    if not given:
        out["twin"] = lambda: head_loss_reference(predict, explain, weight, weights=weights, mi=mi)[0]
    if sizes.device == "cuda":
        out["triton"] = ours("triton")
    leafs = [predict.hidden, explain.hidden] + ([] if given else [weight])
    return {name: (function, leafs) for name, function in out.items()}


def _vid(sizes: Sizes) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (sizes.tokens, sizes.D),
        (sizes.tokens, sizes.D_t),
        (sizes.D_t, sizes.D),
        (sizes.D_t,),
        (sizes.D_t,),
    ]
    inputs = [torch.randn(s, generator=generator).to(sizes.device, sizes.dtype) for s in shapes]
    leafs = [x.requires_grad_() for i, x in enumerate(inputs) if i != 1]
    compiled = torch.compile(vid_loss_reference)
    out = {
        "eager": lambda: vid_loss_reference(*inputs),
        "compile": lambda: compiled(*inputs),
        "torch": lambda: vid_loss(*inputs, impl="torch"),
    }
    if sizes.device == "cuda":
        out["triton"] = lambda: vid_loss(*inputs, impl="triton")
    return {name: (function, leafs) for name, function in out.items()}


def products(sizes: Sizes):
    """The matrix products of one pass, and nothing else: backward or not -> a function."""
    width = sizes.D_t if sizes.entry == "vid" else sizes.V
    hidden, weight, z = (
        torch.randn(shape, device=sizes.device).to(sizes.dtype)
        for shape in ((sizes.tokens, sizes.D), (width, sizes.D), (sizes.tokens, width))
    )

    def run(backward: bool) -> None:
        torch.mm(hidden, weight.T, out=z)
        if backward:
            z @ weight
            z.T @ hidden

    return run
