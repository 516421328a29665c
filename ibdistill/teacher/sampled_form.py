"""`teacher.cache_form` sampled: a distribution kept as a few tokens that were drawn from it.

At each position n tokens are drawn from the teacher's distribution q. Kept are the different ones among them,
and how often each was drawn:

    SEGMENT.ids        [all of them] int32, position after position
    SEGMENT.counts     [all of them] uint8
    SEGMENT.distinct   [positions] uint8, how many of these belong to each position

With p the student's distribution, the gradient of KL(q || p) for the student's logits is p - q, which is
linear in q. So the shares counts / n, whose mean is q, give an estimate of the gradient whose mean is the
gradient itself (Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL
2025, arXiv 2503.16870). The other divergences are not linear in q. The loss that is shown is not the KL: its
part with log p is unbiased, and the entropy of the shares is smaller than that of q.

To the head loss the shares are a top k whose tail has no probability. The draws of a record depend on its
tokens and on `run.seed`, not on the batch, the ranks or the step. A record keeps its draws over all epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ibdistill.data.features import Features
from ibdistill.ops.head_loss.arguments import TeacherStream
from ibdistill.ops.head_loss.softcap import capped
from ibdistill.runtime import files
from ibdistill.teacher.cache_shard import record_key

Head = tuple[Tensor | None, Tensor | None, float | None]


def uniforms(keys: Sequence[bytes], segment: str, lengths: Sequence[int], n: int, seed: int) -> Tensor:
    """[sum of lengths, n] fp64 in [0, 1), for records with these keys and as many positions each."""
    rows = [np.empty((0, n))]
    for key, length in zip(keys, lengths, strict=True):
        digest = files.digest(f"{seed} {segment} {key.hex()}".encode(), 16)
        rows.append(np.random.default_rng(int.from_bytes(digest, "little")).random((length, n)))
    return torch.from_numpy(np.concatenate(rows))


def uniforms_of(features: Features, indices: Sequence[int], n: int, seed: int, segment: str) -> Tensor:
    """The same for one segment of the records with these indices."""
    keys = [record_key(features, i) for i in indices]
    return uniforms(keys, segment, features.targets[segment].lengths[indices], n, seed)


def draw(hidden: Tensor, head: Head, temperature: float, u: Tensor, chunk: int = 256) -> Tensor:
    """Tokens [N, n] int64 drawn from each position's distribution: one for each number of `u` [N, n].

    A number takes the first token at which the cumulated probabilities, in fp64, exceed it. Logits exist for
    `chunk` positions at a time.
    """
    weight, bias, softcap = head
    found = [torch.empty(0, u.shape[1], dtype=torch.int64, device=hidden.device)]
    for part, numbers in zip(hidden.split(chunk), u.to(hidden.device).split(chunk), strict=True):
        logits = capped(torch.nn.functional.linear(part, weight, bias).double(), softcap)
        cumulated = torch.softmax(logits / temperature, -1).cumsum(-1)
        bounds = numbers * cumulated[:, -1:]
        found.append(torch.searchsorted(cumulated, bounds, right=True).clamp_max(len(weight) - 1))
    return torch.cat(found)


def pack(drawn: Tensor) -> dict[str, Tensor]:
    """`ids`, `counts` and `distinct`, from tokens [N, n]. The host waits for the device."""
    drawn = drawn.sort(-1).values
    is_first = torch.ones_like(drawn, dtype=torch.bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    starts = torch.nn.functional.pad(is_first.flatten().nonzero()[:, 0], (0, 1), value=drawn.numel())
    return {
        "ids": drawn[is_first].int(),
        "counts": starts.diff().to(torch.uint8),
        "distinct": is_first.sum(-1).to(torch.uint8),
    }


def unpack(ids: Tensor, counts: Tensor, distinct: Tensor, *, k: int, vocabulary: int) -> TeacherStream:
    """The shares as a top k [N, k], the most frequent tokens first. No position has more than k tokens.

    Where a position has fewer, other tokens with no probability follow, since a top k's tokens differ.
    """
    many = distinct.long()
    inside = torch.arange(k, device=many.device) < many[:, None]
    shape = (len(many), k)
    share = counts.new_zeros(shape, dtype=torch.float32).masked_scatter_(inside, counts.float())
    # of the first 2 k tokens at least k are not drawn at a position, or all tokens are here
    few = min(2 * k, vocabulary)
    known = ids.new_full(shape, few, dtype=torch.int64).masked_scatter_(inside, ids.long())
    taken = torch.zeros(len(many), few + 1, device=many.device).scatter_(1, known.clamp(max=few), 1)[:, :few]
    spare = taken.argsort(dim=1, stable=True)
    place = torch.arange(k, device=many.device) - many[:, None]
    tokens = torch.where(inside, known, spare.gather(1, place.clamp(min=0)))
    order = share.argsort(dim=1, descending=True, stable=True)
    share = share / share.sum(1, keepdim=True)
    return TeacherStream(ids=tokens.gather(1, order), probabilities=share.gather(1, order))


def lengths_of(packed: dict[str, Tensor], lengths: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name -> rows of each record, for the tensors whose rows are not positions. `lengths`: positions."""
    found = {}
    for name in [name for name in packed if name.endswith(".distinct")]:
        segment = name.split(".")[0]
        before = np.concatenate([[0], np.cumsum(packed[name].cpu().numpy(), dtype=np.int64)])
        ends = np.concatenate([[0], np.cumsum(lengths[segment])])
        found |= dict.fromkeys((f"{segment}.ids", f"{segment}.counts"), np.diff(before[ends]))
    return found
