"""How servers are asked for the log-probabilities of a prompt, and what their answers say.

A schema turns token ids (or, for the probe, a text) into a request and an answer into `Scored`. Another kind
of server is another class here and a line in `SCHEMAS`.

- vLLM: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html, `prompt_logprobs`
- SGLang: https://docs.sglang.ai/basic_usage/native_api.html, `return_logprob` and `top_logprobs_num`

Both also say what they give to tokens that the request names, whether or not these are probable:

- vLLM: docs/training/prompt_token_id_logprobs.md of its repository, from September 2026
- SGLang: the page above, `token_ids_logprob`
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

ROUNDING = 1e-3
"""How far log-probabilities, and the sum of probabilities, may be from what must hold exactly."""
Pair = tuple[int, float]
"""A token id and its log-probability."""


class Scored(NamedTuple):
    """What a server says about a prompt of n tokens; entry i is about token i + 1."""

    own: np.ndarray
    """[n - 1] the log-probability of the prompt's own token."""
    ids: np.ndarray
    """[n - 1, k] int64, the most probable tokens, the most probable first."""
    logprobs: np.ndarray
    """[n - 1, k] their log-probabilities at temperature 1."""


class Schema(Protocol):
    """One way to ask for the log-probabilities of a prompt."""

    route: str
    candidates_route: str

    def request(self, model: str, prompt: str | Sequence[int], k: int) -> dict[str, Any]:
        """The body of a request for the k most probable tokens at every place of a text or of token ids."""

    def pairs(self, answer: Any, ids: Sequence[int], k: int) -> tuple[list[float], list[list[Pair]]]:
        """Of every token but the first: its log-probability, and the k most probable tokens in order.

        Raises ValueError if the answer is about other token ids; of one of another form, KeyError, TypeError,
        IndexError, ValueError or AttributeError.
        """

    def request_given(
        self, model: str, ids: Sequence[int], start: int, candidates: np.ndarray
    ) -> dict[str, Any]:
        """The body of a request for given tokens. Row i of `candidates` [n - 1 - start, k] is about token
        start + i + 1; -1: no candidate."""

    def given(self, answer: Any, ids: Sequence[int], start: int, candidates: np.ndarray) -> np.ndarray:
        """The candidates' log-probabilities, in their places. Raises as `pairs` does."""


