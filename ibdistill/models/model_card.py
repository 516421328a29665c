"""The model card of an exported student: what it is made of, how to ask it, and how it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ibdistill.config.fields import to_flat
from ibdistill.config.methods import METHODS
from ibdistill.config.sections import Config, ObjectiveConfig
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.token_ids import JOINT
from ibdistill.models import card_head
from ibdistill.models.prompt import Prompt, tasks_of
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.sampled_token import SAMPLED

_RATIONALES = (
    'learning labels and rationales as two tasks: Hsieh et al., "Distilling Step-by-Step!", Findings of ACL '
    "2023, arXiv 2305.02301"
)
_REASONING = (
    'learning the rationale and then the answer as one text: Ho et al., "Large Language Models Are '
    'Reasoning Teachers", ACL 2023, arXiv 2212.10071'
)
_MUTUAL_INFORMATION = (
    'Chen et al., "Learning to Maximize Mutual Information for Chain-of-Thought Distillation", Findings of '
    "ACL 2024, arXiv 2403.03348"
)
_ESTIMATORS = {
    "paper": f"the mutual-information term between the two tasks: {_MUTUAL_INFORMATION}",
    "normalized": f"the mutual-information term between the two tasks, after {_MUTUAL_INFORMATION}, with "
    "pooled distributions that are normalised",
    "infonce": f"maximising mutual information between the two tasks: {_MUTUAL_INFORMATION}; its estimator "
    'InfoNCE: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, arXiv '
    "1807.03748",
    "vid": 'the term between teacher and student states: Ahn et al., "Variational Information Distillation '
    'for Knowledge Transfer", CVPR 2019, arXiv 1904.05835',
    "vib": "the bottleneck between question and decoder: Alemi et al., "
    '"Deep Variational Information Bottleneck", ICLR 2017, arXiv 1612.00410',
}
_DISTILLATION = {
    "kd_first": 'of the first tokens only: Zhang et al., "Fast and Effective On-policy Distillation from '
    'Reasoning Prefixes", 2026, arXiv 2602.15260',
    "kd_later": 'weighing later tokens more: Liu et al., "When Are Teacher Tokens Reliable? '
    'Position-Weighted On-Policy Self-Distillation for Reasoning", 2026, arXiv 2605.21606',
    "kd_entropy": 'weighing tokens by entropy: Tavor et al., "Rethinking Selective Knowledge Distillation", '
    "2026, arXiv 2602.01395",
    "kd_target": "without what the teacher copies from the reference, after: Shen et al., "
    '"Purified OPSD: On-Policy Self-Distillation Without Losing How to Think", 2026, arXiv 2607.02234',
}
_DRAWN = (
    "the teacher's distributions as tokens drawn from them: Anshumann et al., \"Sparse Logit Sampling: "
    'Accelerating Knowledge Distillation in LLMs", ACL 2025, arXiv 2503.16870'
)


def papers(objective: ObjectiveConfig) -> list[str]:
    """What the objective is made of, with the paper that each part comes from; empty for plain fine-tuning.

    `objective.estimator` is settled, so not auto.
    """
    method = METHODS[objective.method]
    found = [_RATIONALES] if "explain" in method.streams else []
    found += [_REASONING] if "reason" in method.streams else []
    if method.mi and objective.beta != 0:
        found.append(_ESTIMATORS.get(objective.estimator, f"the estimator {objective.estimator}"))
    if method.kd and objective.gamma != 0:
        divergence = {**DIVERGENCES, **SAMPLED}[objective.divergence].paper or objective.divergence
        found.append(f"distilling the teacher's distributions: {divergence}")
        plain = type(objective)()
        chosen = (name for name in _DISTILLATION if getattr(objective, name) != getattr(plain, name))
        found += [_DISTILLATION[name] for name in chosen]
    return found


def card(
    config: Config,
    prompt: Prompt,
    scores: Any,
    *,
    why_no_template: str = "",
    kept: Mapping[str, Sequence[int]] = {},
) -> str:
    """The card in Markdown. It names no path of the machine that trained the student.

    `scores` go into it as JSON; `why_no_template`: why the folder has no chat template; empty: it has
    one. `kept`: the layers of its base model that a student with `student.layers` has, by stack.
    """
    asks = {"explain": "a rationale", "reason": "the reasoning with the answer"}
    asks = [f"for {what} with `{name}=True`" for name, what in asks.items() if name in prompt.prefixes]
    asks = asks if "predict" in prompt.prefixes else []
    parts = [f"- {part}." for part in papers(config.objective)] or ["- fine-tuning on labels alone."]
    if config.teacher.cache and config.teacher.cache_form == "sampled":
        parts.append(f"- {_DRAWN}.")
    asked = f" ({', '.join(asks)})" if asks else ""
    if why_no_template:
        chat = (
            "There is no chat template, because in this vocabulary no text has the prompt's tokens: "
            f"{why_no_template}. Ask with the lines above, or with ibdistill's `ask.py`. A student that was "
            "trained with `data.format chat` has a template."
        )
    elif prompt.tags:
        chat = (
            "The chat template adds to a conversation what the student was trained with"
            + (f"; it asks {', '.join(asks)}" if asks else "")
            + f". In training, questions of more than {prompt.question_limit} tokens lost their end."
        )
    else:
        chat = (
            f"The chat template makes the same prompt from the last user message{asked}, which must not end "
            "in white space."
        )
    return f"""---
{yaml.safe_dump(card_head.front_matter(config), sort_keys=False)}---

