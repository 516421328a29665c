"""Conversations under a tokenizer's own chat template: prompts and targets of `data.format` chat.

A template is never taken apart or rebuilt here. Each conversation is rendered three times: up to the
assistant's turn, as a generation prompt; as a whole; and as a whole with placeholders for the assistant's
words, which show where these words stand. The token ids of the whole conversation have to begin with those of
the generation prompt, and the rest of them is the target. So a student reads the same tokens in training as
when it is asked.

- A target ends with the first special token behind the assistant's words, the **turn's end**. What the
  template writes behind that token (mostly a newline) is neither learned nor generated. The tokenizer's end
  token is set to the turn's end (`adopt_turn_end`), so decoding, the exported student and the teacher all
  stop there.
- The ids are those of `apply_chat_template`: there is one BOS if the template writes one, and none otherwise.
- A rationale stands in `reasoning_content` if the template takes that and puts it between the tags that are
  expected, else before the answer within `data.think_open` and `data.think_close`. The labels of the predict
  stream and the rationales of the explain stream are rendered with `enable_thinking` false: templates that
  know this setting put an empty block of thoughts into the prompt, and others ignore it. If a template puts
  such a block into the whole conversation but not into the prompt, the student learns to write the block, and
  `visible` removes it.
- What users and assistants say is text: a special token or tag that it spells is broken up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ibdistill.config.sections import DataConfig
from ibdistill.data import token_ids
from ibdistill.data.llm_text import untagged

if TYPE_CHECKING:  # the readers of files are imported where there is no torch yet
    from transformers import PreTrainedTokenizerBase

Ids, Message = list[int], dict[str, str]
OPEN, CLOSE = "<think>", "</think>"
PREAMBLE_END = "{#- end of what ibdistill puts before the tokenizer's own template -#}"
"""What follows it in the template of an exported student is the template of training."""
DATED = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"
"""What precedes a template that writes the day's date: with it, a student would be trained, resumed and asked
in different prompts. This is the date that Llama 3.1's template takes where it is told none."""
_THOUGHT, _SAID = "\ue000\ue001", "\ue002\ue003"
"""Private characters as placeholders for the assistant's rationale and answer."""
_AROUND, _CHUNK = 40, 512


