"""A training step without data: the modules and shapes of a forward and backward pass, and no storage.

Models are built on fake tensors (shapes, dtypes and devices without storage) and run for real otherwise. So
two things are counted for every supported family without a formula for each: the bytes of the tensors that
live at once, and the order in which modules use their parameters. What happens inside custom operators (head
loss, vid) cannot be seen this way; `footprint` adds their buffers by formula.

`device` chooses between the layers of a GPU, which keep no [T, T] matrices, and those of a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ibdistill.config.sections import ObjectiveConfig, StudentConfig
from ibdistill.data import batches
from ibdistill.data.features import Features, Ragged
from ibdistill.data.records import SEGMENTS, STREAMS, segments_of
from ibdistill.models import depth, families, presets
from ibdistill.models import forward as models_forward
from ibdistill.models.families import base_of
from ibdistill.models.student import with_lora
from ibdistill.objectives import distillation
from ibdistill.objectives.teacher_answers import TeacherAnswer, Wanted
from ibdistill.objectives.weights import step_weights, streams_of
from ibdistill.ops.head_loss.arguments import TeacherStream
from ibdistill.planning import published_shapes
from ibdistill.planning.attention import attention_of
from ibdistill.planning.experts import experts_in_any_dtype
from ibdistill.planning.kernels import launches
from ibdistill.runtime.hardware import DTYPES


@dataclass(frozen=True)
class Lengths:
    """A micro-batch: a number of questions that all have the same lengths, in tokens."""

    questions: int
    question: int
    label: int
    rationale: int

    def targets(self, streams: Sequence[str]) -> int:
        """Target tokens of all streams, which are the rows of the head loss."""
        return self.questions * sum(self._segments()[segment] for segment in segments_of(streams))

    def _segments(self) -> dict[str, int]:
        """Segment -> tokens."""
        label, rationale = self.label, self.rationale
        return {"predict": label, "explain": rationale, "rationale": rationale, "answer": label}

    def batch(self, model: nn.Module, streams: Sequence[str], *, packed: bool = False) -> batches.Batch:
        """The micro-batch as `batches.collate` makes it; without streams, its questions alone."""
        parts = {"question": self.question} | self._segments()
        ids = {name: Ragged([np.full(n, 2)] * self.questions) for name, n in parts.items()}
        features = Features(
            ids=["?"] * self.questions,
            groups=np.zeros(self.questions, dtype=int),
            questions=dict.fromkeys(SEGMENTS, ids.pop("question")),
            targets=ids,
        )
        separator = 1 if families.family(base_of(model)) == families.DECODER_ONLY else None
        rows, read = range(self.questions), streams or STREAMS
        batch = batches.collate(features, rows, read, pad=0, start=0, separator=separator, packed=packed)
        return batch if streams else models_forward.questions_only(batch)


class Skeleton:
    """A model of fake tensors, and the mode in which they live."""

    def __init__(
        self,
        name: str,
        setting: str,
        tokenizer: PreTrainedTokenizerBase | None,
        precision: str,
        student: StudentConfig | None = None,
    ) -> None:
        """`name`: a preset (which needs the tokenizer), a published shape, or a folder or hub name, of which
        only the configuration is read. `student`: gives the model dropout, adapters and checkpointing.

        Raises ValueError as `families.load_config` does, and for a configuration that lacks a size.
        """
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[precision])
        try:
            # on the meta device first: peft moves new adapters to their layer, which fake tensors refuse
            with torch.device("meta"):
                model = self._build(name, setting, tokenizer, student)
            self.model = self._faked(model)
        finally:
            torch.set_default_dtype(default)

    def _build(self, name, setting, tokenizer, student) -> nn.Module:
        dropout = student.dropout if student else None
        if name in presets.PRESETS:
            if student:
                depth.check_preset(student)
            dtype = torch.get_default_dtype()
            model = families.load_preset(name, tokenizer, seed=0, dropout=dropout, dtype=dtype)
        else:
            try:
                shape = published_shapes.PUBLISHED.get(name)
                config = AutoConfig.for_model(**shape) if shape else families.load_config(name, setting)
                config = depth.cut_config(config, student.layers if student else 0)
                model = families.from_config(config, dropout)
            except (TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
                raise ValueError(
                    f"{setting} is {name!r}: no model can be built from its configuration ({error}); "
                    "it lacks a size, or has one that does not divide"
                ) from error
            if name in published_shapes.SEPARATE_HEAD:
                presets.untie_head(model)
        if student is None:
            return model.eval().requires_grad_(False)
        if student.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if student.lora_rank:
            model = with_lora(model, student)
        return model.train()

    def _faked(self, model: nn.Module) -> nn.Module:
        """The model with fake tensors in the place of those on the meta device; what is tied stays tied."""
        made: dict[int, Tensor] = {}
        with self.mode:
            for module in model.modules():
                for key, p in module._parameters.items():
                    if p is not None:
                        fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                        module._parameters[key] = made.setdefault(id(p), fake)
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
        return model

    def sizes(self) -> list[tuple[int, bool]]:
        """(elements, trained) of each parameter."""
        return [(p.numel(), p.requires_grad) for p in self.model.parameters()]

    @property
    def frozen_linear(self) -> int:
        """Elements of the frozen weights of linear layers without the head, which `load_in_4bit` takes."""
        head = base_of(self.model).get_output_embeddings().weight
        weights = [m.weight for m in self.model.modules() if isinstance(m, (nn.Linear, Conv1D))]
        return sum(w.numel() for w in weights if not w.requires_grad and w is not head)

    @property
    def head(self) -> tuple[int, int]:
        """The shape [V, D] of the head's weight."""
        return tuple(base_of(self.model).get_output_embeddings().weight.shape)

    def fake(self, batch: batches.Batch) -> batches.Batch:
        """The batch with fake tensors, except for what the host reads."""
        return batch.mapped(self.mode.from_tensor)


