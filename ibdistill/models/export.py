"""The trained student as a folder that transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import ObjectiveConfig

_RATIONALES = (
    'learning labels and rationales as two tasks: Hsieh et al., "Distilling Step-by-Step!", Findings of ACL '
    "2023, arXiv 2305.02301"
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
_DIVERGENCES = {
    "forward": 'Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531',
    "reverse": 'Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, arXiv '
    "2306.08543",
    "jsd": 'Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv 2306.13649',
}


def write(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write the student for `from_pretrained`: safetensors, tokenizer, and a model card.

    LoRA adapters are merged into a copy of the weights.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def papers(objective: ObjectiveConfig) -> list[str]:
    """What the objective is made of, with the paper that each part comes from; empty for plain fine-tuning.

    `objective.estimator` is settled, so not auto.
    """
    found = [] if objective.method == "finetune" else [_RATIONALES]
    if "ib" in objective.method and objective.beta != 0:
        found.append(_ESTIMATORS.get(objective.estimator, f"the estimator {objective.estimator}"))
    if "kd" in objective.method and objective.gamma != 0:
        divergence = _DIVERGENCES.get(objective.divergence, objective.divergence)
        found.append(f"distilling the teacher's distributions: {divergence}")
    return found


def card(objective: ObjectiveConfig, config: str, scores: str) -> str:
    """The exported student's model card. `config` is YAML, and `scores` JSON."""
    explains = objective.method != "finetune"
    parts = [f"- {part}." for part in papers(objective)] or ["- fine-tuning on labels alone."]
    tasks = "`predict: QUESTION` gives the label" + (
        ", `explain: QUESTION` the rationale" if explains else ""
    )
    return f"""---
library_name: transformers
tags: [ibdistill, chain-of-thought, distillation]
---

A student distilled with ibdistill. {tasks}. Its objective is made of

{chr(10).join(parts)}

Scores on the test split:

```json
{scores}
```

Greedy decoding is its default. If it is decoder-only, the prompt is made of ids: those of the
text, without special tokens, then one token that stands for "now answer", which is the newline
token where the vocabulary has one and else the end token; in front BOS, if the tokenizer puts
one there. (Tokenizing the text with a newline appended is not the same in every vocabulary.)

Configuration:

```yaml
{config}```
"""
