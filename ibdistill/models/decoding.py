"""Text from a model: greedy decoding, or sampling with given random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ibdistill.data import id_rows, token_ids
from ibdistill.models import families
from ibdistill.runtime import files


class Answer(NamedTuple):
    """A generated text and the probabilities that the model gave to it."""

    text: str
    confidence: float
    """Probability of the whole text, with the end token if it was reached within the limit."""
    first_confidence: float
    """Probability of the first token."""
    ids: tuple[int, ...] = ()
    """The generated tokens, with the end token if it was reached."""
    log_probs: tuple[float, ...] = ()
    """The log-probability of the greedy token at each of these places."""


class _Confidence(LogitsProcessor):
    """Keeps the log-probability of the greedy token of each step: [B] per step instead of [B, V]."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log_probs.append(scores.amax(-1) - scores.logsumexp(-1))
        return scores

    def of(self, generated: Tensor, eos: int) -> tuple[list[float], list[float]]:
        """Probabilities of the whole texts and of their first tokens, [B] each. `generated` [B, T] may hold
        padding behind `eos`."""
        log_probs = self._log_probs()
        whole = torch.where(_is_real(generated, eos), log_probs, 0.0).sum(1).exp()
        return whole.tolist(), log_probs[:, 0].exp().tolist()

    def tokens(self, generated: Tensor, eos: int) -> tuple[list[tuple[int, ...]], list[tuple[float, ...]]]:
        """The ids of each text and their log-probabilities, with the end token and without what follows."""
        lengths = _is_real(generated, eos).sum(1).tolist()
        ids, log_probs = (
            [tuple(row[:n]) for row, n in zip(table.tolist(), lengths, strict=True)]
            for table in (generated, self._log_probs())
        )
        return ids, log_probs

    def _log_probs(self) -> Tensor:
        return torch.stack(self.log_probs, dim=1).double()


def _is_real(generated: Tensor, eos: int) -> Tensor:
    """[B, T] bool: the generated tokens, the end token included, and not what follows it."""
    ends = generated == eos
    return ends.cumsum(1) - ends.long() == 0


class Sampling(NamedTuple):
    """What turns greedy decoding into sampling."""

    temperature: float
    draws: Tensor
    """[questions, max_new_tokens] fp32 in [0, 1): the random number behind each token. The caller gives
    them, so that a question's answer does not depend on which others are decoded with it."""
    top_p: float = 1.0
    """Draw from the most probable tokens alone, as many as have this probability together."""


def draws(keys: Sequence[str], limit: int) -> Tensor:
    """[keys, limit] fp32 in [0, 1): random numbers that depend on the key alone."""
    seeds = (int.from_bytes(files.digest(key.encode(), 16), "little") for key in keys)
    rows = [np.random.Generator(np.random.PCG64(seed)).random(limit, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack([*rows])) if keys else torch.empty(0, limit)


class _Draw(LogitsProcessor):
    """Leaves one token per row: the one at which the cumulated probabilities pass the row's random number."""

    def __init__(self, temperature: float, draws: Tensor, top_p: float = 1.0) -> None:
        self._temperature, self._draws, self._top_p = temperature, iter(draws.T), top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores.float() / self._temperature, -1)
        if self._top_p < 1:
            falling, order = probabilities.sort(descending=True, stable=True)
            beyond = falling.cumsum(-1) - falling >= self._top_p  # what precedes it has the share already
            probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
        cumulated = probabilities.cumsum(-1)
        bound = next(self._draws)[:, None] * cumulated[:, -1:]
        chosen = (cumulated <= bound).sum(-1, keepdim=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


@torch.no_grad()
def decode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_question_tokens: int,
    max_new_tokens: int,
    device: torch.device,
    batch_size: int = 64,
    as_written: bool = False,
    sampling: Sampling | None = None,
    synced: bool = False,
    cache: str = "dynamic",
) -> list[Answer]:
    """The greedy answers to `questions` (with their prefix), in their order.

    Questions that are token ids are whole prompts (`data.chat`, `models.prompt`), read as they are.
    Questions of similar length are decoded together.

    Args:
        as_written: the questions are whole prompts, made from `teacher.template`. A decoder-only model gets
            the text alone, without the separator that our students expect.
        sampling: draw the tokens instead; the probabilities in the answers remain those of greedy tokens.
        synced: go on until all ranks have finished, as a sharded model needs. Each rank must then have the
            same number of batches.
        cache: `dynamic` keys and values grow with the text; `static` ones have their full length from the
            start, in one piece of memory; `compiled` are static, and torch compiles the step on a GPU.
    """
    kept: dict[str, Any] = {}
    if cache != "dynamic":
        kept = {"cache_implementation": "static", "disable_compile": cache == "static"}
    layout = families.layout(model, tokenizer)
    decoder_only = families.family(model) == families.DECODER_ONLY
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        texts = [questions[i] for i in indices]
        if isinstance(texts[0], str):
            input_ids, mask = id_rows.prompts(
                texts, tokenizer, max_question_tokens, **layout, as_written=as_written
            )
        else:
            input_ids, mask = id_rows.whole_prompts(texts, layout["pad"], left=decoder_only)
        confidence = _Confidence()
        draw = []
        if sampling:
            numbers = sampling.draws[indices].to(device)
            draw = [_Draw(sampling.temperature, numbers, sampling.top_p)]
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([confidence, *draw]),
            synced_gpus=synced,
            **kept,
        )
        if decoder_only:
            output = output[:, input_ids.shape[1] :]
        texts = token_ids.read_back(output, tokenizer)
        generated, eos = output[:, -len(confidence.log_probs) :], tokenizer.eos_token_id
        columns = texts, *confidence.of(generated, eos), *confidence.tokens(generated, eos)
        answers |= {i: Answer(*parts) for i, *parts in zip(indices, *columns, strict=True)}
    return [answers[i] for i in range(len(questions))]
