"""A teacher's tokenizer, and its head on the student's vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibdistill.data import tokenizers
from ibdistill.models import presets

PROBE = "Ann's 1,250 apples,  \tm² é\n(A) 3.5 + -2 = ?"
"""A text by whose ids tokenizers of one vocabulary differ that normalise or split differently."""
_PADDING_BIAS = -1e4


def own_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the text that a teacher writes. Raises ValueError if it has none."""
    if name not in presets.PRESETS:
        return tokenizers.load_tokenizer(name, "teacher.model")
    if name.startswith("demo-"):
        return tokenizers.demo_tokenizer()
    raise ValueError(
        f"teacher.model is the preset {name!r}, which has no text to write: its weights are random"
    )


def check_vocabulary(
    name: str, tokenizer: PreTrainedTokenizerBase, head_rows: int, own_rows: int
) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, for a preset the student's.

    `head_rows` and `own_rows` are the numbers of rows of the student's head and of the teacher's. Raises
    ValueError unless the teacher reads the student's token ids.
    """
    if name in presets.PRESETS:
        return tokenizer
    theirs = tokenizers.load_tokenizer(name, "teacher.model")
    if getattr(tokenizer, "ends_turns", False):  # their own end tokens were compared before (prepare)
        theirs.eos_token = tokenizer.eos_token
    tokenizers.check_vocabularies(tokenizer, theirs, head_rows, own_rows)
    return theirs


def fit_rows(weight: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """A head [V_teacher, D] with as many rows as the student's: rows are cut, or added as never predicted.

    The tokenizers are the same, so rows that only one of the two heads has are padding. If the logits are
    capped, added rows get the least logit that the cap allows.
    """
    have = weight.shape[0]
    if have == rows:
        return weight, bias
    if have > rows:
        return weight[:rows], None if bias is None else bias[:rows]
    bias = weight.new_zeros(have) if bias is None else bias
    padding = weight.new_full((rows - have,), _PADDING_BIAS)
    return torch.cat([weight, weight.new_zeros(rows - have, weight.shape[1])]), torch.cat([bias, padding])
