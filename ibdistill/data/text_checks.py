"""Which labels a model can never give, because its tokenizer cannot say them; counted before training.

A tokenizer may not know a character (`{`, `<` for T5), normalise it away (`m²` to `m2`) or drop it, and a
limit cuts. Such a label is a wrong answer even if the model gives its target word for word.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data import arrow_tables, chat, reasoning, token_ids
from ibdistill.data.arrow_tables import BLOCK
from ibdistill.data.features import Features
from ibdistill.data.lazy import Mapped
from ibdistill.data.loading import Loaded
from ibdistill.data.records import STREAMS, Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizing import tokenized_blocks
from ibdistill.data.tokenizing_notes import Notes

logger = logging.getLogger("ibdistill")

MAX_UNSAYABLE = 0.5
"""The share of a split's labels above which a run is refused: its accuracy would then say more about the
tokenizer than about the student. Below it some tasks still make sense, which the user can judge."""


def check_texts(
    records: Loaded, train: Features, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> dict[str, int]:
    """Tokenize the validation and test records too, and give every label's target back to the task's rule.

    Warnings report what is cut or unknown in these records, as `tokenize` does for the training records,
    whose `train` are the ids, and the labels of all splits that can never be right, with the first example.

    Returns:
        `TASK/SPLIT/WHAT` -> how many, where there are any. WHAT is unsayable (labels that can never be
        right), and for validation and test cut_questions and cut_labels.

    Raises:
        ValueError: more than `MAX_UNSAYABLE` of a task's labels in a split can never be right, because of the
            tokenizer or, in validation and test, by the rule that `data.answer_check` names.
    """
    counts: dict[str, int] = {}
    # the question of the reason stream is that of predict, but for its prefix
    streams = ["predict", *(s for s in train.streams if s == "explain")]
    for group, task in enumerate(records.test):
        mine, name = np.flatnonzero(train.groups == group), f"{task}/train"
        labels = ((records.train[i], train.labels[i]) for i in mine)
        counts[f"{name}/unsayable"] = _unsayable(name, labels, len(mine), tokenizer, config, MAX_UNSAYABLE)
        for split, part in (("valid", records.valid[task]), ("test", records.test[task])):
            _check_scorable(f"{task}/{split}", part, config)
            if "reason" in train.streams and config.format == "plain":
                _check_marked(f"{task}/{split}", part, config)
            counts |= check_split(f"{task}/{split}", part, tokenizer, config, MAX_UNSAYABLE, streams)
    return {name: count for name, count in counts.items() if count}


def check_split(
    name: str,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_unsayable: float = 1.0,
    streams: Sequence[str] = STREAMS,
) -> dict[str, int]:
    """`check_texts` for records of one task that a student answers; `name` is what messages call them.

    `streams`: those whose questions are counted, `predict` among them.
    """
    prefixes = {record.task: TASKS[record.task].prefixes for record in records[:1]}
    notes = Notes(name, config, tokenizer)

    def labels() -> Iterator[tuple[Record, np.ndarray]]:
        for block in arrow_tables.blocks(Mapped(partial(_as_said, config=config), records)):
            (features,) = tokenized_blocks(block, prefixes, tokenizer, config, notes, streams)
            yield from zip(block, map(features.labels.__getitem__, range(len(block))), strict=True)
        notes.report(len(records))

    wrong = _unsayable(name, labels(), len(records), tokenizer, config, max_unsayable)
    return {
        f"{name}/cut_questions": notes.cut["predict questions"],
        f"{name}/cut_labels": notes.cut["labels"],
        f"{name}/unsayable": wrong,
    }


def truncated_shares(records: Loaded, train: Features, config: DataConfig) -> dict[str, float]:
    """Which texts are too long, as scalars by their tags.

    `data/truncated_share_WHAT` is the share of the training texts that fill their limit, so that they were
    cut or, in rare cases, just fit. `data/truncated_share_SPLIT_WHAT` is the share that `check_texts` found
    cut in validation and test, over all tasks; the rationales there are references, which no limit cuts.
    `data/long_reasonings` is the number of rationales of a reason stream to which `data.long_reasoning` was
    applied.
    """
    limits = {
        "questions": (train.first_questions, config.max_question_tokens),
        "labels": (train.labels, config.max_label_tokens),
        "rationales": (train.rationales, config.max_rationale_tokens),
    }
    shares = {name: float((texts.lengths >= limit).mean()) for name, (texts, limit) in limits.items()}
    if train.whole_prompts:  # the limit is on what the user says, and a prompt holds more
        shares["questions"] = train.cut.get(f"{train.streams[0]} questions", 0) / len(train)
    for split, tasks in (("valid", records.valid), ("test", records.test)):
        total = max(1, sum(len(part) for part in tasks.values()))  # demo_pretrain has no test split
        for what in ("questions", "labels"):
            cut = sum(records.report.get(f"{task}/{split}/cut_{what}", 0) for task in tasks)
            shares[f"{split}_{what}"] = cut / total
    long = train.cut.get("reasonings")
    scalars = {f"data/truncated_share_{name}": share for name, share in shares.items()}
    return scalars if long is None else scalars | {"data/long_reasonings": float(long)}


def _as_said(record: Record, config: DataConfig) -> Record:
    """The record with the label that a student who learned from `config` would have to give."""
    letter_of = TASKS[record.task].letter_of
    if config.choice_labels != "letter" or not letter_of:
        return record
    return replace(record, label=letter_of(record.label, record))


def _check_scorable(split: str, records: Sequence[Record], config: DataConfig) -> None:
    """Raise ValueError where most labels are such that no answer equals them, not even the label itself."""
    wrong = [i for i, r in enumerate(records) if not TASKS[r.task].is_correct(r.gold, r)]
    if len(wrong) > MAX_UNSAYABLE * len(records):
        first = records[wrong[0]]
        raise ValueError(
            f"{split}: {len(wrong)} of {len(records)} labels equal no answer by the task's rule "
            f"(data.answer_check is {config.answer_check!r}). The first is {first.gold[:200]!r} "
            f"({first.id[:100]}). Take another data.answer_check, or mend the labels"
        )


def _check_marked(split: str, records: Sequence[Record], config: DataConfig) -> None:
    """Warn of labels that hold the words before the answer: behind these, another answer is read."""
    lost = []
    for record in (_as_said(record, config) for record in records):
        marker = reasoning.marker_of(record.task, config)
        said, is_correct = reasoning.join("", record.label, marker), TASKS[record.task].is_correct
        if is_correct(record.label, record) and not is_correct(
            reasoning.split(said, marker)[1] or "", record
        ):
            lost.append(record)
    if lost:
        message = (
            f"{split}: {len(lost)} of {len(records)} labels can never be right, as they hold the words "
            f"before the answer, {marker[:100]!r}. The first is {lost[0].label[:200]!r} "
            f"({lost[0].id[:100]}). Leave the words out of the labels, or choose another data.answer_marker"
        )
        if len(lost) > MAX_UNSAYABLE * len(records):
            raise ValueError(message)
        logger.warning(message)


def _unsayable(
    split: str,
    labels: Iterable[tuple[Record, np.ndarray]],
    total: int,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_share: float,
) -> int:
    """How many labels are right as text, but wrong once they are read back from their target, which stands
    beside the record.

    Raises ValueError where they are more than `max_share` of all.
    """
    wrong, first, labels = 0, None, iter(labels)
    while part := list(islice(labels, BLOCK)):
        unique = {ids.tobytes(): ids.tolist() for _, ids in part}
        texts = token_ids.read_back(list(unique.values()), tokenizer)
        if config.format == "chat":
            texts = [chat.visible(text, config) for text in texts]
        by_ids = dict(zip(unique, texts, strict=True))
        for record, ids in part:
            text, is_correct = by_ids[ids.tobytes()], TASKS[record.task].is_correct
            if text != record.label and is_correct(record.label, record) and not is_correct(text, record):
                wrong, first = wrong + 1, first or (record, text)
    if wrong:
        record, text = first
        message = (
            f"{split}: {wrong} of {total} labels ({wrong / total:.1%}) can never be "
            "right, as the tokenizer reads their own target back as something else. The first is "
            f"{record.label[:200]!r} ({record.id[:100]}), which becomes {text[:200]!r}. Take a tokenizer "
            "that has the characters (student.tokenizer train makes one), write the labels in others, or "
            "raise data.max_label_tokens if they are cut"
        )
        if wrong > max_share * total:
            raise ValueError(message)
        logger.warning(message)
    return wrong
