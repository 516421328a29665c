"""The online teacher: a frozen model in the training job that scores the student's own targets.

The teacher is asked for last hidden states only: those of the question's tokens (for the estimator `vid`) and
those at the target positions of both streams. From the latter the head loss recomputes the teacher's logits
chunk by chunk, so that its [N, V] logits never exist at once.

Placements:

- `replica`      every rank holds the whole teacher: no communication, and the first choice where it fits
                 (a frozen model gains nothing from ZeRO but memory); 8-bit weights optionally
- `zero3`        cut into shares over all ranks, gathered layer by layer
- `zero3_node`   the same within each node, so that gathering never leaves it
- `cpu_offload`  the same as zero3, with the shares in CPU memory
- `cache`        the teacher is not loaded at all; its answers come from `teacher.cache` (see `answers`)
- `server`       as cache, which a server fills (see `server_scoring`)

The sharded placements use `sharding`: an engine without an optimizer, on the model without its head, in a
process group of its own. The head is a plain tensor, cut by rows and gathered for a micro-batch, because
outside the engine's hooks a partitioned head would be an empty tensor.

The teacher reads the student's own token sequences, prefixes included. So both must share a vocabulary, and
their states pair up position by position. A teacher that only writes text (`teacher.rationales`) may have a
tokenizer of its own, and so may one that answers with `objective.alignment` text (see `alignment`).
"""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerBase

from ibdistill.config.sections import TeacherConfig
from ibdistill.data import batches
from ibdistill.data.batches import Batch
from ibdistill.data.features import Features
from ibdistill.models import families, fused, presets
from ibdistill.models import forward as models_forward
from ibdistill.models.architectures import positions, softcap
from ibdistill.models.sequence_parallel import part_of
from ibdistill.models.student import check_bitsandbytes
from ibdistill.objectives.teacher_answers import TeacherAnswer, Wanted
from ibdistill.ops.head_loss.arguments import TeacherStream
from ibdistill.runtime import distributed, hardware
from ibdistill.runtime.distributed import World
from ibdistill.teacher import sharding
from ibdistill.teacher.vocabulary import check_vocabulary, fit_rows

logger = logging.getLogger("ibdistill")

SHARDED = ("zero3", "zero3_node", "cpu_offload")


