"""The trained student as a folder that transformers loads and that answers as it was evaluated.

Besides the weights it holds `generation_config.json` (greedy, with a length), `prompt.json` (`prompt`, for
`ask.py`), a chat template that gives the prompts of training, and a model card (`model_card`).
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import Config
from ibdistill.data import id_rows
from ibdistill.data.token_ids import JOINT
from ibdistill.models import chat_template as student_template
from ibdistill.models import depth, model_card
from ibdistill.models.families import greedy, layout
from ibdistill.models.merging import merged
from ibdistill.models.prompt import Prompt

logger = logging.getLogger("ibdistill")

_PROBES = (
    "how many ?",
    "How many are there in all?",
    "Is it (a) or (b)",
    'She said "yes."',
    "3 + 4 =",
    "7",
    "x",
    "\N{KATAKANA LETTER A}",
    "wait...",
    "a\nb",
)
"""Questions with common endings, beside those that the vocabulary may join with what follows (`_joined`)."""


def write(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, config: Config, scores: Any = None
) -> None:
    """Write the student for `from_pretrained`: safetensors, tokenizer, and a model card with its `scores`.

    LoRA adapters are merged into a copy of the weights. The tokenizer's own chat template, which a student
    of format plain never saw, gives way to one that makes its prompts, or to none; then card and log say why.
    """
    model = merged(model)
    prompt = Prompt.of(model, tokenizer, config)
    model.save_pretrained(folder, safe_serialization=True)
    greedy(model.config, tokenizer, max(prompt.limits.values())).save_pretrained(folder)
    prompt.write(folder)
    tokenizer, why_none = copy.deepcopy(tokenizer), ""
    if config.data.format == "chat":
        tokenizer.chat_template = student_template.template(tokenizer, config.data, prompt)
    else:
        try:
            tokenizer.chat_template = chat_template(model, tokenizer, prompt)
        except ValueError as error:
            tokenizer.chat_template, why_none = None, str(error)
            logger.warning("the exported student has no chat template: %s", why_none)
    tokenizer.save_pretrained(folder)
    kept = getattr(model.config, depth.KEPT, None) or {}
    text = model_card.card(config, prompt, scores, why_no_template=why_none, kept=kept)
    (folder / "README.md").write_text(text, encoding="utf-8")


def lines(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: Config, folder: Path) -> str:
    """The lines of plain transformers that ask the student in `folder` as it was evaluated."""
    return model_card.usage(Prompt.of(model, tokenizer, config), str(folder))


def chat_template(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """A Jinja template that renders the last user message as the student's prompt: that of its first stream,
    or of another one whose name the caller sets (`explain`, `reason`).

    A template makes text, and some vocabularies (Qwen's, Llama 3's) join `?` and the separator, a newline, to
    one token, which was never in a training prompt. Raises ValueError where a question with such an ending
    gets other ids than in training. A question that ends in white space is not asked about: many vocabularies
    join that.
    """
    prefix, *others = (json.dumps(text) for text in prompt.prefixes.values())
    for name, text in zip(list(prompt.prefixes)[1:], others, strict=True):
        prefix = f"({text} if {name} else {prefix})"
    start, end = ("" if i is None else tokenizer.decode([i]) for i in (prompt.start, prompt.end))
    question = f"question.replace({json.dumps(JOINT)}, {json.dumps(end)})"
    template = (
        "{%- set question = (messages | selectattr('role', 'equalto', 'user') | list | last)['content'] -%}"
        f"{{{{- {json.dumps(start)} ~ {prefix} ~ {question} ~ {json.dumps(end)} -}}}}"
    )
    limit, around = prompt.question_limit, layout(model, tokenizer)
    for stream, before in prompt.prefixes.items():
        for probe in [*_PROBES, *_joined(tokenizer, prompt.end)]:
            expected, _ = id_rows.prompts([before + probe], tokenizer, limit, **around)
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": probe}],
                chat_template=template,
                return_dict=False,
                **{name: name == stream for name in prompt.prefixes},
            )
            if list(ids) != expected[0].tolist():
                ours, theirs = (tokenizer.batch_decode([[i] for i in row[-2:]]) for row in (expected[0], ids))
                raise ValueError(
                    f"behind the question {probe!a} the prompt of training ends with the tokens {ours}, and "
                    f"a text with {theirs}, because the tokenizer joins the question's last character and "
                    f"the {end!a} behind it"
                )
    return template


def _joined(tokenizer: PreTrainedTokenizerBase, end: int) -> list[str]:
    """What the pieces of the vocabulary that end with the separator have before it, where that does not end
    in white space."""
    separator, text = tokenizer.convert_ids_to_tokens(end), tokenizer.decode([end])
    pieces = [i for piece, i in tokenizer.get_vocab().items() if piece.endswith(separator) and i != end]
    found = (own.removesuffix(text) for own in tokenizer.batch_decode([[i] for i in sorted(pieces)]))
    return [own for own in found if own == own.rstrip() != ""]
