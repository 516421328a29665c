"""Head loss and VID in the forward of DeepSpeed engines; run through the launcher by test_zero.py.

For every head and ZeRO stage the accumulated gradients of two ranks with two micro-batches each are compared
with autograd through the reference, in one process, on all four at once. Writes name -> greatest relative
error of a parameter's gradient, and how many parameters there were.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ibdistill.ops.head_loss.api import (
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
    head_loss,
)
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.vid.api import vid_loss
from ibdistill.ops.vid.reference import vid_loss_reference
from ibdistill.runtime import distributed

V, D, D_T, ACCUMULATION = 61, 16, 12, 2
LENGTHS = {"predict": [2, 3], "explain": [5, 4]}
HEADS = ("t5-tied", "t5-untied", "gpt2-tied", "llama-untied")


def build(head: str) -> nn.Module:
    torch.manual_seed(0)
    if head.startswith("t5"):
        sizes = {"d_model": D, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=V, decoder_start_token_id=0, **sizes))
        if head == "t5-untied":
            model.lm_head.weight = nn.Parameter(torch.randn(V, D))
        return model
    if head == "gpt2-tied":
        sizes = {"n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 16}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=V, **sizes, **dropout))
    sizes = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=False, **sizes))


class Head(nn.Module):
    """Owns the output head, so that ZeRO-3 gathers it for the loss."""

    def __init__(self, head: nn.Linear, loss):
        super().__init__()
        self.weight, self.loss = head.weight, loss

    def forward(self, predict: Stream, explain: Stream, **arguments) -> Tensor:
        return self.loss(predict, explain, self.weight, **arguments)[0]


class Vid(nn.Module):
    """Owns VID's parameters, so that ZeRO-3 gathers them for the loss."""

    def __init__(self, loss):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_T, D))
        self.bias, self.log_variance = (nn.Parameter(torch.randn(D_T)) for _ in range(2))
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(student, teacher, self.weight, self.bias, self.log_variance)


class Student(nn.Module):
    """A model and its losses in one forward pass."""

    def __init__(self, head: str, reference: bool, compiled: bool = False):
        super().__init__()
        self.model, self.name = build(head), head
        loss = head_loss_reference if reference else head_loss
        if compiled:
            loss = torch.compile(loss, backend="aot_eager")
        self.head = Head(self.model.get_output_embeddings(), loss)
        self.vid = Vid(vid_loss_reference if reference else vid_loss)
        self.teacher_head = torch.randn(V, D_T, generator=torch.Generator().manual_seed(5))

    def forward(self, batch: dict, mi: MISettings, scale: float) -> Tensor:
        streams, targets = {}, {}
        for name, lengths in batch["lengths"].items():
            states = self.states(batch[f"{name}_prompt"], batch[f"{name}_ids"])
            rows = torch.cat([states[b, :n] for b, n in enumerate(lengths)])
            labels = torch.cat([batch[f"{name}_labels"][b, :n] for b, n in enumerate(lengths)])
            cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
            streams[name] = Stream(rows, labels, cu)
            targets[name] = TeacherStream(batch[f"{name}_teacher"])
        teacher = TeacherDistributions(targets["predict"], targets["explain"], self.teacher_head)
        weights = Weights(0.7 * scale, 0.4 * scale, 1.3 * scale, 0.6 * scale, 0.5 * scale)
        total = self.head(*streams.values(), weights=weights, mi=mi, teacher=teacher)
        return total + scale * self.vid(streams["predict"].hidden, batch["predict_teacher"])

    def states(self, prompt: Tensor, ids: Tensor) -> Tensor:
        """Hidden states [B, n, D] of the target positions."""
        if not self.name.startswith("t5"):
            return self.model.base_model(torch.cat([prompt, ids], 1))[0][:, prompt.shape[1] :]
        states = self.model.decoder(ids, encoder_hidden_states=self.model.encoder(prompt)[0])[0]
        return states * D**-0.5 if self.name == "t5-tied" else states


def make_batch(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    batch: dict = {"lengths": LENGTHS if seed % 2 else {k: v[::-1] for k, v in LENGTHS.items()}}
    for name, lengths in batch["lengths"].items():
        shape = len(lengths), max(lengths)
        batch[f"{name}_prompt"] = torch.randint(V, (shape[0], 6), generator=generator)
        batch[f"{name}_ids"] = torch.randint(V, shape, generator=generator)
        batch[f"{name}_labels"] = torch.randint(V, shape, generator=generator)
        batch[f"{name}_teacher"] = torch.randn(sum(lengths), D_T, generator=generator)
    return batch


def wanted(head: str, mi: MISettings, batches: list[dict]) -> dict[str, Tensor]:
    student = Student(head, reference=True)
    sum(student(batch, mi, 1.0) for batch in batches).backward()
    return {name: p.grad for name, p in student.named_parameters()}


def accumulated(
    head: str, mi: MISettings, stage: int, compiled: bool, batches: list[dict]
) -> dict[str, Tensor]:
    student = Student(head, reference=False, compiled=compiled)
    world = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    for batch in batches:
        # DeepSpeed takes the mean over ranks and micro-batches, and our loss is a sum
        engine.backward(engine(batch, mi, float(world * ACCUMULATION)))
        if engine.is_gradient_accumulation_boundary():
            gradients = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters()}
        engine.step()
    engine.destroy()
    return gradients


def main(out: Path) -> None:
    world = distributed.init()
    batches = [make_batch(seed) for seed in range(world.size * ACCUMULATION)]
    mine = batches[world.rank * ACCUMULATION :][:ACCUMULATION]
    both, paired = MISettings("normalized", "max", "both"), MISettings("paper", "mean", pair="teacher")
    results = {}
    for head in HEADS:
        runs = [(stage, both, False) for stage in (1, 2, 3)] + [(3, paired, True)]
        for stage, mi, compiled in runs:
            want = wanted(head, mi, batches)
            got = accumulated(head, mi, stage, compiled, mine)
            assert want.keys() == got.keys()
            errors = [(got[n] - g).norm() / g.norm().clamp_min(1e-6) for n, g in want.items()]
            name = f"{head}, ZeRO-{stage}, {'compiled' if compiled else 'eager'}"
            results[name] = [max(errors).item(), len(errors)]
    if world.rank == 0:
        out.write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
