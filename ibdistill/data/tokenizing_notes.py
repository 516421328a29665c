"""What there is to report of texts that were tokenized: how many lost something, with the first one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data.records import Record

logger = logging.getLogger("ibdistill")


class Notes:
    """Counts over all blocks of a split, and the warnings at the end."""

    def __init__(self, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.cut: dict[str, int] = {}
        """`Features.cut`."""
        self.sampled = False
        """Whether there are questions of which several records are samples."""
        self._split, self._config, self._tokenizer = split, config, tokenizer
        self._unknown: dict[str, list[int]] = {}
        self._first_unknown: dict[str, str] = {}
        self._first_long: tuple[int, str] | None = None

    def count_cut(self, what: str, number: int) -> None:
        """So many more texts of this kind were cut."""
        self.cut[what] = self.cut.get(what, 0) + number

    def count_unknown(self, what: str, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> None:
        """Look for texts of this kind with characters that have no token."""
        unknown = self._tokenizer.unk_token_id
        if unknown in (None, self._tokenizer.eos_token_id):  # GPT-2's tokens spell any text
            return
        found = [text for text, ids in zip(texts, encoded, strict=True) if unknown in ids]
        counts = self._unknown.setdefault(what, [0, 0])
        counts[0] += len(found)
        counts[1] += len(texts)
        if found:
            self._first_unknown.setdefault(what, found[0])

    def count_long(self, long: Sequence[tuple[int, int]], records: Sequence[Record]) -> None:
        """The rationales of a reason stream that are too long, as (index into `records`, tokens)."""
        self.count_cut("reasonings", len(long))
        if long and self._first_long is None:
            self._first_long = long[0][1], records[long[0][0]].id

    def report(self, total: int) -> None:
        """Warn of what was counted in `total` records. Raises ValueError for long rationales with
        `data.long_reasoning` refuse."""
        config = self._config
        limits = {"labels": config.max_label_tokens, "rationales": config.max_rationale_tokens}
        limits["answers of the reason stream"] = config.max_label_tokens
        for key, number in self.cut.items():
            what = "answers of the reason stream" if key == "answers" else key
            if number and key != "reasonings":
                message = "%s: %d of %d %s are longer than %d tokens and were cut"
                limit = limits.get(what, config.max_question_tokens)
                logger.warning(message, self._split, number, total, what, limit)
        for what, (found, texts) in self._unknown.items():
            if found:
                logger.warning(
                    "%s: %d of %d %s have characters that the tokenizer does not know; the model sees %s in "
                    "their place and cannot write them. The first is %.200r",
                    self._split,
                    found,
                    texts,
                    what,
                    self._tokenizer.unk_token,
                    self._first_unknown[what],
                )
        if self._first_long is not None:
            self._report_long(total, *self._first_long)

    def _report_long(self, total: int, tokens: int, first: str) -> None:
        limit, what = self._config.max_rationale_tokens, self._config.long_reasoning
        message = (
            f"{self._split}: {self.cut['reasonings']} of {total} rationales of the reason stream are longer "
            f"than {limit} tokens (data.max_rationale_tokens, with the marker before the answer); the first "
            f"has {tokens} ({first[:100]})"
        )
        if what == "refuse":
            raise ValueError(f"{message}. Raise the limit, or take data.long_reasoning drop or cut")
        done = {"drop": "these records do not train it", "cut": "they lost their end"}[what]
        logger.warning("%s: %s (data.long_reasoning %s)", message, done, what)