class Row(NamedTuple):
    """A conversation as token ids."""

    prompt: Ids
    """Everything before the assistant's words, the opening of its turn included."""
    rationale: Ids
    """The rationale with the tags around it; empty without one."""
    tail: int
    """The number of tokens of the rationale that follow its last word."""
    answer: Ids
    """What follows, to the turn's end."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer's template, and how a run uses it."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    system: str
    tags: tuple[str, str]
    by_field: bool
    """Whether a rationale is given to the template as `reasoning_content`, and not within the text."""
    end: int
    """The token that ends a turn of the assistant."""
    quiet: bool = True
    """Whether `enable_thinking` false goes to the template where there is no rationale."""
    empty_thoughts: bool = False
    """Whether the template then puts an empty block of thoughts into the target."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, thinks: bool = False) -> Chat:
        """The tokenizer's template under the settings of a run. `thinks`: for rationales, and then nothing
        else has to work, as templates of models that always think can do nothing else.

        Raises ValueError if there is no template, or if it cannot be used; the message says why.
        """
        chat = cls(tokenizer, own_template(tokenizer), config.system, tags_of(config), by_field=False, end=-1)
        if not thinks:
            return chat._without_thoughts(config)
        try:
            return chat._with_thoughts()
        except ValueError:
            chat._without_thoughts(config)  # which names what is wrong apart from rationales
            raise

    def _without_thoughts(self, config: DataConfig) -> Chat:
        """The template with the turn's end that it writes, and what it does where there is no rationale."""
        chat, probe = self, ("", (), "a", None, "b")
        try:
            [row] = chat.rows([probe])
        except ValueError:
            chat = replace(chat, quiet=False)  # for a template whose empty thoughts stand in the prompt alone
            [row] = chat.rows([probe])
        text = token_ids.read_back([row.answer], self.tokenizer)[0]
        return replace(chat, end=row.answer[-1], empty_thoughts=visible(text, config) != text)

    def _with_thoughts(self) -> Chat:
        """The template with the form in which it takes rationales. Raises ValueError if it takes none."""
        found = []
        for by_field in (True, False) if "reasoning_content" in self.template else (False,):
            chat = replace(self, by_field=by_field)
            try:
                [row] = chat.rows([("", (), "a", "b", "c")])
            except ValueError as error:
                found.append(str(error))
                continue
            text = token_ids.read_back([row.rationale], self.tokenizer)[0]
            if text.split() and text.split()[-1].endswith(self.tags[1]):
                return replace(chat, end=row.answer[-1])
            found.append(f"it writes {_shown(text)} for the rationale 'b'")
        raise ValueError(
            f"the tokenizer's chat template, or its special tokens, swallow the tags {self.tags[0]!r} and "
            f"{self.tags[1]!r} around a rationale ({found[0]}). Give others in data.think_open and "
            "data.think_close, words of ordinary text if need be"
        )

    def messages(self, system: str, history: Sequence[tuple[str, str, str]], user: str) -> list[Message]:
        """A conversation up to the assistant's turn; `history` holds (role, text, rationale)."""
        found = [{"role": "system", "content": system}] if (system := system or self.system) else []
        for role, text, rationale in history:
            turn = {"role": role, "content": self.defused(text)}
            if rationale and "reasoning_content" in self.template:
                turn["reasoning_content"] = self.defused(rationale)
            found.append(turn)
        return [*found, {"role": "user", "content": user}]

    def defused(self, text: str) -> str:
        """The text without special tokens and tags."""
        for tag in self.tags:
            text = text.replace(tag, f"{tag[0]} {tag[1:]}") if tag.startswith("<") else text
        return token_ids.defused(text, self.tokenizer)

    def text(self, messages: list[Message], *, prompt: bool = False, thinks: bool = False) -> str:
        """What the template makes of a conversation. Raises ValueError if it refuses it."""
        settings = {"enable_thinking": thinks} if thinks or self.quiet else {}
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=(DATED if "strftime_now" in self.template else "") + self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                **settings,
            )
        except Exception as error:  # of a template: anything
            roles, said = ", ".join(message["role"] for message in messages), str(error)[:200]
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of {roles} ({said})"
                + ("; leave data.system out" if messages[0]["role"] == "system" else "")
            ) from error

    def prompts(self, conversations: Sequence[tuple[str, Sequence, str]], *, thinks: bool) -> list[Ids]:
        """The generation prompts of (system, history, user's text)."""
        texts = [self.text(self.messages(*c), prompt=True, thinks=thinks) for c in conversations]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def rows(self, conversations: Sequence[tuple[str, Sequence, str, str | None, str]]) -> list[Row]:
        """Prompts and targets of (system, history, user's text, rationale or None, answer).

        Raises ValueError if the whole does not begin with the prompt, if the template changes or leaves out
        what the assistant says, or if no special token ends its turn.
        """
        found = []
        for first in range(0, len(conversations), _CHUNK):
            rendered = [self._rendered(*c) for c in conversations[first : first + _CHUNK]]
            prompts, wholes = ([r[i] for r in rendered] for i in (0, 1))
            plainly: dict[str, Any] = {"add_special_tokens": False}
            ids = self.tokenizer(prompts, **plainly)["input_ids"]
            whole = self.tokenizer(wholes, **plainly, return_offsets_mapping=True)
            parts = zip(ids, whole["input_ids"], whole["offset_mapping"], rendered, strict=True)
            found += [self._row(*part) for part in parts]
        return found

    def _rendered(
        self, system: str, history: Sequence, user: str, rationale: str | None, answer: str
    ) -> tuple[str, str, int, int, int]:
        """The prompt and the whole conversation as text, and three places in the latter: where the rationale
        ends, where the answer begins, and where it ends."""
        messages, thinks = self.messages(system, history, user), rationale is not None

        def whole(thought: str, said: str) -> str:
            return self.text([*messages, self._turn(thought if thinks else None, said)], thinks=thinks)

        prompt = self.text(messages, prompt=True, thinks=thinks)
        thought, said = self.defused(untagged(rationale or "", self.tags)), self.defused(answer).strip()
        text, frame = whole(thought, said), whole(_THOUGHT, _SAID)
        head, has_answer, tail = frame.partition(_SAID)
        if not has_answer:
            raise ValueError(
                "the tokenizer's chat template leaves out what the assistant says, as one without an "
                f"assistant role does: it makes {_shown(frame[-2 * _AROUND :])} of a whole conversation. "
                "Take a tokenizer whose template has that role, or data.format plain"
            )
        between = ""
        if thinks:
            head, has_thought, between = head.partition(_THOUGHT)
            if not has_thought or not _agrees(head, between, self.tags):
                raise ValueError(f"it swallows the tags: {_shown(frame[-2 * _AROUND :])}")
        if text != head + thought + between + said + tail:
            raise ValueError(
                "the tokenizer's chat template changes what the assistant says: of "
                f"{_shown(said)} it makes {_shown(text[len(head) :])}; take another tokenizer, or "
                "data.format plain"
            )
        stop = len(text) - len(tail)
        return prompt, text, len(head) + len(thought), stop - len(said), stop

    def _turn(self, thought: str | None, said: str) -> Message:
        if thought is None:
            return {"role": "assistant", "content": said}
        if self.by_field:
            return {"role": "assistant", "reasoning_content": thought, "content": said}
        opened, closed = self.tags
        return {"role": "assistant", "content": f"{opened}\n{thought}\n{closed}\n\n{said}"}

    def _row(self, prompt: Ids, ids: Ids, spans: list[tuple[int, int]], rendered: tuple) -> Row:
        same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        if same < len(prompt) or len(ids) <= len(prompt):
            ours, theirs = (
                self.tokenizer.decode(part[max(0, same - 8) : same + 8]) for part in (prompt, ids)
            )
            raise ValueError(
                "the tokenizer's chat template renders a whole conversation otherwise than the prompt that "
                f"asks for its last turn: from token {same} on the prompt goes {_shown(ours)} and the whole "
                f"{_shown(theirs)}. A student would be asked in other tokens than it learned; take a "
                "tokenizer "
                "whose template keeps the prompt, or data.format plain"
            )
        _, text, thought_stop, answer_start, answer_stop = rendered
        thinks, special = answer_start > thought_stop, {*token_ids.special_tokens(self.tokenizer)}
        special.add(self.tokenizer.eos_token_id)
        places = range(len(prompt), len(ids))
        end = next((i for i in places if spans[i][0] >= answer_stop and ids[i] in special), None)
        if end is None:
            raise ValueError(
                "the tokenizer's chat template puts no special token behind the assistant's words: they end "
                f"with {_shown(text[-_AROUND:])}, after which a student would not stop. Take a tokenizer "
                "whose template ends a turn, or data.format plain"
            )
        first = next(i for i in places if spans[i][1] > answer_start or i == end) if thinks else len(prompt)
        tail = sum(spans[i][0] >= thought_stop for i in range(len(prompt), first))
        return Row(prompt, ids[len(prompt) : first], tail, ids[first : end + 1])


