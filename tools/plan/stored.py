"""Bytes of the tables that hold the records and token ids of a run (`ibdistill/data/README.md`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibdistill.data.records import segments_of

TEXT_PER_TOKEN = 4.0
"""Bytes of a record's text for each of its tokens, assumed where no text is at hand."""
_TOKEN, _NUMBER = 4, 8
_NAME, _ROW = 16, 70
"""A record's name, and its row without question, label and rationale; the label stands there twice."""


@dataclass(frozen=True)
class Stored:
    """The tables of a run."""

    records: int
    """Training records."""
    ids: int
    """Bytes of token ids. What a teacher of another vocabulary or of references reads is not among them, and
    neither are the words of a chat template."""
    texts: int
    """Bytes of the records of all splits."""
    numbers: int
    """Bytes of the arrays that each rank holds for itself."""

    @classmethod
    def of(
        cls, records: int, streams: Sequence[str], mean: dict[str, float], texts: float | None = None
    ) -> Stored:
        """`mean`: tokens of a question, a label and a rationale. `texts`: bytes of all records, if known."""
        segments = segments_of(streams)
        tokens = len(streams) * mean["question"]
        tokens += sum(mean["label" if own in ("predict", "answer") else "rationale"] for own in segments)
        columns = len(streams) + len(segments)
        # name, record, group, sample and, of each column of ids, where a row begins
        row = _NAME + (4 + columns) * _NUMBER + _TOKEN * tokens
        if texts is None:
            words = TEXT_PER_TOKEN * (sum(mean.values()) + mean["label"])
            texts = records * (_NUMBER + _ROW + words)
        # where a record stands, its group, its sample, and the length of each of its rows
        return cls(records, int(records * row), int(texts), records * (3 + columns) * _NUMBER)
