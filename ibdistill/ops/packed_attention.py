"""Causal attention within each of the sequences that lie in one row, one behind the other.

A packed row is [1, heads, tokens, width] without any padding. Its sequences must not see each other, and a
mask of tokens x tokens says so at a cost that grows with the square of the row: eight sequences of 200 tokens
would compute 2.56 million products per head, of which 0.16 million are wanted. So here sequences are attended
to by themselves:

- On a GPU in half precision: torch's variable-length flash attention, one kernel for the whole row.
- Elsewhere: sequences of near-equal length are gathered into a padded block, one call of SDPA per block.
  Padding is on the right, where causal attention does not look, so that the blocks need no mask.

The sequences' lengths arrive where a model hands its attention mask on: [1, 1, 1, S] int32 in the host's
memory. transformers passes a mask of four dimensions to every layer as it is, and so does activation
checkpointing, whose second forward pass runs where no context of the first is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import varlen

from ibdistill.ops.copies import to_device

SLACK = 0.1
"""Sequences share a block if the shortest has at least 1 - SLACK of the longest one's tokens. Measured: see
`tools/bench/README.md`."""


def as_mask(lengths: Tensor) -> Tensor:
    """[1, 1, 1, S] int32: the lengths [S] of a packed row's sequences, in the place of an attention mask."""
    assert lengths.device.type == "cpu"  # the host reads them in each layer
    return lengths.to(torch.int32)[None, None, None]


def is_packed(mask: Tensor | None) -> bool:
    """Whether an attention mask is the lengths of a packed row (`as_mask`)."""
    return mask is not None and mask.dtype == torch.int32


def packed_attention(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Causal attention of a packed row's sequences, each by itself: [1, T, H, D].

    Args:
        attend: causal attention of a padded block, [b, H, L, D] -> [b, L, H, D]; its last argument is a mask
            [1, 1, L, L], True where a position is seen, or None for plain causal attention.
        query: [1, H, T, D]; the sequences lie one behind the other.
        key: [1, H_kv, T, D], where H_kv divides H.
        value: as `key`.
        lengths: as `as_mask` gives them; they sum to T.
        scale: what the products of queries and keys are multiplied with.
        dropout: rate at which `attend` drops weights; the variable-length kernel has no dropout.
        window: a position sees itself and the `window` - 1 positions before it; None: all before it.
    """
    sizes = tuple(lengths.flatten().tolist())
    assert sum(sizes) == query.shape[2], "the lengths are those of another row"
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _varlen(query, key, value, sizes, scale, window)
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]  # [T, heads, D]
    blocks = []
    for index, longest in _blocks(sizes, query.device):
        # the places behind a sequence's end repeat its last token, and nothing reads what is computed there
        block = [part.index_select(0, index).unflatten(0, (-1, longest)).transpose(1, 2) for part in rows]
        mask = None if window is None or window >= longest else _band(longest, window, query.device)
        blocks.append(attend(*block, mask).flatten(0, 1))
    return torch.cat(blocks).index_select(0, _places(sizes, query.device))[None]


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the sequences that share a block: near-equal lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    for i in order:
        if found and lengths[i] >= (1 - SLACK) * lengths[found[-1][0]]:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    ends, longest = _ends(sizes, query.device), max(sizes)
    out = varlen.varlen_attn(
        *(part[0].transpose(0, 1).contiguous() for part in (query, key, value)),
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out[None]


# every layer of a model asks for the same row, and so does the backward pass under activation checkpointing
@lru_cache(maxsize=16)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> list[tuple[Tensor, int]]:
    """Each block's places in the row, [sequences * longest] int64, and the tokens of its longest sequence."""
    lengths = torch.tensor(sizes)
    starts = lengths.cumsum(0) - lengths
    found = []
    for group in groups(sizes):
        longest = sizes[group[0]]
        steps = torch.minimum(torch.arange(longest), lengths[group, None] - 1)
        found.append((to_device((starts[group, None] + steps).flatten(), device), longest))
    return found


@lru_cache(maxsize=16)
def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[T] int64: where the row's tokens are in the blocks, laid one behind the other."""
    places, offset = [torch.empty(0)] * len(sizes), 0
    for group in groups(sizes):
        longest = sizes[group[0]]
        for number, i in enumerate(group):
            places[i] = offset + number * longest + torch.arange(sizes[i])
        offset += len(group) * longest
    return to_device(torch.cat(places), device)


@lru_cache(maxsize=16)
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[S + 1] int32: 0 and the ends of the sequences."""
    return to_device(torch.tensor((0, *sizes)).cumsum(0).int(), device)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, length, length] bool: the positions that a position sees through its window."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)[None, None]