A student distilled with ibdistill on the task {", ".join(tasks_of(config))}. Its objective is made of

{chr(10).join(parts)}
{_layers(config, kept)}
## Use

These lines give the answers that were evaluated{_rounding(config)}{_exceptions(prompt)}:

```python
{usage(prompt, ".")}
```

{_prefixes(config, prompt)}{chat}

## Scores on the test split

```json
{json.dumps(scores, indent=2)}
```

## Settings that differ from ibdistill's defaults

```yaml
{yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True)}```
"""


def _layers(config: Config, kept: Mapping[str, Sequence[int]]) -> str:
    """Which layers of its base model the student has; empty if it has all."""
    if not config.student.layers:
        return ""
    stacks = "; ".join(f"{name} {', '.join(map(str, numbers))}" for name, numbers in kept.items())
    shape = "the weights" if config.student.init == "pretrained" else "the shape"
    return f"\nIt began with {shape} of these layers of its base model, counted from 0: {stacks}.\n"


def usage(prompt: Prompt, folder: str) -> str:
    """Lines of Python that ask the student in `folder` with transformers alone, as it was evaluated."""
    if prompt.tags:
        return _usage_in_chat(prompt, folder)
    auto = "AutoModelForCausalLM" if prompt.decoder_only else "AutoModelForSeq2SeqLM"
    said = "output[0, inputs.shape[1] :]" if prompt.decoder_only else "output[0]"
    end, limit = prompt.end, prompt.question_limit
    ids = "ids" if prompt.start is None else f"[{prompt.start}, *ids]"  # the token in front
    asked = {"predict": "label", "explain": "rationale", "reason": "text"}
    asking = [
        f"{asked[stream]} = answer({json.dumps(before)} + question, {prompt.limits[stream]})"
        for stream, before in prompt.prefixes.items()
    ]
    if "reason" in prompt.prefixes:
        names = "reasoning, _, reasoned" if "predict" in prompt.prefixes else "rationale, _, label"
        parts = f"map(str.strip, text.rpartition({json.dumps(prompt.marker)}))"
        asking.append(f"{names} = {parts}  # without these words the text has no answer")
    return f"""import torch
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})
model = {auto}.from_pretrained({json.dumps(folder)}).eval()