class VLLM:
    """vLLM's `/v1/completions`. A place has k entries, and one more if its own token is not among them."""

    route = "/v1/completions"
    candidates_route = "/inference/v1/generate"

    def request(self, model: str, prompt: str | Sequence[int], k: int) -> dict[str, Any]:
        """As `Schema` says."""
        asked = prompt if isinstance(prompt, str) else list(prompt)
        return {"model": model, "prompt": asked, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}

    def pairs(self, answer: Any, ids: Sequence[int], k: int) -> tuple[list[float], list[list[Pair]]]:
        """As `Schema` says."""
        places = answer["choices"][0]["prompt_logprobs"]
        if len(places) != len(ids):
            raise ValueError(_other_tokens(f"{len(places)} tokens", ids))
        own, top = [], []
        for token, place in zip(ids[1:], places[1:], strict=True):
            pairs = {int(name): float(entry["logprob"]) for name, entry in place.items()}
            if token not in pairs:
                raise ValueError(_other_tokens(f"candidates {sorted(pairs)[:5]} without token {token}", ids))
            own.append(pairs[token])
            if len(pairs) == k + 1:
                del pairs[token]
            top.append(sorted(pairs.items(), key=lambda pair: -pair[1]))  # JSON objects have no order
        return own, top

    def request_given(
        self, model: str, ids: Sequence[int], start: int, candidates: np.ndarray
    ) -> dict[str, Any]:
        """As `Schema` says."""
        given = {"prompt_logprob_token_ids": candidates.tolist(), "prompt_logprob_start": start}
        sampling = {"max_tokens": 1, "temperature": 1.0, **given}
        return {"model": model, "token_ids": list(ids), "sampling_params": sampling}

    def given(self, answer: Any, ids: Sequence[int], start: int, candidates: np.ndarray) -> np.ndarray:
        """As `Schema` says; the answer is a matrix of these as the base64 text of a .npy file."""
        if (text := answer.get("prompt_token_id_logprobs")) is None:
            raise ValueError(
                "its answer has no prompt_token_id_logprobs; start a vLLM that has them with "
                "VLLM_USE_V2_MODEL_RUNNER=1, or set teacher.server_candidates teacher"
            )
        try:
            return np.lib.format.read_array(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
        except ValueError as error:
            raise TypeError(str(error)) from error


class SGLang:
    """SGLang's `/generate`, whose answer names the prompt's own tokens, and k candidates for each."""

    route = candidates_route = "/generate"

    def request(self, model: str, prompt: str | Sequence[int], k: int) -> dict[str, Any]:
        """As `Schema` says; the server has one model, and its name is not asked for."""
        asked = {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
        return asked | {
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
        }

    def pairs(self, answer: Any, ids: Sequence[int], k: int) -> tuple[list[float], list[list[Pair]]]:
        """As `Schema` says."""
        said = answer["meta_info"]
        covered = [entry[1] for entry in said["input_token_logprobs"]]
        if covered != list(ids):
            raise ValueError(_other_tokens(f"token ids {covered}", ids))
        own = [float(entry[0]) for entry in said["input_token_logprobs"][1:]]
        return own, [[(int(e[1]), float(e[0])) for e in place] for place in said["input_top_logprobs"][1:]]

    def request_given(
        self, model: str, ids: Sequence[int], start: int, candidates: np.ndarray
    ) -> dict[str, Any]:
        """As `Schema` says. The server takes one list for all places, so it gets the union of all rows."""
        union = np.unique(candidates[candidates >= 0]).tolist()
        body = self.request(model, ids, 0)
        return body | {"logprob_start_len": start, "token_ids_logprob": union}

    def given(self, answer: Any, ids: Sequence[int], start: int, candidates: np.ndarray) -> np.ndarray:
        """As `Schema` says; an answer's first entry stands for token `start` and is empty."""
        said = answer["meta_info"]
        covered = [entry[1] for entry in said["input_token_logprobs"]]
        if covered != list(ids[start:]):
            raise ValueError(_other_tokens(f"token ids {covered} from place {start} on", ids))
        places, found = said["input_token_ids_logprobs"][1:], []
        if len(places) != len(candidates):
            raise ValueError(f"it is about {len(places)} places, and {len(candidates)} were asked for")
        for row, place in zip(candidates.tolist(), places, strict=True):
            logprobs = {int(entry[1]): float(entry[0]) for entry in place} | {-1: -np.inf}
            if lacking := [token for token in row if token not in logprobs]:
                raise ValueError(f"it says nothing about the tokens {lacking[:5]}, which were asked for")
            found.append([logprobs[token] for token in row])
        return np.array(found)


SCHEMAS: dict[str, Schema] = {"vllm": VLLM(), "sglang": SGLang()}


def read(schema: Schema, answer: Any, ids: Sequence[int], k: int, rows: int) -> Scored:
    """An answer about these token ids, whose every number is what a log-probability can be.

    Args:
        k: how many candidates were asked for.
        rows: the size of the vocabulary; token ids are below it.

    Raises ValueError that says what differs.
    """
    k = min(k, rows)
    try:
        own_list, top = schema.pairs(answer, ids, k)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _other_form(schema, error) from error
    if len(top) != len(ids) - 1 or any(len(place) != k for place in top):
        counts = sorted({len(place) for place in top})
        raise ValueError(
            f"it gives {counts} candidates at {len(top)} places, and {k} at {len(ids) - 1} were asked for; "
            "raise the server's limit, or lower teacher.cache_top_k"
        )
    own = np.array(own_list)
    numbers = np.array(top, dtype=np.float64).reshape(len(top), k, 2)
    found = Scored(own, numbers[..., 0].astype(np.int64), numbers[..., 1])
    _check(found, np.asarray(ids[1:]), rows)
    return found


def read_given(
    schema: Schema, answer: Any, ids: Sequence[int], start: int, candidates: np.ndarray
) -> np.ndarray:
    """[n - 1 - start, k] what `Schema.given` finds, each of which can be a log-probability; without a
    candidate (-1) it is -inf. Raises ValueError that says what differs."""
    try:
        found = np.asarray(schema.given(answer, ids, start, candidates), dtype=np.float64)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _other_form(schema, error) from error
    if found.shape != candidates.shape:
        raise ValueError(
            f"it gives log-probabilities of shape {found.shape}, and {candidates.shape} were asked for"
        )
    found = np.where(candidates < 0, -np.inf, found)
    if not np.isfinite(found[candidates >= 0]).all():
        raise ValueError("its log-probabilities have values that are not finite (NaN or infinite)")
    if (mass := np.exp(found).sum(1).max(initial=0)) > 1 + ROUNDING:
        raise ValueError(f"the probabilities of its candidates add up to {mass:.4f}, more than 1")
    return found


def _check(found: Scored, tokens: np.ndarray, rows: int) -> None:
    """Raise ValueError unless these can be a distribution's most probable tokens.

    `tokens`: [n - 1] the prompt's own.
    """
    own, ids, logprobs = found
    if not (np.isfinite(own).all() and np.isfinite(logprobs).all()):
        raise ValueError("its log-probabilities have values that are not finite (NaN or infinite)")
    if max(own.max(initial=-1), logprobs.max(initial=-1)) > ROUNDING:
        raise ValueError(f"it gives a log-probability of {max(own.max(), logprobs.max()):g}, above 0")
    if (np.diff(logprobs, axis=1) > 0).any():
        raise ValueError("its candidates are not in order, the most probable first")
    if (ids < 0).any() or (ids >= rows).any():
        raise ValueError(
            f"it gives token id {int(ids.max())}, and the student's head has {rows} rows; the vocabulary is "
            "another, or a row that is padding is not"
        )
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise ValueError("it gives the same token twice at one place")
    mass = np.exp(logprobs).sum(1).max(initial=0)
    if mass > 1 + ROUNDING:
        raise ValueError(f"the probabilities of its candidates add up to {mass:.4f}, more than 1")
    among = ids == tokens[:, None]
    said = np.where(among, logprobs, 0).sum(1)
    wrong = np.where(among.any(1), np.abs(own - said), own - logprobs[:, -1]) > ROUNDING
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"token {int(tokens[at])} of the prompt has log-probability {own[at]:.4f}, which contradicts its "
            f"candidates there (from {logprobs[at, 0]:.4f} down to {logprobs[at, -1]:.4f})"
        )


def _other_form(schema: Schema, error: Exception) -> ValueError:
    """What is raised for an answer that cannot be read."""
    what = f"{type(error).__name__} {str(error)[:100]}"
    return ValueError(
        f"its answer has not the form of teacher.server_schema {type(schema).__name__.lower()} ({what})"
    )


def _other_tokens(theirs: str, ids: Sequence[int]) -> str:
    """What a message says where an answer is about other tokens than those asked about."""
    return (
        f"its answer is about other tokens than the teacher's tokenizer gives ({theirs[:200]}; ours are "
        f"{len(ids)}: {str(list(ids))[:200]}); serve the model whose tokenizer teacher.model has"
    )
