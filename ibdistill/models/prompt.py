"""What stands around a question when a student is asked, as plain values that a file can hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.fields import shown
from ibdistill.config.methods import METHODS
from ibdistill.config.sections import Config, DataConfig
from ibdistill.data import chat, chat_features, id_rows, reasoning, tokenizers
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS
from ibdistill.models.families import DECODER_ONLY, family

FILE = "prompt.json"
"""The file of an exported student that keeps its prompt."""

Ids = list[int]


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
    system: str = ""
    """In format chat: the system message."""
    map_numbers: bool = False
    """Whether the student reads and writes `n0` for the first number of a question, as `data.map_numbers`."""
    task: str = ""
    """Whose rule finds an answer that the stream `reason` does not give behind the marker; empty: none."""

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
            empty_thoughts=in_chat
            and not chat.only_thinks(streams)
            and chat.Chat.of(tokenizer, config.data).empty_thoughts,
            system=config.data.system if in_chat else "",
            map_numbers=config.data.map_numbers,
            task=first,
        )

    def write(self, folder: Path) -> None:
        """Keep the prompt in the folder of an exported student."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Prompt:
        """The prompt of an exported student. Raises ValueError if its folder has none or a damaged one."""
        path = folder / FILE
        if not folder.is_dir():
            raise ValueError(f"STUDENT is {shown(str(folder))}, a folder that does not exist")
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {FILE}, which says how the student is asked: it is no student of train.py, "
                "or one that an older version exported; start the run again with the same settings, and a "
                "finished run exports its student anew"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in fields(cls)}
            if not isinstance(values, dict) or not values.keys() <= known or not values["prefixes"]:
                raise ValueError(f"it needs an object with {', '.join(sorted(known))}")
            if values.get("tags") is not None:
                opened, closed = values["tags"]
                values["tags"] = (opened, closed)
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); export the student again") from error

    def ids(self, stream: str, questions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
        """What the model reads before its answer to each question in a stream: the ids of training."""
        if self.tags is not None:
            records = [Record("", "", text, "", "", gold="") for text in questions]
            prefixes = {"": self.prefixes}
            return chat_features.prompts(records, stream, prefixes, tokenizer, self.chat_settings())
        around = {
            "start": self.start,
            "bos": self.start,
            "separator": self.end if self.decoder_only else None,
        }
        rows = (
            id_rows.prompts([self.prefixes[stream] + text], tokenizer, self.question_limit, pad=0, **around)
            for text in questions
        )
        return [ids[0].tolist() for ids, _ in rows]

    def chat_settings(self) -> DataConfig:
        """The settings of format chat that a prompt depends on."""
        opened, closed = self.tags
        return DataConfig(
            format="chat",
            system=self.system,
            think_open=opened,
            think_close=closed,
            max_question_tokens=self.question_limit,
        )

    def evaluation_settings(self) -> dict[str, Any]:
        """`section.field` -> value of an evaluation that asks the student as it was trained."""
        limits, reasons = self.limits, "reason" in self.prefixes
        label = limits.get("predict", min(DataConfig().max_label_tokens, limits.get("reason", 4) - 2))
        rationale = limits.get("explain", limits.get("reason", 0) - label)
        data = {"max_question_tokens": self.question_limit, "max_label_tokens": label}
        data |= {"max_rationale_tokens": rationale} if rationale > 0 else {}
        data |= {"map_numbers": self.map_numbers} | ({"task": self.task} if self.task else {})
        if self.tags:
            opened, closed = self.tags
            data |= {"format": "chat", "system": self.system, "think_open": opened, "think_close": closed}
        elif reasons:
            data["answer_marker"] = self.marker
        found = {f"data.{name}": value for name, value in data.items()}
        alone = "only" if "predict" not in self.prefixes else "also"
        return found | {
            "eval.rationales": "explain" in self.prefixes,
            "eval.reason": alone if reasons else "no",
        }


def tasks_of(config: Config) -> list[str]:
    """The names of the tasks that a run is trained on."""
    task = config.data.task
    return [task] if isinstance(task, str) else list(task)
