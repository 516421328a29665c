"""Attention within each of the sequences that lie in one row, one behind the other.

A packed row is [1, heads, tokens, width] without any padding. Its sequences must not see each other, and a
mask of tokens x tokens says so at a cost that grows with the square of the row: eight sequences of 200 tokens
would compute 2.56 million products per head, of which 0.16 million are wanted. So here sequences are attended
to by themselves:

- On a GPU in half precision: torch's variable-length flash attention, one kernel for the whole row.
- Elsewhere: sequences of near-equal length are gathered into a padded block, one call of SDPA per block.
  Padding is on the right, where causal attention does not look; other attention gets a mask of the keys.

In cross-attention queries and keys lie in two rows, and sequence i of the one sees sequence i of the other.

The sequences' lengths arrive where a model hands its attention mask on: [1, 1, 2, S] int32 in the host's
memory, those of the queries and those of the keys. transformers passes a mask of four dimensions to every
layer as it is, and so does activation checkpointing, whose second forward pass runs where no context of the
first is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import varlen

from ibdistill.ops.copies import to_device

SLACK = 0.1
"""Sequences share a block if the shortest has at least 1 - SLACK of the longest one's tokens. Measured: see
`tools/bench/README.md`."""

Sizes = tuple[tuple[int, ...], tuple[int, ...]]
"""The lengths of a row's sequences: of their queries and of their keys. A sequence may have no queries."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def as_mask(queries: Tensor, keys: Tensor | None = None, *, is_part: bool = False) -> Tensor:
    """[1, 1, 2, S] int32, in the place of an attention mask: the lengths [S] of a packed row's sequences, and
    those of the sequences that they see, None: themselves. [1, 1, 3, S], with a third line that only says so,
    where the queries are a part of such a row (`is_part`)."""
    both = torch.stack([queries, queries if keys is None else keys, *[queries] * is_part])
    assert both.device.type == "cpu"  # the host reads them in each layer
    return both.to(torch.int32)[None, None]


def is_packed(mask: Tensor | None) -> bool:
    """Whether an attention mask is the lengths of a packed row (`as_mask`)."""
    return mask is not None and mask.dtype == torch.int32


def is_part(mask: Tensor) -> bool:
    """Whether a mask of `as_mask` goes with a part of its row."""
    return mask.shape[2] == 3


def sizes_of(mask: Tensor) -> Sizes:
    """What `as_mask` was given."""
    queries, keys = mask[0, 0, :2].tolist()
    return tuple(queries), tuple(keys)


