"""Text to token ids and back: the one way in which questions, targets and prompts become ids.

Training, decoding, and teachers that write or score all call these functions, so a model is asked in the
very ids that it was trained with. What a tokenizer would add, cut or pad by itself depends on its files
(templates, `add_eos_token`, `truncation_side`) and is never used:

- A question ends with the end token; a decoder-only model reads its separator there (`batches`). A target
  ends with the end token too. Text beyond a limit loses its end and keeps the end token.
- A token in front of the question, which some tokenizers add, belongs to a model's rows and not to the text
  (`tokenizers.bos_of`, `batches`).
- Data is text. A special token that a question, label or rationale happens to spell (`<pad>`,
  `<|endoftext|>`) is split into ordinary tokens: it would end a target, or vanish when the target is read
  back. Only the special tokens of `teacher.template` are obeyed.
- The one exception is `JOINT`. The "Distilling Step-by-Step!" release joins premise and hypothesis of NLI
  by `</s>`, which T5 reads as its end token. So in a *question* it is the boundary of two parts, each of
  which ends with the end token of whatever tokenizer there is: for T5 the published ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

JOINT = "</s>"
"""What stands between the parts of a question that has several."""

Ids = list[int]


def text_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """The ids of each text and nothing else: none is a special token, but for the unknown token."""
    if not texts:
        return []
    plainly = {"add_special_tokens": False, "split_special_tokens": True}
    encoded = tokenizer(list(texts), **plainly)["input_ids"]
    special = special_tokens(tokenizer).keys()
    for i, ids in enumerate(encoded):
        # T5's vocabulary holds `</s>` among its pieces, where splitting finds it again.
        if not special.isdisjoint(ids):
            again = tokenizer([defused(texts[i], tokenizer)], **plainly)["input_ids"][0]
            # Unicode normalisation may still make one, for example from full-width letters.
            encoded[i] = [index for index in again if index not in special]
    return encoded


def question_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """The ids of prefix and question, with the end token behind each part."""
    split = [text.split(JOINT) for text in texts]
    encoded = iter(text_ids([part for parts in split for part in parts], tokenizer))
    eos = tokenizer.eos_token_id
    return [[index for _ in parts for index in [*next(encoded), eos]] for parts in split]


def target_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """The ids of a label or rationale and the end token; none for an empty text."""
    encoded = text_ids(texts, tokenizer)
    return [[*ids, tokenizer.eos_token_id] if text else [] for text, ids in zip(texts, encoded, strict=True)]


def cut(ids: Ids, limit: int) -> Ids:
    """The ids of a question or target within `limit`: what is too long keeps its last one, the end token."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def written_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, bos: int | None) -> list[Ids]:
    """The ids of whole prompts, made from `teacher.template`, and the end token behind them.

    The template's special tokens are obeyed. `bos`, which the caller puts in front, and an end token are not
    doubled where the template has them itself.
    """
    eos = tokenizer.eos_token_id
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    unled = [ids[1:] if ids and ids[0] == bos else ids for ids in encoded]
    return [ids if ids[-1:] == [eos] else [*ids, eos] for ids in unled]


def in_template(question: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> str:
    """The question as `teacher.template` takes it: it spells no special token, its parts are lines, and what
    lies beyond `limit` tokens is cut."""
    question = defused(question.replace(JOINT, "\n"), tokenizer)
    ids = text_ids([question], tokenizer)[0]
    return question if len(ids) <= limit else read_back([ids[:limit]], tokenizer)[0]


def defused(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with a space inside every special token that it spells."""
    for token in special_tokens(tokenizer).values():
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def read_back(sequences: Sequence[Sequence[int]] | Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each sequence of ids, without special tokens."""
    if not len(sequences):
        return []
    return tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> spelling of the tokens that no text may hold.

    These are more than `all_special_tokens`, which leaves out Llama 3's `<|eot_id|>`. The unknown token is
    none of them, since it stands for a part of a text, unless it is the end token too, as GPT-2's.
    """
    found = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        found.pop(tokenizer.unk_token_id, None)
    return found
