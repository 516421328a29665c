"""What a run in format chat settles and shows before it loads a model: renderings, BOS and end tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data.chat import Chat, adopt_turn_end
from ibdistill.data.chat_features import conversations
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tokenizers import load_tokenizer

logger = logging.getLogger("ibdistill")
_SHOWN = 2000
_MISSING = "(a text that this record lacks)"


def settle(
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    streams: Sequence[str],
    teacher: str,
    record: Record,
) -> None:
    """Let the student's tokenizer end with a turn's end, and log how student and teacher render `record`.

    `teacher`: the folder or name of a model with a tokenizer of its own; empty: nothing is compared. Only
    the student's rendering is used, for the teacher too.

    Raises ValueError if the student's template cannot be used (`Chat.of`), or if the teacher's tokenizer ends
    a text with another token, as a base model's and an instructed one's do.
    """
    own_end = tokenizer.eos_token_id
    theirs = load_tokenizer(teacher, "teacher.model") if teacher else None
    if theirs is not None and theirs.eos_token_id != own_end:
        raise ValueError(
            f"student.tokenizer ends a text with {tokenizer.eos_token!r} ({own_end}), the teacher's with "
            f"{theirs.eos_token!r} ({theirs.eos_token_id}), as a base model's and an instructed one's do; "
            f"give the teacher's tokenizer to the student, --student.tokenizer {teacher}, take the "
            "instructed student, or compare them on the text (objective.alignment text)"
        )
    adopt_turn_end(tokenizer, config, streams)
    if tokenizer.eos_token_id != own_end:
        logger.info(
            "chat: a turn ends with %r (%d), which replaces the tokenizer's end token (%d) in training, "
            "decoding and the exported student",
            tokenizer.eos_token,
            tokenizer.eos_token_id,
            own_end,
        )
    for stream in streams:
        ours = _rendered("student", tokenizer, config, stream, record)
        if theirs is None:
            continue
        try:
            other = _rendered("teacher", theirs, config, stream, record)
        except ValueError as error:
            logger.warning("chat: the teacher reads the student's rendering; of its own template: %s", error)
            continue
        if ours != other:
            logger.warning(
                "chat: the teacher's own template renders the %s stream otherwise; it reads the student's "
                "rendering",
                stream,
            )


def overhead(tokenizer: PreTrainedTokenizerBase, config: DataConfig, streams: Sequence[str]) -> int:
    """How many tokens a prompt has at most beside the question and the turns before it; 0 in format plain."""
    if config.format == "plain":
        return 0
    found = []
    for stream in streams:
        thinks = stream == "reason"
        found.append(
            len(Chat.of(tokenizer, config, thinks=thinks).prompts([("", (), "a")], thinks=thinks)[0])
        )
    return max(found)


def _rendered(
    who: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, stream: str, record: Record
) -> list[int]:
    """The ids of a record's row, which the log shows."""
    thinks = stream == "reason"
    chat = Chat.of(tokenizer, config, thinks=thinks)
    before = TASKS[record.task].prefixes[stream]
    [asked], _ = conversations([record], stream, [before], chat, config.max_question_tokens)
    answer = record.rationale if stream == "explain" else record.label
    [row] = chat.rows([(*asked, record.rationale or _MISSING if thinks else None, answer or _MISSING)])
    ids = [*row.prompt, *row.rationale, *row.answer]
    logger.info(
        "chat: %s, %s: BOS %s, %s; a turn ends with %r (%d); prompt %.*s, target %.*s",
        who,
        stream,
        tokenizer.bos_token,
        "in front of the prompt" if row.prompt[:1] == [tokenizer.bos_token_id] else "not in front of it",
        tokenizer.convert_ids_to_tokens(row.answer[-1]),
        row.answer[-1],
        _SHOWN,
        ascii(tokenizer.decode(row.prompt)),
        _SHOWN,
        ascii(tokenizer.decode(ids[len(row.prompt) :])),
    )
    return ids