class Teacher:
    """A loaded teacher, in one of the placements."""

    def __init__(
        self,
        config: TeacherConfig,
        wanted: Wanted,
        tokenizer: PreTrainedTokenizerBase,
        head_rows: int | None,
        world: World,
    ) -> None:
        """Load the teacher. Collective.

        Args:
            config: which model, where its weights are, and their precision.
            wanted: what the teacher will be asked for.
            tokenizer: the student's, which must be the teacher's too; without a student the teacher's own.
            head_rows: number of rows of the student's head; None: `pair` the teacher with a student before it
                is asked for answers.

        Raises:
            ValueError: the model does not exist, has another vocabulary or does not fit into memory, or 8
                bits are asked for without bitsandbytes or a GPU.
        """
        self.config = config
        self._world = world
        self._wanted = wanted
        self._dtype = hardware.DTYPES[config.precision]
        skeleton = self._skeleton(tokenizer)
        self.width = skeleton.get_input_embeddings().embedding_dim
        self._model_config = skeleton.config
        self.packs = fused.packs(skeleton)
        self.positions = positions(skeleton.config)
        if wanted.pmi and softcap(skeleton.config) is not None:
            raise ValueError(
                f"objective.kd_target is 'pmi', and teacher.model {config.model!r} caps its logits, so that "
                "its head does not make their sum from a sum of states; take another teacher, or kd_target "
                "teacher"
            )
        self._own_rows = skeleton.get_output_embeddings().weight.shape[0]
        if head_rows is not None:
            self.pair(tokenizer, head_rows)
        self._head: Tensor | sharding.RowShard | None = None
        self._bias: Tensor | None = None
        if config.load_in_8bit:
            check_bitsandbytes("teacher.load_in_8bit", ", or shard the teacher with teacher.placement zero3")
        self.group = self._group()
        sizes = [p.numel() for p in skeleton.parameters()]
        if config.placement in SHARDED:
            self._load_shares(tokenizer, sizes)
        else:
            self._load_replica(tokenizer)
        logger.info(
            "teacher %s: %.1f M parameters, %s, %s, %.1f MiB per rank",
            config.model,
            sum(sizes) / 1e6,
            config.placement,
            "8 bits" if config.load_in_8bit else config.precision,
            self.bytes() / 2**20,
        )

    def pair(self, tokenizer: PreTrainedTokenizerBase, head_rows: int | None) -> None:
        """Let the teacher answer a student's token sequences; ValueError if the vocabularies differ.

        `head_rows`: the number of rows of the student's head; None: `tokenizer` is the teacher's own, and its
        head stays as it is.
        """
        self._head_rows = head_rows or self._own_rows
        own = check_vocabulary(self.config.model, tokenizer, self._head_rows, self._own_rows)
        self.layout = families.layout(self._model_config, own)  # its own BOS, as where it writes

    @torch.no_grad()
    def states(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """As `Scorer` gives them. Collective for sharded placements."""
        return self._scorer(batch)

    def __call__(self, batch: Batch) -> TeacherAnswer:
        """The answer of a micro-batch, on its device. Collective for sharded placements."""
        targets, questions = self.states(batch)
        if not self._wanted.targets:
            return TeacherAnswer(questions)
        streams = {stream: TeacherStream(hidden=hidden) for stream, hidden in targets.items()}
        return TeacherAnswer(questions if self._wanted.questions else None, streams, *self.head())

    def reading(self, features: Features, indices: Sequence[int], *, packed: bool) -> Batch:
        """The micro-batch of these records as the teacher's family reads it, `packed` if it can read that."""
        layout = self.layout | {"packed": packed and self.packs}
        read = batches.collate(features, indices, features.streams, **layout)
        return part_of(read).to(self._world.device)

    def head(self) -> tuple[Tensor, Tensor | None, float | None]:
        """The head on the student's vocabulary: [V, D_teacher], [V], its cap. Collective if sharded."""
        weight = self._head.gather() if isinstance(self._head, sharding.RowShard) else self._head
        return *fit_rows(weight, self._bias, self._head_rows), softcap(self._model_config)

    @contextmanager
    def text_model(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[nn.Module]:
        """The model with its head, to generate text with; `tokenizer` is the teacher's own.

        The layers and the head of a sharded teacher are gathered for each token on all ranks, so all ranks
        must call `generate` equally often, with `synced_gpus`. Generation bypasses the engine's forward pass:
        nothing is prefetched, and the prefetch trace starts anew with the next answers.
        """
        model = getattr(self._scorer, "module", self._scorer).model
        # a rank that built the modules without the checkpoint has not read its settings
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        )
        head = model.get_output_embeddings()
        if isinstance(self._head, sharding.RowShard):
            model.set_output_embeddings(sharding.GatheredHead(self._head, self._bias))
        try:
            yield model
        finally:
            model.set_output_embeddings(head)

    def close(self) -> None:
        """Give the teacher's memory back. Collective if sharded."""
        if self.config.placement in SHARDED:
            self._scorer.destroy()
        del self._scorer, self._head
        gc.collect()
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()

    def bytes(self) -> int:
        """Bytes of the teacher's parameters that this rank holds at rest."""
        held = {
            id(t): t.numel() * t.element_size() for p in self._scorer.parameters() for t in sharding.held(p)
        }
        if isinstance(self._head, sharding.RowShard):
            return sum(held.values()) + self._head.bytes()
        return sum(held.values())

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks that share one copy, as a group of the teacher's own; None for a replica."""
        if self.config.placement not in SHARDED:
            return None
        if self.config.placement != "zero3_node":
            return dist.new_group()
        members = sharding.node_groups(distributed.gather_objects(socket.gethostname()))
        groups = [dist.new_group(ranks) for ranks in members]
        return next(g for g, ranks in zip(groups, members, strict=True) if self._world.rank in ranks)

    def _skeleton(self, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        return families.empty_model(self.config.model, tokenizer, "teacher.model", self._dtype)

    def _load(self, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """The whole teacher, on the CPU, or with 8-bit weights on the GPU."""
        if self.config.model in presets.PRESETS:
            model = families.load_preset(self.config.model, tokenizer, seed=0, dtype=self._dtype)
        else:
            bits = BitsAndBytesConfig(load_in_8bit=True) if self.config.load_in_8bit else None
            model = families.load_model(
                self.config.model,
                tokenizer,
                setting="teacher.model",
                dtype=self._dtype,
                **({"quantization_config": bits} if bits else {}),
            )
        return model.eval().requires_grad_(False)

    def _load_replica(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = self._load(tokenizer)
        if not self.config.load_in_8bit:
            model.to(self._world.device)
        if self._wanted.targets:
            head = model.get_output_embeddings()
            self._head, self._bias = head.weight, head.bias
        self._scorer = Scorer(model, targets=self._wanted.targets)

    def _load_shares(self, tokenizer: PreTrainedTokenizerBase, sizes: list[int]) -> None:
        config = sharding.inference_config(
            sizes,
            bf16=self.config.precision == "bf16",
            offload=self.config.placement == "cpu_offload",
            world_size=self._world.size,
        )
        # only one rank of each group reads the weights; the others build the same modules without storage
        leads = dist.get_rank(self.group) == 0
        model = self._load(tokenizer) if leads else self._skeleton(tokenizer)
        if self._wanted.targets or self._wanted.text:
            head = model.get_output_embeddings()
            self._head = sharding.RowShard(head.weight, self.group, self._world.device)
            self._bias = (
                None if head.bias is None else sharding.broadcast(head.bias, self.group, self._world.device)
            )
        # the engine would gather the head in every forward pass, also where no distributions are wanted
        model.set_output_embeddings(nn.Identity())
        model = sharding.partition(model, self.group, config)
        self._scorer = sharding.engine(Scorer(model, targets=self._wanted.targets), config)


class Scorer(nn.Module):
    """A model's states as one forward pass, so that an engine's hooks and prefetch trace see all of it."""

    def __init__(self, model: nn.Module, *, targets: bool) -> None:
        super().__init__()
        self.model = model
        self.targets = targets

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The states of a batch in plain containers, because DeepSpeed's hooks do not look into others.

        Stream -> last hidden states [N, D] at its targets; and the states [N_question, D] of the predict
        stream's question tokens.
        """
        states = models_forward.states(self.model, batch, targets=self.targets)
        return states.targets, states.questions