def packed_attention(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    causal: bool = True,
    dropout: float = 0.0,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of a packed row's sequences, each by itself: [1, T, H, D].

    Args:
        attend: attention of a padded block, causal or not as `causal` says, [b, H, L, D] -> [b, L, H, D]. Its
            last arguments are a mask that broadcasts to [b, 1, L, L_k], True where a position is seen, or
            None: all (that causal attention sees); and the block's bias [1, H, L, L] or None.
        query: [1, H, T, D]; the sequences lie one behind the other.
        key: [1, H_kv, T_k, D], where H_kv divides H.
        value: as `key`.
        lengths: as `as_mask` gives them; they sum to T and T_k.
        scale: what the products of queries and keys are multiplied with.
        causal: whether a position sees itself and those before it only; each sequence then has as many keys
            as queries.
        dropout: rate at which `attend` drops weights; the variable-length kernel has no dropout.
        window: a position sees itself and the `window` - 1 positions before it; None: all before it.
        bias: [H, n] for the n distances of `distances`, added to the scores; the kernel takes none.
    """
    sizes = sizes_of(lengths)
    assert (sum(sizes[0]), sum(sizes[1])) == (query.shape[2], key.shape[2]), "the lengths are of another row"
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout and bias is None:
        return _varlen(query, key, value, sizes, scale, causal, window)
    plan, outs = _plan(sizes, query.device), []
    # one gather for all blocks, because the gradient of each is as large as the row
    parts = [
        part[0]
        .transpose(0, 1)
        .index_select(0, index)
        .split([block.count * block.longest[side] for block in plan.blocks])
        for part, index, side in ((query, plan.queries, 0), (key, plan.keys, 1), (value, plan.keys, 1))
    ]
    biases = [None] * len(plan.blocks) if bias is None else _square(bias, plan)
    for block, own, *rows in zip(plan.blocks, biases, *parts, strict=True):
        mask = None if causal else block.mask
        if window is not None and window < block.longest[1]:
            mask = _band(block.longest[1], window, query.device)
        block_rows = (part.unflatten(0, (block.count, -1)).transpose(1, 2) for part in rows)
        outs.append(attend(*block_rows, mask, own).flatten(0, 1))
    return torch.cat(outs).index_select(0, plan.places)[None]


def distances(lengths: Tensor, device: torch.device) -> Tensor:
    """[n] int64: the key's place less the query's, in the order of `packed_attention`'s bias."""
    made = torch.cat(
        [
            (torch.arange(keys) - torch.arange(queries)[:, None]).flatten()
            for queries, keys in (block.longest for block in _plan(sizes_of(lengths), device).blocks)
        ]
    )
    return to_device(made, device)


def groups(sizes: Sizes) -> list[list[int]]:
    """The numbers of the sequences that share a block: near-equal lengths, the longest first."""
    queries, keys = sizes
    with_queries = [i for i, length in enumerate(queries) if length]
    return [group for like in _near(with_queries, queries) for group in _near(like, keys)]


def _near(numbers: list[int], lengths: tuple[int, ...]) -> list[list[int]]:
    """The sequences in groups of near-equal lengths, the longest first."""
    found: list[list[int]] = []
    for i in sorted(numbers, key=lambda i: -lengths[i]):
        if found and lengths[i] >= (1 - SLACK) * lengths[found[-1][0]]:
            found[-1].append(i)
        else:
            found.append([i])
    return found


@lru_cache(maxsize=32)  # every layer asks for the same rows
def ends(sizes: Sizes, device: torch.device) -> Tensor:
    """[2, S + 1] int32: 0 and the ends of the sequences' queries, and of their keys."""
    found = torch.tensor([(0, *part) for part in sizes]).cumsum(1)
    return to_device(found.to(torch.int32), device)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sizes,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    before = -1 if window is None else window - 1
    out = varlen.varlen_attn(
        *(part[0].transpose(0, 1).contiguous() for part in (query, key, value)),
        *ends(sizes, query.device),
        *map(max, sizes),
        scale=scale,
        window_size=(before, 0 if causal else -1),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out[None]


@dataclass(frozen=True)
class _Block:
    count: int
    longest: tuple[int, int]
    """Most queries and keys of its sequences."""
    mask: Tensor | None
    """[count, 1, 1, keys] bool, True at a sequence's own keys; None where all have as many."""


@dataclass(frozen=True)
class _Plan:
    """How a row's sequences lie in blocks."""

    blocks: list[_Block]
    queries: Tensor
    """[places] int64: where the blocks' queries are in the row. The places behind a sequence's end repeat its
    last token, and nothing reads what is computed there."""
    keys: Tensor
    places: Tensor
    """[T] int64: where the row's queries are in the blocks, laid one behind the other."""


# every layer of a model asks for the same rows, and so does the backward pass under activation checkpointing
@lru_cache(maxsize=32)
def _plan(sizes: Sizes, device: torch.device) -> _Plan:
    lengths = torch.tensor(sizes)
    starts = lengths.cumsum(1) - lengths
    blocks, gathered, offset = [], ([], []), 0
    places = [torch.empty(0, dtype=torch.int64)] * len(sizes[0])
    for group in groups(sizes):
        longest = lengths[:, group].amax(1).tolist()
        for side in range(2):
            steps = torch.minimum(torch.arange(longest[side]), lengths[side, group, None] - 1)
            gathered[side].append((starts[side, group, None] + steps).flatten())
        own = torch.arange(longest[1]) < lengths[1, group, None]
        mask = None if own.all() else to_device(own[:, None, None], device)
        blocks.append(_Block(len(group), tuple(longest), mask))
        for number, i in enumerate(group):
            places[i] = offset + number * longest[0] + torch.arange(sizes[0][i])
        offset += len(group) * longest[0]
    return _Plan(blocks, *(to_device(torch.cat(part), device) for part in (*gathered, places)))


def _square(bias: Tensor, plan: _Plan) -> list[Tensor]:
    """[1, H, L, L_k] of each block."""
    parts = bias.split([queries * keys for queries, keys in (block.longest for block in plan.blocks)], 1)
    return [p.unflatten(1, block.longest)[None] for p, block in zip(parts, plan.blocks, strict=True)]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, length, length] bool: the positions that a position sees through its window."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)[None, None]
