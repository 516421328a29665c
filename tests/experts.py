"""Models of the demo task in folders: a teacher that knows a few answers by heart, models of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ibdistill.data.records import Record


def demo_records(n: int) -> list[Record]:
    """The training records of a run on the demo corpus with `data.subsample` n."""
    from ibdistill.config.sections import DataConfig
    from ibdistill.data import loading

    return loading.load(DataConfig(subsample=n), needs_rationale=True).train


def taught(records: Sequence[Record]) -> list[Record]:
    """What the expert says: two wrong labels, one that is no equation, the others right."""
    said = list(records)
    for i, label in ((0, "n1 * n1 * n1"), (1, "n0 / n0"), (2, "n0 + *")):
        said[i] = replace(records[i], label=label)
    return said


def by_heart(folder: Path, records: Sequence[Record], preset: str = "demo-student", steps: int = 80) -> Path:
    """Train a preset until it writes the records' labels and rationales; save model and tokenizer."""
    import torch

    from ibdistill.config.sections import DataConfig
    from ibdistill.data import batches, tokenizers
    from ibdistill.data.tasks.registry import TASKS
    from ibdistill.data.tokenizing import tokenize
    from ibdistill.models import families, forward

    tokenizer = tokenizers.demo_tokenizer()
    model = families.load_preset(preset, tokenizer, seed=0, dropout=0.0).train()
    features = tokenize(records, {"demo": TASKS["demo"].prefixes}, tokenizer, DataConfig())
    layout = families.layout(model, tokenizer)
    batch = batches.collate(features, range(len(records)), ("predict", "explain"), **layout)
    tables = [p for name, p in model.named_parameters() if "relative" in name]
    others = [p for name, p in model.named_parameters() if "relative" not in name]
    groups = [{"params": others}] + ([{"params": tables, "lr": 3e-2}] if tables else [])
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    for _ in range(steps):
        head = model.get_output_embeddings().weight
        states = forward.states(model, batch).targets
        loss = sum(
            torch.nn.functional.cross_entropy(hidden @ head.T, batch.labels[stream])
            for stream, hidden in states.items()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def one_layer(folder: Path, preset: str = "demo-student") -> str:
    """Save a preset with one layer per stack and random weights, and the demo's tokenizer; the folder's name.

    A step under ZeRO-3 is Python for every module: with such models it takes half the time.
    """
    from ibdistill.data import tokenizers
    from ibdistill.models import presets

    tokenizer = tokenizers.demo_tokenizer()
    model = presets.build(preset, len(tokenizer), seed=0, num_layers=1, num_decoder_layers=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
