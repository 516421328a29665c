"""What stands around a question when a student is asked, as plain values that a file can hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.methods import METHODS
from ibdistill.config.sections import Config
from ibdistill.data import chat, reasoning, tokenizers
from ibdistill.data.tasks.registry import TASKS
from ibdistill.models.families import DECODER_ONLY, family


@dataclass(frozen=True)
class Prompt:
    """How a student is asked: the ids around a question, and the limits in tokens."""

    decoder_only: bool
    start: int | None
    """The token in front, which the tokenizer puts there by itself; None for most."""
    end: int
    """The token behind the question: a decoder-only model's separator, else the end token."""
    prefixes: dict[str, str]
    """Stream -> what precedes the question, of the streams that the student was trained on."""
    limits: dict[str, int]
    """Stream -> the most tokens of an answer."""
    marker: str
    """What stands between rationale and answer in the stream `reason`."""
    question_limit: int
    """The most tokens of a question, with `end` and without `start`."""
    tags: tuple[str, str] | None = None
    """In format chat, where `start` and `end` have no meaning: what stands around a rationale in the stream
    `reason`."""
    empty_thoughts: bool = False
    """In format chat: whether the student writes an empty rationale, with its tags, before labels and
    rationales of the other streams, as its template does."""

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: Config) -> Prompt:
        """The prompt of a run's student. Of a mixture with several prefixes it has the first task's."""
        decoder_only = family(model) == DECODER_ONLY
        first = tasks_of(config)[0]
        limits = config.data.answer_limits()
        streams = METHODS[config.objective.method].streams
        in_chat = config.data.format == "chat"
        prefixes = {stream: TASKS[first].prefixes[stream] for stream in streams}
        if in_chat and "reason" in prefixes:
            prefixes["reason"] = ""
        return cls(
            decoder_only=decoder_only,
            start=tokenizers.bos_of(tokenizer),
            end=tokenizers.separator_of(tokenizer) if decoder_only else tokenizer.eos_token_id,
            prefixes=prefixes,
            limits={stream: limits[stream] for stream in streams},
            marker=reasoning.marker_of(first, config.data),
            question_limit=config.data.max_question_tokens,
            tags=chat.tags_of(config.data) if in_chat else None,
            empty_thoughts=in_chat and chat.Chat.of(tokenizer, config.data).empty_thoughts,
        )


def tasks_of(config: Config) -> list[str]:
    """The names of the tasks that a run is trained on."""
    task = config.data.task
    return [task] if isinstance(task, str) else list(task)
