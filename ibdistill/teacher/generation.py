"""Text generation by the teacher, batch by batch over all ranks.

The teacher is asked in one of two ways:

- as a student is, through the task's two prefixes: two decodings, label and rationale;
- with `teacher.template`, as a model that was never trained on the task: one decoding, which the task's
  parser for LLM text takes apart.

A sampled text depends on `run.seed` and the record, not on the batch or on the number of ranks, apart from
rounding: padding changes the last bits of a model's outputs.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import Config
from ibdistill.data import token_ids
from ibdistill.data.records import Record
from ibdistill.models import decoding
from ibdistill.models.decoding import Sampling
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import StopRequest, World
from ibdistill.teacher.teacher import SHARDED
from ibdistill.teacher.texts import Texts, append, parse, template_prompt

logger = logging.getLogger("ibdistill")

ENOUGH = 64
"""After this many answers the share of unparsable ones is looked at before all answers are there."""


class Writer:
    """Asks the teacher for its texts, batch by batch, and appends them to this rank's file."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        folder: Path,
        world: World,
    ) -> None:
        self._config, self._model, self._tokenizer, self._world = config, model, tokenizer, world
        self._sharded = config.teacher.placement in SHARDED
        data = config.data
        self._template = template
        self._prompt_tokens = data.max_question_tokens
        limits = {"predict": data.max_label_tokens, "explain": data.max_rationale_tokens}
        if template:
            self._prompt_tokens += len(tokenizer(template).input_ids)
            limits = {"answer": sum(limits.values())}
        self._limits = limits
        self._folder = folder
        self._path = folder / f"rank-{world.rank:05d}-{uuid.uuid4().hex[:12]}.jsonl"

    def write_all(self, todo: list[tuple[Record, str, Texts]], stop: StopRequest) -> dict[str, Texts]:
        """Ask about every (record, key, prompts) of the list, and return key -> texts. Collective.

        The list is the same on all ranks. In each round every rank has a batch, or perhaps none at the end. A
        rank without a batch still asks a sharded teacher about a record and throws the answer away, since all
        ranks take part in each of its forward passes.

        Raises ValueError if the texts cannot be written or too many cannot be parsed, and SystemExit if a
        signal asked the run to stop.
        """
        self._report_cuts([record for record, _, _ in todo])
        size, ranks = self._config.teacher.write_batch_size, self._world.size
        written: dict[str, Texts] = {}
        unparsed: list[tuple[Record, Texts]] = []
        for start in range(0, len(todo), size * ranks):
            batch = todo[start : start + size * ranks][self._world.rank :: ranks]
            answered, error = [], ""
            if batch or self._sharded:
                texts = self._ask(batch or todo[:1])
                answered = [(*item[:2], text) for item, text in zip(batch, texts, strict=False)]
                error = keep(self._path, answered)
            for theirs, failure in distributed.gather_objects((answered, error)):
                if failure:
                    raise ValueError(failure)
                written |= {key: texts for _, key, texts in theirs}
                unparsed += [(record, texts) for record, _, texts in theirs if parse(texts, record) is None]
            logger.info("teacher's text: %d of %d, %d unparsable", len(written), len(todo), len(unparsed))
            if len(written) >= ENOUGH:
                check_unparsed(self._config, len(written), unparsed)
            if code := stop.exit_code():
                logger.warning("stopped by a signal after %d records, exit code %d", len(written), code)
                dist.barrier()
                sys.exit(code)
        return written

    def _ask(self, batch: list[tuple[Record, str, Texts]]) -> list[Texts]:
        """The texts for one batch of (record, key, prompts)."""
        texts: list[Texts] = [{} for _ in batch]
        for name, limit in self._limits.items():
            decoded = decoding.decode(
                self._model,
                self._tokenizer,
                [self._prompt(record, prompts[name]) for record, _, prompts in batch],
                max_question_tokens=self._prompt_tokens,
                max_new_tokens=limit,
                device=self._world.device,
                batch_size=len(batch),
                as_written=name == "answer",
                sampling=self._sampling([f"{key} {name}" for _, key, _ in batch], limit),
                synced=self._sharded,
            )
            for text, answer in zip(texts, decoded, strict=True):
                text[name] = answer.text
        return texts

    def _prompt(self, record: Record, text: str) -> str:
        """A prompt as the teacher gets it, from its text of `prompts_of`."""
        limit = self._config.data.max_question_tokens
        return template_prompt(record, self._template, self._tokenizer, limit) if self._template else text

    def _report_cuts(self, records: Sequence[Record]) -> None:
        """Warn of questions that are longer than the teacher may read."""
        limit = self._config.data.max_question_tokens
        encoded = token_ids.question_ids([record.question for record in records], self._tokenizer)
        if cut := sum(len(ids) > limit for ids in encoded):
            message = "teacher's text: %d of %d questions are longer than %d of its tokens and are cut"
            logger.warning(message, cut, len(records), limit)

    def _sampling(self, keys: Sequence[str], limit: int) -> Sampling | None:
        """The random numbers of one decoding for each key; None for greedy decoding."""
        if not self._config.teacher.temperature:
            return None
        seed = self._config.run.seed
        draws = decoding.draws([f"{seed} {key}" for key in keys], limit)
        return Sampling(self._config.teacher.temperature, draws)


def keep(path: Path, answered: Sequence[tuple[Record, str, Texts]]) -> str:
    """Append (record, key, texts) to a process's own file; the result says what went wrong, and is empty if
    nothing did."""
    try:
        append(path, answered)
    except OSError as error:
        return (
            f"teacher.rationale_cache {path.parent} takes no more texts: {error.strerror}; "
            "free some space. What was written before is good, and the same command goes on from there"
        )
    return ""


def check_unparsed(config: Config, asked: int, unparsed: Sequence[tuple[Record, Texts]]) -> None:
    """Raise ValueError, with two examples, if more answers cannot be parsed than `teacher.max_unparsed`."""
    settings = config.teacher
    if len(unparsed) <= settings.max_unparsed * asked:
        return
    examples = "; ".join(
        f"asked {record.question[:200]!r} it wrote { ({name: text[:200] for name, text in texts.items()}) }"
        for record, texts in unparsed[:2]
    )
    raise ValueError(
        f"{len(unparsed)} of {asked} answers of teacher.model {settings.model} "
        f"({len(unparsed) / asked:.0%}) have no rationale and label, more than teacher.max_unparsed "
        f"{settings.max_unparsed}. For example, {examples}. Change teacher.template or the model, with "
        "another teacher.rationale_cache, or raise teacher.max_unparsed"
    )
