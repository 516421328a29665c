"""The trained student as a folder that transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase


def write(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write the student for `from_pretrained`: safetensors, tokenizer, and a model card.

    LoRA adapters are merged into a copy of the weights.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def card(config: str, scores: str) -> str:
    """The exported student's model card."""
    return f"""---
library_name: transformers
tags: [ibdistill, chain-of-thought, distillation]
---

A student distilled with ibdistill. `predict: QUESTION` gives the label, `explain: QUESTION`
the rationale. Method: "Learning to Maximize Mutual Information for Chain-of-Thought
Distillation", Findings of ACL 2024, arXiv 2403.03348.

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
