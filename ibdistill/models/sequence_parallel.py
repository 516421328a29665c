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

Some terms need all tokens of a question on one rank: pooled ones, weights of tokens by the rest of their
text, and answers that are kept whole or come from other tokens (`objectives.weights.whole_questions`). Then
the final states of each question are brought together on one rank of the group as soon as a model has made
them (`together`), and every rank has as many questions, more or less. From there on it has the targets of its
own questions, and of the others none, so what follows is as without groups. It is one exchange more, of final
states alone; but where a micro-batch has fewer questions than the group has ranks, some of these have no part
in the head loss.

What is refused: encoder-decoder models, whose rows are of two kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from ibdistill.data.batches import Batch
from ibdistill.models.architectures import DECODER_ONLY, FAMILIES

_group: dist.ProcessGroup | None = None
_whole = False


def start(ranks: int, *, whole_questions: bool = False) -> None:
    """Form groups of so many neighbouring ranks, or none of 1. Collective.

    `whole_questions`: whether each question's states are brought together on one rank.
    """
    global _group, _whole
    _group, _whole = None, whole_questions
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
    if is_on() and not _whole and ours != theirs:
        raise ValueError(
            f"optim.sequence_parallel is above 1, and teacher.model {teacher!r:.100} puts {theirs} around a "
            f"question and the student {ours}, so their rows would not be cut at the same places; take a "
            "teacher with the student's own tokenizer settings"
        )


def owned(questions: int) -> np.ndarray:
    """[questions] bool: which of a micro-batch come together on this rank; without groups all do."""
    found = np.full(questions, not is_on())
    if is_on():
        found[slice(*_owners(questions)[_group.rank() :][:2])] = True
    return found


def _owners(questions: int) -> list[int]:
    """Each rank's first question, and the number of all behind them."""
    return [questions * rank // _group.size() for rank in range(_group.size() + 1)]


def part_of(batch: Batch) -> Batch:
    """This rank's part of a packed batch of a decoder-only model; all of it without groups.

    `row_lengths` stay those of the whole row, with what fills it up as a last sequence. `labels` are those of
    the targets here, and `cu` counts them: a question may have none. Where states are brought together, they
    are those of this rank's questions, and `exchanges` says how.
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
    part = replace(
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
    return _of_whole_questions(part, batch, size) if _whole else part


def _of_whole_questions(part: Batch, batch: Batch, size: int) -> Batch:
    """A part of `size` tokens whose targets are, once `together`, those of this rank's questions."""
    me, ranks = _group.rank(), _group.size()
    rows = pad(batch.row_lengths.long().cumsum(0), (1, 0))[: len(batch.question_ids) + 1]
    starts = {"questions": torch.searchsorted(question := batch.question_positions, rows)} | batch.cu
    exchanges, mine = {}, {}
    for name, cu in starts.items():
        places = batch.positions.get(name, question)  # rising, question after question
        held = torch.searchsorted(places, size * torch.arange(ranks + 1))[:, None]
        asked = cu[_owners(len(cu) - 1)]
        # [holder, asker] the states that lie on the one and belong to the other
        both = torch.minimum(held[1:], asked[1:]).sub(torch.maximum(held[:-1], asked[:-1])).clamp_min(0)
        exchanges[name] = both[me].tolist(), both[:, me].tolist()
        mine[name] = asked[me : me + 2].tolist()
    return replace(
        part,
        exchanges=exchanges,
        labels={name: labels[slice(*mine[name])] for name, labels in batch.labels.items()},
        cu={name: cu.clamp(*mine[name]) - mine[name][0] for name, cu in batch.cu.items()},
    )


def together(states: Tensor, batch: Batch, name: str) -> Tensor:
    """The final states [N, D] at a segment's targets, or at the `questions`, as `part_of` has laid them out:
    those of this rank's questions, if they are brought together. Collective then."""
    if name not in batch.exchanges:
        return states
    return _Exchange.apply(states, _group, *batch.exchanges[name])


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
    """Element i of the first dimension goes to rank i, and what comes from rank i takes its place.

    With `given` and `taken` so many rows go to each rank, and so many come from it.
    """

    @staticmethod
    def forward(
        ctx,
        parts: Tensor,
        group: dist.ProcessGroup,
        given: list[int] | None = None,
        taken: list[int] | None = None,
    ) -> Tensor:
        ctx.arguments = group, taken, given
        return _exchanged(parts, group, given, taken)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, *ctx.arguments), None, None, None


def _exchanged(
    parts: Tensor, group: dist.ProcessGroup, given: list[int] | None, taken: list[int] | None
) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts) if taken is None else parts.new_empty(sum(taken), *parts.shape[1:])
    dist.all_to_all_single(received, parts, taken, given, group)
    return received
