"""Decoding by vLLM, where that is installed: `evaluate_student.py --eval.engine vllm`.

The smallest surface: token ids go in and come out. Prompts and texts are made here, as for our own decoding,
so greedy answers are the same up to rounding. Samples are not, since vLLM draws random numbers of its own.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ibdistill.data import id_rows, token_ids
from ibdistill.models import families
from ibdistill.models.decoding import Answer, Sampling
from ibdistill.runtime.distributed import World


class Engine:
    """A student that vLLM runs."""

    def __init__(self, source: str, config: PreTrainedConfig, world: World) -> None:
        """Load the student of a folder or hub name. Raises ValueError if vLLM is missing, or has no part for
        such a student or several ranks."""
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "eval.engine is 'vllm', and vllm is not installed; install it (pip install vllm), best in an "
                "environment of its own, or take eval.engine transformers"
            )
        if world.size > 1:
            raise ValueError(
                f"eval.engine is 'vllm', and there are {world.size} ranks; start one process, since vLLM "
                "spreads over GPUs by itself"
            )
        if families.family(config) != families.DECODER_ONLY:
            raise ValueError(
                f"eval.engine is 'vllm', which runs decoder-only models, and the student is a "
                f"{config.model_type!r} model; take eval.engine transformers"
            )
        import vllm

        self._config, self._parameters = config, vllm.SamplingParams
        # the folder's generation settings stay out, as vLLM would mix them into ours
        self._llm = vllm.LLM(model=source, skip_tokenizer_init=True, generation_config="vllm")

    def decode(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_question_tokens: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        **_: Any,
    ) -> list[Answer]:
        """As `decoding.decode`; the model, the device and the size of batches are vLLM's own affair."""
        around = families.layout(self._config, tokenizer)
        prompts = [
            id_rows.prompts([question], tokenizer, max_question_tokens, **around)[0][0].tolist()
            if isinstance(question, str)
            else list(question)
            for question in questions
        ]
        if not prompts:
            return []
        eos = tokenizer.eos_token_id
        common = {"max_tokens": max_new_tokens, "logprobs": 1, "detokenize": False, "stop_token_ids": [eos]}
        if sampling is None:
            parameters = [self._parameters(temperature=0.0, **common)] * len(prompts)
        else:
            # the first of a text's random numbers, which has 24 bits, is its seed
            seeds = (sampling.draws[:, 0].double() * 2**24).long().tolist()
            drawn = common | {"temperature": sampling.temperature, "top_p": sampling.top_p}
            parameters = [self._parameters(seed=seed, **drawn) for seed in seeds]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters)
        return [_answer(output.outputs[0], tokenizer) for output in outputs]


def _answer(output: Any, tokenizer: PreTrainedTokenizerBase) -> Answer:
    """vLLM's output; it says the log-probabilities of the written token and of the most probable one."""
    ids = tuple(output.token_ids)
    log_probs = tuple(max(one.logprob for one in place.values()) for place in output.logprobs)
    text = token_ids.read_back([ids], tokenizer)[0]
    return Answer(text, math.exp(sum(log_probs)), math.exp(log_probs[0]), ids, log_probs)
