"""What a step computes and sends.

Operations are those of the matrix products, 2 for a multiplication and an addition: forward once, backward
twice (once where the weight is frozen), and the blocks' forward again under checkpointing. Attention counts
whole [T, S] products, also under a causal mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ibdistill.config.sections import ObjectiveConfig
from ibdistill.models import families
from ibdistill.models.architectures import in_decoder, layers_of_pair
from ibdistill.models.families import base_of
from ibdistill.objectives import weights
from ibdistill.planning.dryrun import Lengths, Skeleton
from ibdistill.planning.footprint import WIDTH, Gathers, Sizes, Zero

_FACTOR = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""A ring sends so many times (N - 1) / N of the whole tensor from each rank (Patarasuk and Yuan, 2009); in an
exchange each rank keeps a part of its tensor and sends the others."""


@dataclass(frozen=True)
class Operations:
    """Floating point operations of one micro-batch on one rank."""

    student: float
    """The student's blocks, forward and backward."""
    head: float
    """The loss: three products with the student's head, one with the teacher's, three with vid's map."""
    teacher: float
    """The teacher's forward pass below its head."""


def _linears(model: nn.Module, lengths: Lengths, streams: Sequence[str]) -> Iterator[tuple[nn.Module, int]]:
    """The linear layers below the head, and the operations of a forward pass in each."""
    base, batch = base_of(model), lengths.batch(model, streams)
    is_pair = families.family(base) == families.ENCODER_DECODER
    encoder_rows = batch.input_ids.numel()
    decoder_rows = sum(ids.numel() for ids in batch.decoder_input_ids.values())
    for name, module in base.named_modules():
        if module is base.get_output_embeddings() or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if is_pair and not decoder_rows and name.removeprefix("model.").startswith("decoder."):
            continue
        rows = decoder_rows if is_pair and in_decoder(name) else encoder_rows
        yield module, 2 * rows * module.weight.numel()


def _attention(model: nn.Module, lengths: Lengths, streams: Sequence[str]) -> int:
    """Operations of a forward pass in attention's own two products."""
    base, batch = base_of(model), lengths.batch(model, streams)
    config, (rows, width) = base.config, batch.input_ids.shape
    if families.family(base) == families.DECODER_ONLY:
        heads = config.num_attention_heads
        inner = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return 4 * rows * width**2 * inner * config.num_hidden_layers
    layers, decoder_layers, inner = layers_of_pair(config)
    shapes = [ids.shape for ids in batch.decoder_input_ids.values()]
    decoder = decoder_layers * sum(rows * n * (n + width) for rows, n in shapes)
    return 4 * inner * (rows * width**2 * layers + decoder)


def _not_repeated(model: nn.Module) -> set[nn.Module]:
    """What checkpointing does not run again: a block's last layer, unless dropout or a norm follows it."""
    config = base_of(model).config
    rates = [
        getattr(config, name, 0.0) for name in ("dropout_rate", "resid_pdrop", "hidden_dropout", "dropout")
    ]
    if any(rates) or config.model_type == "olmo2":
        return set()
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return {[m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))][-1] for block in blocks}


def forward_operations(model: nn.Module, lengths: Lengths, streams: Sequence[str]) -> int:
    """Floating point operations of a forward pass below the head."""
    linear = sum(count for _, count in _linears(model, lengths, streams))
    return linear + _attention(model, lengths, streams)


def readings(lengths: Lengths, objective: ObjectiveConfig) -> list[Lengths]:
    """What a teacher reads: the questions; for the target `pmi` with the references too, and these alone."""
    if not weights.purifies(objective):
        return [lengths]
    reference = lengths.label + lengths.rationale
    return [
        lengths,
        replace(lengths, question=lengths.question + reference),
        replace(lengths, question=reference),
    ]


def operations(
    student: Skeleton,
    lengths: Lengths,
    objective: ObjectiveConfig,
    teacher: Skeleton | None = None,
    *,
    checkpointing: bool = False,
    shared: int = 1,
) -> Operations:
    """Floating point operations of one micro-batch, whose size and lengths `lengths` gives, on one rank.

    `shared`: how many ranks share each sequence; `lengths` are then of one rank's part of it.
    """
    streams = weights.streams_of(objective)
    linear = list(_linears(student.model, lengths, streams))
    # each rank has a part of the heads, for all queries and all keys
    attention = shared * _attention(student.model, lengths, streams)
    blocks = sum((3 if layer.weight.requires_grad else 2) * n for layer, n in linear) + 3 * attention
    if checkpointing:
        skipped = _not_repeated(student.model)
        blocks += sum(n for layer, n in linear if layer not in skipped) + attention
    rows = lengths.targets(streams)
    vocabulary, width = student.head
    head, of_teacher = 6 * rows * vocabulary * width, 0
    if teacher is not None:
        scored = weights.teacher_streams(objective)
        read = readings(lengths, objective)
        of_teacher = sum(forward_operations(teacher.model, own, scored) for own in read)
        of_teacher += (shared - 1) * sum(_attention(teacher.model, own, scored) for own in read)
        theirs, wide = teacher.head
        if weights.uses_vid(objective):
            head += 6 * lengths.questions * lengths.question * width * wide
        if weights.wanted(objective).targets:
            head += 2 * rows * theirs * wide
    return Operations(blocks, head, of_teacher)


def student_traffic(
    sizes: Sizes, precision: str, zero: Zero, micro_batches: int, gathered: Gathers | None
) -> dict[str, int]:
    """Bytes of whole tensors per step by collective, on more than one rank (norms and flags left out).

    DeepSpeed 0.19.8 reduces by all-reduce in stages 1 and 2 too: stage 2 with every micro-batch, the others
    with the last one. `gathered`: what stage 3 gathers (`footprint.gathers`), None in other stages.
    """
    width, trained = WIDTH[precision], sum(n for n, t in sizes if t)
    if zero.stage == 3:
        persistent = zero.persistent(sizes)
        return {
            "all_gather": width * (micro_batches * gathered.moved + persistent),
            "reduce_scatter": width * trained * micro_batches,
        }
    reduced = {"all_reduce": width * trained * (micro_batches if zero.stage == 2 else 1)}
    return reduced | ({"all_gather": width * trained} if zero.stage else {})


def teacher_traffic(
    head: tuple[int, int],
    precision: str,
    micro_batches: int,
    gathered: Gathers,
    *,
    targets: bool,
    readings: int = 1,
) -> int:
    """Bytes per step that a sharded teacher's ranks gather, with its head where targets are scored.

    `readings`: how often the teacher reads a micro-batch.
    """
    width = WIDTH[precision]
    return micro_batches * width * (readings * gathered.moved + (head[0] * head[1] if targets else 0))


def exchanged(
    skeleton: Skeleton, lengths: Lengths, streams: Sequence[str], precision: str, shared: int
) -> int:
    """Bytes of a rank's tensors that attention exchanges in a forward pass, all layers together, and as many
    in a backward pass (`models.sequence_parallel`). `lengths` and `shared` as in `operations`."""
    config = base_of(skeleton.model).config
    tokens, heads = lengths.batch(skeleton.model, streams).input_ids.numel(), config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = max(getattr(config, "num_key_value_heads", None) or heads, shared)  # ranks may have the same
    return WIDTH[precision] * config.num_hidden_layers * tokens * width * (2 * heads + 2 * keys)


def sent(traffic: dict[str, int], ranks: int) -> float:
    """Bytes that each of so many ranks sends for the collectives of `traffic`, as rings."""
    return sum(_FACTOR[name] * size for name, size in traffic.items()) * (ranks - 1) / ranks