@dataclass(frozen=True)
class Living:
    """Bytes of the tensors that exist during a pass, without the model states."""

    peak: int
    """The most at any time, without what custom operators hold inside."""
    at_head: int = 0
    """Bytes of the tensors that exist when the head loss starts."""
    kernels: int = 0
    """Kernels that the pass launches, as `planning.kernels` counts them."""


def student_step(
    skeleton: Skeleton,
    lengths: Lengths,
    objective: ObjectiveConfig,
    *,
    wanted: Wanted | None = None,
    teacher_head: tuple[int, int] = (0, 0),
    device: str = "cuda",
    shared: int = 1,
) -> Living:
    """Forward and backward pass of a micro-batch. The gradients' memory counts as a model state, not here.

    `shared`: how many ranks share each sequence; `lengths` are then of one rank's part of it.
    """
    streams = streams_of(objective)
    batch = skeleton.fake(lengths.batch(skeleton.model, streams))
    with skeleton.mode:
        width = teacher_head[1] if wanted and wanted.questions else 0
        module = distillation.Distillation(skeleton.model, objective, teacher_width=width)
        head = skeleton.head[0], teacher_head[1]  # the teacher's head is fitted to the student's vocabulary
        answer = teacher_answer(batch, wanted, head) if wanted else None
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    known = [t for p in module.parameters() for t in (p, p.grad) if t is not None]
    tracker = Tracker([*known, *module.buffers(), *_tensors(vars(batch))])
    at_head = []
    hook = module.head.register_forward_pre_hook(lambda *_: at_head.append(tracker.now))
    weights = step_weights(objective, dict.fromkeys([*segments_of(SEGMENTS), "explained"], 1))
    with attention_of(device, shared), experts_in_any_dtype(), skeleton.mode, tracker:
        loss, _ = module(batch, weights, answer, 1)
        loss.backward()
    hook.remove()
    for parameter in module.parameters():
        parameter.grad = None
    return Living(tracker.peak, at_head[0], tracker.kernels)


def teacher_forward(
    skeleton: Skeleton, lengths: Lengths, streams: Sequence[str], device: str, shared: int = 1
) -> Living:
    """A teacher's forward pass over a micro-batch, with its answers. `shared` as in `student_step`."""
    batch = skeleton.fake(lengths.batch(skeleton.model, streams))
    tracker = Tracker([*skeleton.model.parameters(), *skeleton.model.buffers(), *_tensors(vars(batch))])
    with attention_of(device, shared), experts_in_any_dtype(), skeleton.mode, tracker, torch.no_grad():
        states = models_forward.states(skeleton.model, batch)
    del states
    return Living(tracker.peak, kernels=tracker.kernels)


@dataclass(frozen=True)
class Use:
    """One use of a module's parameters in a pass."""

    parameters: tuple[nn.Parameter, ...]
    """The parameters that the module itself owns."""
    is_embedding: bool


def uses(skeleton: Skeleton, lengths: Lengths, streams: Sequence[str], *, head: bool) -> list[Use]:
    """The modules that own parameters, in the order in which a forward pass uses them; the head last."""
    model, order = skeleton.model, []

    def note(module: nn.Module, _) -> None:
        order.append(Use(tuple(module.parameters(recurse=False)), isinstance(module, nn.Embedding)))

    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_pre_hook(note) for module in owners]
    batch = skeleton.fake(lengths.batch(model, streams))
    with experts_in_any_dtype(), skeleton.mode, torch.no_grad():
        models_forward.states(model, batch)
    for hook in hooks:
        hook.remove()
    last = tuple(base_of(model).get_output_embeddings().parameters())
    return [*order, Use(last, False)] if head else order


def teacher_answer(batch: batches.Batch, wanted: Wanted, head: tuple[int, int]) -> TeacherAnswer:
    """An answer with the shapes of a teacher whose head is [V, D]; its tensors are not filled."""
    vocabulary, width = head
    questions = torch.empty(len(batch.question_positions), width) if wanted.questions else None
    if not wanted.targets:
        return TeacherAnswer(questions)
    targets = {s: TeacherStream(hidden=torch.empty(len(ids), width)) for s, ids in batch.labels.items()}
    return TeacherAnswer(questions, targets, torch.empty(vocabulary, width))


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Tracker(TorchDispatchMode):
    """Sums the bytes of the storages that operators make, for as long as they exist, and counts kernels."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.kernels = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked two times out of three, and slow to ask of the mode below
        out = function(*args, **(kwargs or {}))
        self.kernels += launches(function)
        for tensor in _tensors(out):
            self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return

        def forget(_: weakref.ref) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
