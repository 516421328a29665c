"""What a step computes and sends, and how long that would take at given rates.

Operations are those of the matrix products, 2 for a multiplication and an addition: forward once, backward
twice (once where the weight is frozen), and the blocks' forward again under checkpointing. Attention counts
whole [T, S] products, also under a causal mask.

Seconds are predictions: products at `utilization` of the peak or at the speed at which weights can be read,
whichever is slower; transfers as rings, at the slowest link on their way. Overlapped transfers cost what
exceeds the products beside them. The host launches kernels ahead of the GPU; where launching them all takes
longer than all else, the rest is waited for. Latencies of transfers are left out, so many small collectives
over many nodes look cheaper here than they are; data loading and evaluations come on top.
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
from ibdistill.planning.evaluation_memory import Decoding
from ibdistill.planning.footprint import WIDTH, Gathers, Sizes, Zero
from plan.accelerators import Accelerator

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


@dataclass(frozen=True)
class Load:
    """Everything that takes time in one rank's step."""

    operations: Operations
    micro_batches: int
    student_bytes: int
    """Bytes of the student's weights, unsharded."""
    teacher_bytes: int
    """Bytes of the teacher's weights, unsharded; 0 without a teacher."""
    reduced: float
    """Bytes per step that are sent for gradients."""
    gathered: float
    """Bytes per step that are sent for the student's parameters."""
    teacher_gathered: float
    """Bytes per step that are sent for the teacher's parameters."""
    updated: int
    """Parameters that this rank's optimizer updates."""
    overlaps_reduction: bool
    overlaps_gathers: bool
    """Stage 3 gathers ahead; stages 1 and 2 gather after the update, when there is nothing beside it."""
    launches: int = 0
    """Kernels that the host launches per step."""
    moved: float = 0.0
    """Bytes per micro-batch that are moved beside the products, where `utilization` does not cover them."""
    exchanged: float = 0.0
    """Bytes per step that are sent within attention, where ranks share sequences."""


@dataclass(frozen=True)
class Rates:
    """Rates of one rank, in operations per second and bytes per second."""

    products: float
    """Products of the student and of the head."""
    teacher_products: float
    memory: float
    link: float
    teacher_link: float
    launch: float = 0.0
    """Seconds in which the host launches a kernel."""
    overlap: bool = True
    """Whether transfers and products can go on at the same time."""
    exchange_link: float = 1.0

    @classmethod
    def of(
        cls,
        gpu: Accelerator,
        ranks: int,
        on_node: int,
        placement: str,
        precision: str,
        teacher_precision: str,
        shared: int = 1,
    ) -> Rates:
        """The rates of a GPU in a job of so many ranks, of which `shared` neighbours share a sequence. A ring
        over nodes is as fast as the network."""
        link = (gpu.link_gbs if ranks <= on_node else gpu.network_gbs) * 1e9
        teacher_link = gpu.link_gbs * 1e9 if placement == "zero3_node" else link
        if placement == "cpu_offload":  # shares come over the bus before they are gathered
            teacher_link = min(teacher_link, gpu.host_gbs * 1e9)
        products, theirs = gpu.products(precision), gpu.products(teacher_precision)
        exchange_link = (gpu.network_gbs if on_node % shared else gpu.link_gbs) * 1e9
        rates = products, theirs, gpu.bandwidth_gbs * 1e9, link, teacher_link, gpu.launch_us / 1e6
        return cls(*rates, exchange_link=exchange_link)


def step_seconds(load: Load, rates: Rates) -> dict[str, float]:
    """Predicted seconds per step by part, which add up to the step. See the module's docstring.

    A part named `... wait` is what a transfer takes beyond the products beside it.
    """
    micro, work = load.micro_batches, load.operations
    student = micro * max(work.student / rates.products, 3 * load.student_bytes / rates.memory)
    teacher = micro * max(work.teacher / rates.teacher_products, load.teacher_bytes / rates.memory)
    student += micro * load.moved / rates.memory
    head = micro * work.head / rates.products
    parts = {"student": student, "head": head, "teacher": teacher}
    reduce, gather = load.reduced / rates.link, load.gathered / rates.link
    theirs = load.teacher_gathered / rates.teacher_link
    beside = 0.0
    if rates.overlap and load.overlaps_reduction:
        beside, reduce = beside + reduce, 0.0
    if rates.overlap and load.overlaps_gathers:
        beside, gather = beside + gather, 0.0
    parts["gradients wait"] = reduce + max(0.0, beside - student - head)
    parts["parameters wait"] = gather
    parts["exchange wait"] = load.exchanged / rates.exchange_link  # the next product needs what comes
    parts["teacher wait"] = max(0.0, theirs - teacher) if rates.overlap else theirs
    # reads and writes master and moments, reads the gradient, writes the weight
    parts["optimizer"] = 28 * load.updated / rates.memory
    return parts


def sampling_seconds(
    sampled: Decoding, sizes: Sizes, precision: str, rates: Rates, question: int, texts: float
) -> float:
    """Predicted seconds of a step in which a rank samples `texts` of own text, on average.

    `sampled`: of as many texts as are decoded at once. They read their prompts of `question` tokens with 2
    operations per weight and token. Then each token of theirs takes a pass over all weights and, on average,
    half of the keys and values that there are at the end, or longer where products or launches do.
    """
    weights_read = sum(n for n, _ in sizes)
    products = 2 * weights_read * sampled.texts / rates.products
    moved = (WIDTH[precision] * weights_read + sampled.cache / 2) / rates.memory
    token = max(moved, products, sampled.kernels * rates.launch)
    return texts / sampled.texts * (question * products + sampled.tokens * token)


def with_launches(parts: dict[str, float], load: Load, rates: Rates) -> dict[str, float]:
    """The same seconds, and those that launching the step's kernels takes beyond them."""
    return parts | {"launch wait": max(0.0, load.launches * rates.launch - sum(parts.values()))}


def bound(parts: dict[str, float]) -> str:
    """The part that takes longest."""
    return max(parts, key=parts.__getitem__)


def efficiency(parts: dict[str, float]) -> float:
    """Share of the step in which products are computed; 1 would be perfect scaling."""
    return sum(parts[name] for name in ("student", "head", "teacher")) / sum(parts.values())
