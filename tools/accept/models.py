"""Check e: losses and gradients of whole students against fp64 on the CPU."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from accept import inputs
from accept.lines import Context
from ibdistill.config.load import load_settings
from ibdistill.data import batches, loading
from ibdistill.data.tokenizing import tokenize
from ibdistill.models import families, fused
from ibdistill.objectives import distillation, weights

LEAST_COSINE = 0.999
"""Between all gradients of a model as one vector and those in fp64: what rounding in bf16 should leave."""
LOSS_OFF = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""How far the loss may be off fp64's, relatively, because roundings add up over layers and tokens."""


def gradients(context: Context) -> None:
    """T5 and Qwen2 in bf16 and fp32: method ib, estimator paper, one ragged batch of four questions."""
    for name in ("t5", "qwen2"):
        kind = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        torch.manual_seed(1)
        # the published width and head, and few layers: fp64 on the CPU has to end
        layers = {"num_layers": 2, "num_decoder_layers": 2} if name == "t5" else {"num_hidden_layers": 4}
        model = kind.from_config(inputs.configuration(context, name, **layers), trust_remote_code=False)
        truth_loss, truth = loss_and_gradients(context, name, model.double(), torch.device("cpu"))
        for dtype in (torch.float32, torch.bfloat16):
            loss, got = loss_and_gradients(context, name, model.to(dtype), context.device)
            cosine = nn.functional.cosine_similarity(got, truth, dim=0).item()
            error, bound = abs(loss / truth_loss - 1), LOSS_OFF[dtype]
            message = f"loss off by {error:.1e} (at most {bound:.0e}), cosine {cosine:.6f} (> {LEAST_COSINE})"
            holds = error < bound and cosine > LEAST_COSINE
            context.verdict(f"{name}, {str(dtype).removeprefix('torch.')}", holds, message)


def loss_and_gradients(
    context: Context, name: str, model: nn.Module, device: torch.device
) -> tuple[float, torch.Tensor]:
    """The loss, and all gradients as one vector in fp64 on the CPU."""
    settings = load_settings(
        None,
        {
            "data.task": "jsonl",
            "data.path": str(inputs.records_folder(context)),
            "objective.method": "ib",
            "objective.estimator": "paper",
            "objective.mi_gradient": "both",
            "objective.beta": 0.3,
        },
    )
    tokenizer = inputs.tokenizer(name)
    records = loading.load(settings.data, needs_rationale=True).train[:4]
    prefixes = {"jsonl": loading.TASKS["jsonl"].prefixes}
    features = tokenize(records, prefixes, tokenizer, settings.data)
    student = fused.fused(copy.deepcopy(model)).train().to(device)
    streams = weights.streams_of(settings.objective)
    layout = families.layout(student, tokenizer)
    batch = batches.collate(features, range(4), streams, **layout).to(device)
    counts = {name: len(labels) for name, labels in batch.labels.items()} | {"explained": 4}
    module = distillation.Distillation(student, settings.objective).to(device)
    loss, _ = module(batch, weights.step_weights(settings.objective, counts))
    loss.backward()
    parts = [p.grad.double().flatten().cpu() for p in student.parameters() if p.grad is not None]
    return loss.item(), torch.cat(parts)
