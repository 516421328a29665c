"""What a teacher behind a server says about the tokens that the student thinks most probable in its own text
(`teacher.server_candidates` student).

With the teacher's own top k a token that the student likes and the teacher does not is lost in the rest of
the distribution, where reverse KL cannot tell it from others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import TeacherConfig
from ibdistill.data import batches
from ibdistill.data.features import Features
from ibdistill.models import families, forward
from ibdistill.models.whole_model import WholeModel
from ibdistill.runtime import distributed
from ibdistill.teacher import answer_tensors, server_schemas
from ibdistill.teacher.cache_shard import Entry
from ibdistill.teacher.endpoints import Endpoints


@torch.no_grad()
def of(
    config: TeacherConfig,
    student: WholeModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Features,
    indices: Sequence[int],
    streams: Sequence[str],
    rows: int,
) -> dict[int, Entry]:
    """Of each of these records: `SEGMENT.ids` [n, k] int32, by the student's present weights. Collective.

    k is `teacher.cache_top_k`, of the first `rows` tokens of the vocabulary. Each rank computes a share, in
    batches of `teacher.write_batch_size`; every rank gets all.
    """
    mine = list(indices)[dist.get_rank() :: dist.get_world_size()]
    found: dict[int, Entry] = {}
    with student() as model:
        layout, output = families.layout(model, tokenizer), model.get_output_embeddings()
        bias = None if output.bias is None else output.bias[:rows]
        head = output.weight[:rows], bias, None  # a cap of the logits leaves their order as it is
        for start in range(0, len(mine), config.write_batch_size):
            part = mine[start : start + config.write_batch_size]
            batch = batches.collate(features, part, streams, **layout).to(output.weight.device)
            packed = {}
            for segment, hidden in forward.states(model, batch).targets.items():
                ids, _ = answer_tensors.top_k(hidden, head, config.cache_top_k, 1.0)
                packed[f"{segment}.ids"] = ids.int().cpu()
            pieces = answer_tensors.pieces(packed, answer_tensors.lengths(features, part))
            found |= zip(part, pieces, strict=True)
    return {index: entry for share in distributed.gather_objects(found) for index, entry in share.items()}


def ask(
    config: TeacherConfig,
    endpoints: Endpoints,
    ids: Sequence[int],
    start: int,
    candidates: np.ndarray,
    url: str = "",
) -> np.ndarray:
    """The log-probabilities of candidates behind token `start` of a prompt, as `read_given` gives them.

    `url`: as in `server_scoring.score`. Raises as `Endpoints.post` does.
    """
    schema = server_schemas.SCHEMAS[config.server_schema]
    return endpoints.post(
        schema.candidates_route,
        schema.request_given(config.served_model, ids, start, candidates),
        lambda answer: server_schemas.read_given(schema, answer, ids, start, candidates),
        url,
    )


def score(
    config: TeacherConfig,
    endpoints: Endpoints,
    tokens: Sequence[int],
    places: Mapping[str, np.ndarray],
    given: Entry,
) -> tuple[np.ndarray, np.ndarray]:
    """[n - 1, k] token ids and log-probabilities of one row of n tokens, as `Scored` has them.

    `places`: segment -> where in the row its candidates in `given` belong; other places hold nothing.
    """
    k = next(iter(given.values())).shape[1]
    ids, logprobs = np.full((len(tokens) - 1, k), -1), np.zeros((len(tokens) - 1, k))
    for segment, at in places.items():
        ids[at] = given[f"{segment}.ids"].numpy()
    start = int(np.concatenate(list(places.values())).min())
    found = ask(config, endpoints, tokens, start, ids[start:])
    order = np.argsort(-found, 1, kind="stable")  # the most probable for the teacher first
    ids[start:] = np.take_along_axis(ids[start:], order, 1)
    logprobs[start:] = np.take_along_axis(found, order, 1)
    return ids, logprobs
