"""Sequences that several ranks share (Ulysses: Jacobs et al., 2023, arXiv 2309.14509).

With `optim.sequence_parallel` P, every P neighbouring ranks are a group that reads one micro-batch. The data
plan deals micro-batches to groups as it deals them to ranks otherwise. A micro-batch is one packed row,
filled up to a multiple of P, of which each rank takes a P-th (`part_of`): its tokens with their positions,
and the targets and question tokens whose states are computed there. Everything but attention works on single
tokens, so a rank computes it for its part alone. Attention exchanges twice (`attend`): a rank gives away its
tokens of the other ranks' heads and gets all tokens of its own heads, attends over the whole row, and gives
the results back. Targets are shifted before the row is cut, so no rank needs a token of its neighbour. A
teacher in placement replica scores the same part in the same way. Decoding and sampling work on whole
sequences, each rank by itself, as without groups. Ranks draw different dropout masks, so only without dropout
is a step that of one rank.

Losses are sums over tokens, divided by counts of the whole step that all ranks know; so a rank's loss is the
sum over its own tokens, that of `vid` and of distillation too. The gradient of all ranks' losses together is
the sum over ranks of what each computes, because the backward pass of an exchange is an exchange, which
brings a rank what the others' losses say about its tokens. DeepSpeed averages over all ranks and
`train.train_step` multiplies with their number, as without groups; ZeRO shards over all ranks too, and
checkpoints are as without groups. DeepSpeed's own `UlyssesSPAttentionHF`
(`runtime/sequence_parallel/ulysses_sp.py`) is not used: it replaces the attention of the whole process,
decoding included, reads a packed row's sequences from its position ids, and averages gradients over groups,
whose losses are means. Here the cut has to follow packed targets and the mask holds the lengths. What remains
is one collective.

What is refused: pooled terms, which need all tokens of a question on one rank, and weights of tokens by the
rest of their text (`config.consistency`); encoder-decoder models, whose rows are of two kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from ibdistill.data.batches import Batch
from ibdistill.models.architectures import DECODER_ONLY, FAMILIES

_group: dist.ProcessGroup | None = None


def start(ranks: int) -> None:
    """Form groups of so many neighbouring ranks, or none of 1. Collective."""
    global _group
    _group = None
    for first in range(0, dist.get_world_size(), ranks) if ranks > 1 else ():
        members = list(range(first, first + ranks))
        group = dist.new_group(members)
        _group = group if dist.get_rank() in members else _group


def is_on() -> bool:
    """Whether ranks share sequences."""
    return _group is not None


def check_model(setting: str, name: str, config: Any, ranks: int) -> None:
    """Raise ValueError unless so many ranks can share a model's sequences and heads.

    Several ranks may have the same head of keys and values. `config`: of transformers, or with its fields.
    """
    if ranks == 1:
        return
    if FAMILIES[config.model_type].family != DECODER_ONLY:
        raise ValueError(
            f"optim.sequence_parallel is {ranks}, and {setting} {name!r:.100} is an encoder-decoder model; "
            "only decoder-only models' sequences are shared, so leave it out"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for kind, number, fits in (
        ("attention heads", heads, heads % ranks == 0),
        ("key and value heads", kv_heads, kv_heads % ranks == 0 or ranks % kv_heads == 0),
    ):
        if not fits:
            raise ValueError(
                f"optim.sequence_parallel is {ranks}, and {setting} {name!r:.100} has {number} {kind}, which "
                "the ranks of a group share out; take a number that divides them"
            )


def check_layouts(teacher: str, ours: dict[str, int | None], theirs: dict[str, int | None]) -> None:
    """Raise ValueError if ranks share sequences and the teacher reads other tokens around a question."""
    if is_on() and ours != theirs:
        raise ValueError(
            f"optim.sequence_parallel is above 1, and teacher.model {teacher!r:.100} puts {theirs} around a "
            f"question and the student {ours}, so their rows would not be cut at the same places; take a "
            "teacher with the student's own tokenizer settings"
        )


def part_of(batch: Batch) -> Batch:
    """This rank's part of a packed batch of a decoder-only model; all of it without groups.

    `row_lengths` stay those of the whole row, with what fills it up as a last sequence. `cu` counts the
    targets that are here: a question may have none.
    """
    if _group is None:
        return batch
    ranks, tokens = _group.size(), batch.input_ids.shape[1]
    filling = -tokens % ranks
    size = (tokens + filling) // ranks
    first = _group.rank() * size

    def cut(row: Tensor) -> Tensor:
        return pad(row, (0, filling))[:, first : first + size].contiguous()

    here = {name: (first <= p) & (p < first + size) for name, p in batch.positions.items()}
    question = batch.question_positions
    lengths = torch.cat([batch.row_lengths, batch.row_lengths.new_tensor([filling] if filling else [])])
    return replace(
        batch,
        ranks=ranks,
        input_ids=cut(batch.input_ids),
        attention_mask=cut(batch.attention_mask),
        position_ids=cut(batch.position_ids),
        row_lengths=lengths,
        question_positions=question[(first <= question) & (question < first + size)] - first,
        positions={name: p[here[name]] - first for name, p in batch.positions.items()},
        labels={name: labels[here[name]] for name, labels in batch.labels.items()},
        cu={name: pad(here[name].cumsum(0), (1, 0))[cu.long()].int() for name, cu in batch.cu.items()},
    )


def attend(
    whole: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row of which each rank of the group has an equal part: [1, t, H, D]. Collective.

    Args:
        whole: attention of a packed row, as transformers calls it.
        module: the layer, whose sizes are those of all heads.
        query: [1, H, t, D], the tokens of this rank; P ranks divide H.
        key: [1, H_kv, t, D]; where P is a multiple of H_kv, ranks share a head.
        value: as `key`.
        lengths: of the whole row's sequences, as `packed_attention.as_mask` gives them.
        settings: of `whole`.
    """
    ranks, tokens = _group.size(), query.shape[2]
    copies = max(1, ranks // key.shape[1])
    parts = [query, *(x.repeat_interleave(copies, 1) for x in (key, value))]
    parts = [x[0].unflatten(0, (ranks, -1)) for x in parts]
    # [ranks, heads of all three, t, D], first those for rank 0; then those from rank 0
    mine = _Exchange.apply(torch.cat(parts, 1), _group).transpose(0, 1).flatten(1, 2)[None]
    query, key, value = mine.split([x.shape[1] for x in parts], 1)
    layer = SimpleNamespace(
        is_causal=module.is_causal,
        training=module.training,
        num_key_value_groups=query.shape[1] // key.shape[1],
    )
    out = whole(layer, query, key, value, lengths, **settings)[0]  # [1, T, H / ranks, D]
    back = _Exchange.apply(out[0].unflatten(0, (ranks, tokens)), _group)
    return back.transpose(0, 1).flatten(1, 2)[None], None


class _Exchange(torch.autograd.Function):
    """Element i of the first dimension goes to rank i, and what comes from rank i takes its place."""

    @staticmethod
    def forward(ctx, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradient, ctx.group), None


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
