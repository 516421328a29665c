"""Check b: vid, the loss of given logits and the layers' operations against the same in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from accept.lines import Context
from accept.losses import DTYPES, judge
from ibdistill.ops import layers, packed_attention
from ibdistill.ops.biased_attention import biased_attention
from ibdistill.ops.biased_attention.reference import biased_attention_reference
from ibdistill.ops.gates import activate
from ibdistill.ops.head_loss.api import MISettings, Stream, Weights, logits_loss
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.vid.api import vid_loss
from ibdistill.ops.vid.reference import vid_loss_reference


class Operation(NamedTuple):
    """An operation in plain torch and in ours; each takes the arguments and gives a number."""

    arguments: Sequence[Tensor]
    plain: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    constant: tuple[int, ...] = ()
    """The arguments that get no gradient."""
    repeats: bool = True
    """Whether two runs give the same bits."""


Draw = Callable[..., Tensor]
"""Normal numbers of this shape on the device."""


def other_cases(context: Context) -> None:
    """Vid, the loss of given logits, and each operation of the layers, in bf16 and fp32."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(context.device)

    impl = "torch" if context.small else "triton"
    tokens, width = (33, 24) if context.small else (4099, 768)
    cases = layers_of(draw, tokens, width, impl) | attention_of(draw, tokens, impl, context.device)
    cases |= losses_of(draw, tokens, width, impl, context)
    for name, case in cases.items():
        for dtype in DTYPES:
            plain = values(case, case.plain, torch.float64, dtype), values(case, case.plain, dtype, dtype)
            ours = [values(case, case.ours, dtype, dtype) for _ in range(2)]
            title = f"{name}, {str(dtype).removeprefix('torch.')}"
            judge(context, title, *plain, *ours, dtype, repeatable=case.repeats)


def values(
    case: Operation, function: Callable[..., Tensor], kind: torch.dtype, rounded: torch.dtype
) -> list[Tensor]:
    """The function's value and gradients in the dtype `kind`, of arguments that are `rounded` first."""
    given = [x.to(rounded).to(kind).clone() for x in case.arguments]
    leaves = [x.requires_grad_() for i, x in enumerate(given) if i not in case.constant]
    total = function(*given)
    total.backward()
    return [total.detach(), *(leaf.grad for leaf in leaves)]


def layers_of(draw: Draw, tokens: int, width: int, impl: str) -> dict[str, Operation]:
    """Norm and gates, on states [tokens, width]."""
    wide = [draw(tokens, width), draw(tokens, width)]

    def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
        inverse = (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (weight * (x * inverse)).square().sum()

    def our_norm(x: Tensor, weight: Tensor) -> Tensor:
        return layers.rms_norm(x, weight, 1e-6).square().sum()

    def plain_gate(gate: Tensor, up: Tensor) -> Tensor:
        return (nn.functional.gelu(gate, approximate="tanh") * up).square().sum()

    def our_gate(gate: Tensor, up: Tensor) -> Tensor:
        return layers.gated_gelu(gate, up, 0.0).square().sum()

    gates = {
        f"{name} gate": Operation(
            wide,
            lambda gate, up, plain=plain: (plain(gate) * up).square().sum(),
            lambda gate, up, name=name: activate(gate, up, activation=name, impl=impl).square().sum(),
        )
        for name, plain in (("silu", nn.functional.silu), ("relu", nn.functional.relu))
    }
    return gates | {
        "norm": Operation([draw(tokens, width), draw(width)], plain_norm, our_norm),
        "gated GELU": Operation(wide, plain_gate, our_gate),
    }


def attention_of(draw: Draw, tokens: int, impl: str, device: torch.device) -> dict[str, Operation]:
    """T5's attention on a padded batch of one long and one short sequence, and a packed row of the same."""
    T, lengths = tokens // 4, (tokens // 4, tokens // 9)
    attended = [draw(2, 4, T, 64) for _ in range(3)]
    mask = (torch.arange(T)[None] < torch.tensor(lengths)[:, None]).to(device)
    row = [draw(1, heads, sum(lengths), 64) for heads in (4, 2, 2)]

    def biased(causal: bool, function: Callable, **more) -> Callable:
        seen = None if causal else mask
        return lambda q, k, v, bias: function(q / 8, k, v, bias, seen, causal, **more).square().sum()

    def biased_plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *rest) -> Tensor:
        return biased_attention_reference(q, k, v, bias.to(q.dtype), *rest)

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, bias: None = None) -> Tensor:
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, seen, is_causal=seen is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    def plain_packed(*x: Tensor) -> Tensor:
        parts = zip(*(part.split(lengths, 2) for part in x), strict=True)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return sum(attend(*part).square().sum() for part in parts)

    def our_packed(*x: Tensor) -> Tensor:
        masked = packed_attention.as_mask(torch.tensor(lengths))
        return packed_attention.packed_attention(attend, *x, masked, scale=64**-0.5).square().sum()

    found = {
        f"biased attention, {name}": Operation(
            [*attended, draw(4, 2 * T - 1)],
            biased(causal, biased_plain),
            biased(causal, biased_attention_in_fp32_bias, impl=impl),
        )
        for name, causal in (("masked", False), ("causal", True))
    }
    # the flash attention of packed rows adds gradients by atomics
    return found | {"packed attention": Operation(row, plain_packed, our_packed, repeats=False)}


def losses_of(draw: Draw, tokens: int, width: int, impl: str, context: Context) -> dict[str, Operation]:
    """The loss of given logits, and vid."""
    teacher, V = (40, 57) if context.small else (3584, 8191)
    lengths = tokens // 4, tokens // 9
    labels = torch.randint(V, (sum(lengths),), generator=torch.Generator().manual_seed(2)).to(context.device)
    cu = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    settings = {"mi": MISettings("normalized"), "weights": Weights(0.3, 0.01, 0.5)}

    def plain_logits(*x: Tensor) -> Tensor:
        head = torch.eye(V, dtype=x[0].dtype, device=context.device)
        streams = (Stream(part, labels, cu) for part in x)
        return head_loss_reference(*streams, head, dtype=x[0].dtype, **settings)[0]

    def our_logits(*x: Tensor) -> Tensor:
        return logits_loss(*(Stream(part, labels, cu) for part in x), impl=impl, **settings)[0]

    vid = [draw(tokens, width), draw(tokens, teacher), draw(teacher, width) * width**-0.5]
    vid += [draw(teacher), draw(teacher) * 0.1]
    scored = [draw(sum(lengths), V), draw(sum(lengths), V)]
    return {
        "given logits": Operation(scored, plain_logits, our_logits),
        "vid": Operation(vid, vid_loss_reference, lambda *x: vid_loss(*x, impl=impl), constant=(1,)),
    }


def biased_attention_in_fp32_bias(q, k, v, bias, seen, causal, *, impl: str) -> Tensor:
    """`biased_attention`, whose bias is in fp32 beside narrower states."""
    wide = bias if bias.dtype == torch.float64 else bias.float()
    return biased_attention(q, k, v, wide, mask=seen, causal=causal, impl=impl)