def only_thinks(streams: Iterable[str]) -> bool:
    """Whether a student of these streams always writes a rationale and an answer."""
    return set(streams) == {"reason"}


def tags_of(config: DataConfig) -> tuple[str, str]:
    """What stands before and behind a rationale of the reason stream."""
    return config.think_open or OPEN, config.think_close or CLOSE


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of the tokenizer, without what an export put before it. Raises ValueError without one."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            "data.format is 'chat', and the tokenizer has no chat template; take the tokenizer of an "
            "instructed model of the family (student.tokenizer), or data.format plain"
        ) from error
    _, _, own = template.rpartition(PREAMBLE_END)
    return own


def adopt_turn_end(tokenizer: PreTrainedTokenizerBase, config: DataConfig, streams: Iterable[str]) -> None:
    """Let the tokenizer's end token be that of an assistant's turn. Raises ValueError as `Chat.of` does."""
    end = Chat.of(tokenizer, config, thinks=only_thinks(streams)).end
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.ends_turns = True


def visible(text: str, config: DataConfig) -> str:
    """A label or rationale without the empty block of thoughts that some templates put before it."""
    opened, closed = tags_of(config)
    rest = text.lstrip().removeprefix(opened).lstrip()
    return rest.removeprefix(closed).lstrip() if rest.startswith(closed) else text


def _agrees(head: str, between: str, tags: tuple[str, str]) -> bool:
    """Whether a rationale stands within the tags, of which the prompt may hold the first."""
    return head.rstrip().endswith(tags[0]) and between.strip() == tags[1]


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 3 * _AROUND else f"{shown[: 3 * _AROUND]}..."
