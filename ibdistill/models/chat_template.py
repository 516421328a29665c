"""The chat template of an exported student that was trained in format chat.

It is the tokenizer's own template, and before it what the run put into each conversation: the system message,
the prefix of the stream in the last user's text, and whether there are thoughts. So a caller who sends
nothing but the question, as `pipeline("text-generation")` or a server does, asks in the training prompt.
"""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data.chat import PREAMBLE_END, Chat, only_thinks
from ibdistill.models.prompt import Prompt


def template(tokenizer: PreTrainedTokenizerBase, config: DataConfig, prompt: Prompt) -> str:
    """The Jinja template. It asks for the student's first stream, or for another one whose name the caller
    sets (`explain`, `reason`). Raises ValueError as `Chat.of` does."""
    chat = Chat.of(tokenizer, config, thinks=only_thinks(prompt.prefixes))
    parts = []
    if any(prompt.prefixes.values()):
        before = _by_stream({stream: _literal(text) for stream, text in prompt.prefixes.items()})
        parts.append(
            f"{{%- set before = {before} -%}}{{%- if messages[-1]['role'] == 'user' -%}}"
            "{%- set messages = messages[:-1] + "
            "[{'role': 'user', 'content': before ~ messages[-1]['content']}] -%}{%- endif -%}"
        )
    if config.system:
        parts.append(
            "{%- if messages[0]['role'] != 'system' -%}{%- set messages = "
            f"[{{'role': 'system', 'content': {_literal(config.system)}}}] + messages -%}}{{%- endif -%}}"
        )
    if "enable_thinking" in chat.template and (chat.quiet or "reason" in prompt.prefixes):
        thinks = _by_stream({stream: str(stream == "reason").lower() for stream in prompt.prefixes})
        parts.append(
            "{%- if enable_thinking is not defined -%}"
            f"{{%- set enable_thinking = {thinks} -%}}{{%- endif -%}}"
        )
    return "".join(parts) + PREAMBLE_END + chat.template if parts else chat.template


def _by_stream(values: dict[str, str]) -> str:
    """A Jinja expression: the value of the first stream, or of one whose name is set."""
    (_, expression), *others = values.items()
    for stream, value in others:
        expression = f"({value} if {stream} else {expression})"
    return expression


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
