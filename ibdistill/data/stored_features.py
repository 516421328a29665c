"""The token ids of a run's records in a table on the disk (`data.arrow_tables`)."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from ibdistill.data.arrow_tables import Table
from ibdistill.data.features import Features
from ibdistill.data.lazy import Lazy
from ibdistill.data.ragged import Ragged
from ibdistill.runtime import files

_TABLES = ("questions", "targets", "teacher_questions", "with_reference", "reference_alone")


class StoredNames(Lazy[str]):
    """Names that are read from a table when they are asked for."""

    def __init__(self, names: pyarrow.ChunkedArray) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def _item(self, index: int) -> str:
        return self._names[index].as_py()


def rows(features: Features, first: int, indices: np.ndarray) -> pyarrow.RecordBatch:
    """The rows of those of a block's records that have these indices; `first`: the index of the block's first
    record among all records."""
    taken = features if len(indices) == len(features) else features.take(indices.tolist())
    columns = {
        "id": pyarrow.array(taken.ids, pyarrow.large_string()),
        "record": pyarrow.array(first + indices),
        "group": pyarrow.array(taken.groups),
        "sample": pyarrow.array(taken.samples),
    }
    for kind in _TABLES:
        columns |= {f"{kind}/{name}": _lists(own) for name, own in getattr(taken, kind).items()}
    return pyarrow.record_batch(columns)


def features_of(table: Table, cut: dict[str, int], *, sampled: bool, whole_prompts: bool) -> Features:
    """The features of a table, with their token ids on the disk; the others are fields of `Features`."""
    found: dict[str, dict[str, Ragged]] = {kind: {} for kind in _TABLES}
    for column in table.batches[0].schema.names:
        kind, _, name = column.partition("/")
        if name:
            found[kind][name] = table.tokens(column)
    return Features(
        ids=StoredNames(table.texts("id")),
        groups=table.numbers("group"),
        samples=table.numbers("sample") if sampled else None,
        whole_prompts=whole_prompts,
        cut=cut,
        **found,
    )


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What changes with the ids that a tokenizer gives a text or a conversation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    own = [type(tokenizer).__name__, repr(tokenizer.special_tokens_map), tokenizer("a").input_ids]
    libraries = [transformers.__version__, tokenizers.__version__]
    made_of = json.dumps([words, *own, repr(tokenizer.chat_template), *libraries])
    return files.digest(made_of.encode()).hex()


def _lists(ragged: Ragged) -> pyarrow.LargeListArray:
    offsets = np.concatenate([[0], ragged.lengths.cumsum()])
    return pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(ragged.flat))
