"""Where a micro-batch's teacher answer comes from: the teacher, or what it said before.

A teacher's answer to the same tokens under the same settings never changes, so with
`teacher.cache` the first epoch asks and writes, later ones read. An entry is one record's
states (or top k), under a key made of its token ids; so a cache serves other seeds,
subsamples and mixtures too. What it is a cache *of* is its fingerprint; another one is refused.

A micro-batch is read only if all of it is there, and asked for as a whole otherwise; a record
keeps its first answer, and entries are written out before every checkpoint. So a run that was
interrupted and continued stays bit-identical on a CPU: what it finds in the cache and what it
asks again comes from the same batches. (Not where a mixture repeats a record within an epoch:
two ranks may then have asked in different batches.)

Of a target position the top k and the mass of the rest are kept by default: 6 k bytes whatever the
teacher's width, 384 at the default 64. States take 2 D bytes in bf16 (T5-small 1024, T5-11B 2048) and
lose nothing, but the teacher's logits are computed anew from them in every epoch. Measured with
`tools/bench/teacher.py --method kd` (t5-mini from t5-v1_1-small, V = 32128): an epoch that reads costs 1.03
times a step without teacher with the top 64, and 1.20 times with states. What that loses, with
`tools/bench/teacher.py fidelity` on the demo (268 tokens, trained teacher, student before it is distilled):
the top 64 moved the distillation loss by 0.9 % and the gradient by 0.6 %, the top 16 by 5 and 3 %, bf16
states by less than 0.01 %. `objective.mi_pair` teacher pools over the whole vocabulary and keeps states.

The teacher may work on the next micro-batch while the student works on this one. That needs a
device that does both at once, and no communication on the teacher's side: two NCCL
communicators under way at the same time may block each other, so sharded teachers do not
overlap. On a CPU both would share the same cores.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ibdistill.config.sections import TeacherConfig
from ibdistill.data import batches
from ibdistill.data.batches import Batch
from ibdistill.data.features import Features
from ibdistill.data.records import STREAMS
from ibdistill.models import families
from ibdistill.objectives.teacher_answers import TeacherAnswer, Wanted
from ibdistill.ops.head_loss.arguments import TeacherStream
from ibdistill.runtime import distributed, files, hardware
from ibdistill.runtime.distributed import World
from ibdistill.teacher.cache import AnswerCache, Entry, key_of
from ibdistill.teacher.teacher import SHARDED, Teacher, fit_rows

logger = logging.getLogger("ibdistill")

_HEAD = "head.tensors"  # safetensors, under a name that the cache does not take for a shard


class _Begun(NamedTuple):
    """A micro-batch that the teacher works on while the student is still at the one before it."""

    rows: bytes
    answer: TeacherAnswer
    batch: Batch


class TeacherAnswers:
    """Gives every micro-batch its teacher answer."""

    def __init__(
        self,
        config: TeacherConfig,
        wanted: Wanted,
        tokenizer: PreTrainedTokenizerBase,
        features: Features,
        student: PreTrainedModel,
        world: World,
        teacher: Teacher | None = None,
        *,
        expects_more: bool = False,
    ) -> None:
        """Open the cache, and load the teacher unless all of `features` is in it. Collective.

        Args:
            tokenizer: the student's.
            features: of the training records.
            teacher: one that is loaded already, for `wanted` among others.
            expects_more: whether `set_features` will bring further ones, for which a teacher is needed.

        Raises:
            ValueError: see `Teacher` and `AnswerCache`; placement cache with records missing.
        """
        self._config, self._wanted, self._features, self._world = config, wanted, features, world
        self._rows = student.get_output_embeddings().weight.shape[0]
        self._layout = families.layout(student, tokenizer)
        self._keys = [self._key(i) for i in range(len(features))] if config.cache else []
        self._cache = self._open_cache(tokenizer) if config.cache else None
        self._reads = self._writes = True
        self._was_summarised = False
        missing = self._missing()
        self.teacher = None
        if missing or expects_more:
            if config.placement == "cache":
                raise ValueError(
                    f"teacher.cache {config.cache} lacks {missing} of the {len(features)} training records; "
                    "run the same data once with the teacher in another placement, which fills it"
                )
            self.teacher = teacher or Teacher(config, wanted, tokenizer, self._rows, world)
            if teacher is not None:
                teacher.pair(tokenizer, self._rows)
            self.width, self._head = self.teacher.width, None
            if self._cache is not None:
                self._keep_head()
        else:
            logger.info(
                "all %d training records are in %s: the teacher is not loaded", len(features), config.cache
            )
            self.width, self._head = self._read_head()
        overlaps = world.device.type == "cuda" and config.placement == "replica"
        self._stream = torch.cuda.Stream() if overlaps else None
        if world.device.type == "cuda" and config.placement in SHARDED:
            logger.info(
                "the sharded teacher does not overlap with the student: two communicators could block"
            )
        self._begun: _Begun | None = None
        self._clock = hardware.Clock(world.device)

    def set_features(self, features: Features, unchanged: int) -> None:
        """From now on rows are those of other features, which begin with the first `unchanged` of these.

        If there are more the teacher is asked for all of them and the cache is left alone: entries
        of text that changes during a run would be read by a resumed run where the first one asked.
        """
        self._features, self._reads = features, len(features) == unchanged
        self._wait()  # and forget what was begun: its rows are those of the old features

    @property
    def overlaps(self) -> bool:
        """Whether `start` does anything."""
        return self._stream is not None

    def of(self, rows: Sequence[int], batch: Batch) -> TeacherAnswer:
        """The answer of a micro-batch, which holds these records of the features. Collective if sharded."""
        with self._clock.measure("stall"):
            begun = self._wait()
            if begun is not None and begun.rows == np.asarray(rows).tobytes():
                return begun.answer
            return self._answer(rows, batch)

    def start(self, rows: Sequence[int], batch: Batch) -> None:
        """Let the teacher begin on a micro-batch that `of` will ask for next.

        Two kinds of memory cross between the streams, and the allocator knows of neither. The answer is made
        on the teacher's stream and read on the student's: `record_stream` tells the allocator. The batch was
        made on the student's stream and is read on the teacher's: it is kept until `_wait`.
        """
        assert self._stream is not None
        self._wait()  # for a micro-batch that was begun and never asked for
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            answer = self._answer(rows, batch)
        for tensor in answer.tensors():
            tensor.record_stream(torch.cuda.current_stream())
        self._begun = _Begun(np.asarray(rows).tobytes(), answer, batch)

    def _wait(self) -> _Begun | None:
        """What `start` began, once the student's stream waits for its end; only then may the batch die."""
        begun, self._begun = self._begun, None
        if begun is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return begun

    def timers(self) -> dict[str, float]:
        """Seconds since the last call: `teacher` at work, `stall` of the student waiting for its answer."""
        return self._clock.read()

    def end_epoch(self) -> None:
        """Let every rank see what the others have written. Collective."""
        if self._cache is not None:
            self.flush()
            dist.barrier()
            self._cache.refresh()
            if not self._was_summarised:
                self._was_summarised = True
                logger.info("%s", self._cache.summary())

    def flush(self) -> None:
        """Write out what is not on disk yet. To be called before a checkpoint."""
        if self._cache is not None and self._writes:
            with self._write_errors():
                self._cache.flush()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """A full disk ends the cache's growth, not the run."""
        try:
            yield
        except OSError as error:
            self._writes = False
            logger.error("%s. The run goes on and asks the teacher for what is not there", error)

    def _key(self, row: int) -> bytes:
        features = self._features
        return key_of(
            *(table[stream][row] for table in (features.questions, features.targets) for stream in STREAMS)
        )

    def _missing(self) -> int:
        """Training records that are not in the cache, the same number on every rank. Collective."""
        missing = self._cache.missing(self._keys) if self._cache else len(self._features)
        return distributed.max_over_ranks(missing)

    def _answer(self, rows: Sequence[int], batch: Batch) -> TeacherAnswer:
        """From the cache if all of it is there, else the teacher is asked for the whole micro-batch."""
        known = self._known(rows)
        if self._complete(known):
            return self._unpack(self._join(known))
        assert self.teacher is not None
        with self._clock.measure("teacher"):
            answer = self.teacher(self._for_teacher(rows, batch))
            if self._cache is None:
                return answer
            packed = self._pack(answer)
        if self._reads:
            # a record keeps its first answer: another batch's padding would change its last bits
            entries = [old or new for old, new in zip(known, self._pieces(rows, packed), strict=True)]
            new = [(row, entry) for row, old, entry in zip(rows, known, entries, strict=True) if old is None]
            self._put(new if self._writes else [])
            if any(known):
                packed = self._join(entries)
        return self._unpack(packed, (answer.weight, answer.bias))

    def _known(self, rows: Sequence[int]) -> list[Entry | None]:
        """What the cache has of each record."""
        if self._cache is None or not self._reads:
            return [None] * len(rows)
        return [found[0] if (found := self._cache.get([self._keys[row]])) else None for row in rows]

    def _complete(self, known: list[Entry | None]) -> bool:
        """Whether nothing has to be asked for. Collective if sharded: then all ranks ask, or none."""
        lacking = int(None in known)
        reads = self._cache is not None and self._reads
        if reads and self.teacher is not None and self.teacher.group is not None:
            lacking = distributed.max_over_ranks(lacking)
        return not lacking

    def _put(self, entries: list[tuple[int, Entry]]) -> None:
        with self._write_errors():
            for row, entry in entries:
                self._cache.put(self._keys[row], entry)

    def _join(self, entries: list[Entry]) -> dict[str, Tensor]:
        """The records' parts as one packed tensor a name, on the device."""
        return {
            name: torch.cat([entry[name] for entry in entries]).to(self._world.device, non_blocking=True)
            for name in entries[0]
        }

    def _pieces(self, rows: Sequence[int], packed: dict[str, Tensor]) -> list[Entry]:
        """Each record's part of packed tensors, on the CPU."""
        lengths = {"questions": self._features.questions["predict"].lengths}
        lengths |= {stream: self._features.targets[stream].lengths for stream in STREAMS}
        parts = {
            name: tensor.cpu().split([int(lengths[name.split(".")[0]][row]) for row in rows])
            for name, tensor in packed.items()
        }
        return [{name: pieces[i] for name, pieces in parts.items()} for i in range(len(rows))]

    def _for_teacher(self, rows: Sequence[int], batch: Batch) -> Batch:
        """The micro-batch as the teacher's family reads it."""
        if self.teacher.layout == self._layout:
            return batch
        theirs = batches.collate(self._features, rows, STREAMS, **self.teacher.layout)
        return theirs.to(self._world.device)

    def _pack(self, answer: TeacherAnswer) -> dict[str, Tensor]:
        """The answer as the tensors that are kept."""
        packed = {} if answer.questions is None else {"questions": answer.questions}
        for stream, target in answer.targets.items():
            if self._config.cache_form == "states":
                packed[stream] = target.hidden
            else:
                ids, probabilities = top_k(
                    target.hidden,
                    answer.weight,
                    answer.bias,
                    self._config.cache_top_k,
                    self._wanted.temperature,
                )
                packed |= {f"{stream}.ids": ids.int(), f"{stream}.probabilities": probabilities.half()}
        return packed

    def _unpack(
        self, packed: dict[str, Tensor], head: tuple[Tensor, Tensor | None] | None = None
    ) -> TeacherAnswer:
        """Collective if the head is needed, not given, and sharded."""
        if not self._wanted.targets:
            return TeacherAnswer(packed["questions"])
        if self._config.cache_form == "states":
            weight, bias = head or self._head or self.teacher.head()
            targets = {stream: TeacherStream(hidden=packed[stream]) for stream in STREAMS}
            return TeacherAnswer(packed.get("questions"), targets, weight, bias)
        targets = {
            stream: TeacherStream(
                ids=packed[f"{stream}.ids"].long(), probabilities=packed[f"{stream}.probabilities"].float()
            )
            for stream in STREAMS
        }
        return TeacherAnswer(packed.get("questions"), targets)

    def _open_cache(self, tokenizer: PreTrainedTokenizerBase) -> AnswerCache:
        config, wanted = self._config, self._wanted
        holds = (["question states"] if wanted.questions else []) + (
            ["target states"] if wanted.targets else []
        )
        fingerprint = {
            "teacher": families.identity(config.model),
            "tokenizer": files.digest(repr(sorted(tokenizer.get_vocab().items())).encode()).hex(),
            "precision": "8bit" if config.load_in_8bit else config.precision,
            "holds": holds,
        }
        if wanted.targets and config.cache_form == "topk":
            fingerprint |= {"top_k": config.cache_top_k, "temperature": wanted.temperature}
        return AnswerCache(Path(config.cache), fingerprint, rank=self._world.rank)

    def _keep_head(self) -> None:
        """Write what a later run needs besides the entries. Collective."""
        weight, bias = self.teacher.head() if self._wanted.targets else (None, None)
        path = Path(self._config.cache) / _HEAD

        def write() -> None:
            if path.is_file():
                return
            tensors = {"weight": weight, "bias": bias}
            tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
            files.write_atomically(path, save(tensors, metadata={"width": str(self.width)}))

        distributed.run_on_rank_0(write)

    def _read_head(self) -> tuple[int, tuple[Tensor | None, Tensor | None]]:
        with safe_open(Path(self._config.cache) / _HEAD, framework="pt") as file:
            tensors = {name: file.get_tensor(name).to(self._world.device) for name in file.keys()}  # noqa: SIM118
            width = int(file.metadata()["width"])
        if "weight" not in tensors:
            return width, (None, None)
        return width, fit_rows(tensors["weight"], tensors.get("bias"), self._rows)


def top_k(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, temperature: float, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of each position and their probabilities: [N, k] int64 and fp32.

    Logits exist for `chunk` positions at a time.
    """
    found = [
        torch.softmax(torch.nn.functional.linear(part, weight, bias).float() / temperature, -1).topk(
            min(k, len(weight))
        )
        for part in hidden.split(chunk)
    ]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])