def answer(text, max_new_tokens):
    parts = text.split({json.dumps(JOINT)})  # as premise and hypothesis are in NLI; most questions are one
    parts = tokenizer(parts, add_special_tokens=False, split_special_tokens=True).input_ids
    ids = [token for part in parts for token in [*part, {end}]]  # {end}: the answer follows
    ids = ids if len(ids) <= {limit} else [*ids[:{limit - 1}], {end}]
    inputs = torch.tensor([{ids}])
    mask = torch.ones_like(inputs)
    output = model.generate(inputs, attention_mask=mask, max_new_tokens=max_new_tokens)
    return tokenizer.decode({said}, skip_special_tokens=True)


question = "..."
{chr(10).join(asking)}"""


def _usage_in_chat(prompt: Prompt, folder: str) -> str:
    """`usage` of a student that was trained in format chat; its chat template makes the prompts."""
    first, *_ = prompt.prefixes
    opened, closed = map(json.dumps, prompt.tags)
    asking = []
    for stream, name in {"predict": "label", "explain": "rationale", "reason": "text"}.items():
        if stream in prompt.prefixes:
            chosen = "" if stream == first else f", {stream}=True"
            said = f"answer(question, {prompt.limits[stream]}{chosen})"
            if prompt.empty_thoughts and stream != "reason":
                said += f".partition({closed})[2].lstrip()"
            asking.append(f"{name} = {said}")
    if "reason" in prompt.prefixes:
        rationale, label = (
            ("reasoning", "reasoned") if "predict" in prompt.prefixes else ("rationale", "label")
        )
        asking.append(
            f"{rationale}, _, {label} = map(str.strip, text.rpartition({closed}))  # or there is no answer"
        )
        asking.append(f"{rationale} = {rationale}.removeprefix({opened}).strip()")
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})
model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)}).eval()


def answer(question, max_new_tokens, **stream):
    messages = [{{"role": "user", "content": question}}]
    settings = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt", **stream)
    inputs = tokenizer.apply_chat_template(messages, **settings)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


question = "..."
{chr(10).join(asking)}"""


def _exceptions(prompt: Prompt) -> str:
    """What the evaluation and `ask.py` do besides `usage`; empty for most students."""
    found = []
    if "reason" in prompt.prefixes:
        found.append("look by the rule of the task for an answer that is not marked")
    if prompt.map_numbers:
        found.append("write `n0`, `n1`, ... for the numbers of a question and put them back into the answer")
    return f"; but the evaluation and `ask.py` also {' and '.join(found)}" if found else ""


def _rounding(config: Config) -> str:
    """Why a text of a student in 16 bits may differ from the evaluated one; empty in fp32."""
    if config.student.precision == "fp32":
        return ""
    return (
        f", up to rounding. The weights are in {config.student.precision}, where the last bits of a result "
        f"may depend on the shape of the batch. The evaluation had batches of {config.run.eval_batch_size} "
        "questions and the lines ask one, so a text may go on differently where two tokens are nearly as "
        "probable"
    )


def _prefixes(config: Config, prompt: Prompt) -> str:
    """What precedes a question of each task of a mixture, as a table; empty for one task."""
    tasks = tasks_of(config)
    if len(tasks) == 1:
        return ""
    rows = [["task", *prompt.prefixes], ["---"] * (1 + len(prompt.prefixes))]
    rows += [
        [t, *(f"`{json.dumps(TASKS[t].prefixes[stream])}`" for stream in prompt.prefixes)] for t in tasks
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"The student was trained on {len(tasks)} tasks, each with its own text in front of a question. "
        f"The lines above, and the chat template if there is one, have that of {tasks[0]}:\n\n{table}\n\n"
    )


def _settings(config: Config) -> dict[str, dict[str, Any]]:
    """Section -> field -> value, of the settings that describe the training and are not the defaults.

    Of a path only the last part remains, of the section `run` the seed, and of servers their model's name:
    where they stand, with a password perhaps, is nobody's business.
    """
    defaults, found = to_flat(Config()), {}
    for name, value in to_flat(config).items():
        section, key = name.split(".", 1)
        if value == defaults[name] or (section == "run" and key != "seed") or key == "server_urls":
            continue
        if isinstance(value, str) and (Path(value).exists() or Path(value).is_absolute()):
            value = Path(value).name
        found.setdefault(section, {})[key] = value
    return found
