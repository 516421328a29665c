"""Where the teacher's answer for a micro-batch comes from: the teacher itself, or the cache of its answers.

A teacher's answer to the same tokens under the same settings never changes. So with `teacher.cache` the
teacher is asked in the first epoch, its answers are written, and later epochs read them. An entry of the
cache is one record's answer, under a key made of its token ids, which is why a cache also serves other
seeds, subsamples and mixtures. `answer_tensors` says what an entry holds and what it depends on; a cache of
something else is refused.

A micro-batch is read only if all of its records are in the cache; otherwise the teacher is asked for all of
them. A record keeps its first answer, and entries are written out before every checkpoint. Therefore a run
that was interrupted and continued is bit-identical on a CPU to one that was not: the answers that it finds
in the cache and those that it asks for again come from the same batches. (This does not hold where a
mixture repeats a record within an epoch, because two ranks may then have asked for it in different
batches.)

The teacher may work on the next micro-batch while the student works on this one. That needs a device that
does both at once: on a CPU they would share the same cores. It also needs a teacher that communicates with no
other rank: two NCCL communicators in use at the same time may block each other, so a sharded teacher does not
overlap with the student.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ibdistill.config.sections import TeacherConfig
from ibdistill.data.batches import Batch
from ibdistill.data.features import Features
from ibdistill.models import families, sequence_parallel
from ibdistill.objectives.teacher_answers import TeacherAnswer, Wanted
from ibdistill.runtime import distributed, hardware
from ibdistill.runtime.distributed import World
from ibdistill.teacher import answer_tensors, references, sampled_form
from ibdistill.teacher.alignment import TextAlignment
from ibdistill.teacher.answer_tensors import NO_HEAD, Head
from ibdistill.teacher.cache import AnswerCache
from ibdistill.teacher.cache_shard import Entry, record_key
from ibdistill.teacher.cache_writer import CacheWriter
from ibdistill.teacher.teacher import SHARDED, Teacher

logger = logging.getLogger("ibdistill")


class _Begun(NamedTuple):
    """A micro-batch that the teacher works on while the student is still at the one before it."""

    indices: bytes
    """The indices of its records, as the bytes of an integer array."""
    answer: TeacherAnswer
    batch: Batch


class TeacherAnswers:
    """Gives every micro-batch the teacher's answer about it."""

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
        alignment: TextAlignment | None = None,
        seed: int = 0,
        score: Callable[[Features], None] | None = None,
    ) -> None:
        """Open the cache, and load the teacher unless all of `features` is in it. Collective.

        Args:
            config: where the teacher is, and the form of its cache.
            wanted: what the objective asks of the teacher.
            tokenizer: the student's tokenizer.
            features: the token tables of the training records.
            student: the model whose head and family the answers must fit.
            teacher: a loaded teacher that answers `wanted`; None: one is loaded if it is needed.
            seed: of the tokens that a cache of form sampled draws.
            expects_more: whether `set_features` will bring more records, for which a teacher is needed.
            alignment: for a teacher of another vocabulary; None: it has the student's.
            score: lets a server score features that join later, into the cache; None: there is no server.

        Raises:
            ValueError: as `Teacher` and `AnswerCache` raise it, and where placement is cache, or server,
                whose answers are there already, and records are missing.
        """
        self._config, self._wanted, self._features, self._world = config, wanted, features, world
        self.alignment, theirs = alignment, alignment and alignment.tokenizer
        self._student_rows = student.get_output_embeddings().weight.shape[0]
        self._head_rows = None if alignment else self._student_rows
        self._seed, self._score = seed, score
        self._layout = families.layout(student, tokenizer)
        self._keys = [record_key(features, i) for i in range(len(features))] if config.cache else []
        self._cache = self._writer = None
        if config.cache:
            fingerprint = answer_tensors.fingerprint(config, wanted, tokenizer, theirs, seed=seed)
            self._cache = AnswerCache(Path(config.cache), fingerprint, rank=world.rank)
            self._writer = CacheWriter(self._cache)
        self._reads, self._was_summarised = True, False
        missing = self._missing()
        kept = None
        if not missing and (score or not expects_more):
            kept = answer_tensors.read_head(Path(config.cache), world.device, self._head_rows)
        self.teacher = None
        if kept is None:
            if config.placement in ("cache", "server"):
                records = f"{missing} of the {len(features)} training records"
                what = records if missing else "the teacher's head"
                raise ValueError(
                    f"teacher.cache {config.cache} lacks {what}; "
                    "run the same data once with the teacher in another placement, which fills it"
                )
            pair = (theirs or tokenizer), self._head_rows
            self.teacher = teacher or Teacher(config, wanted, *pair, world)
            if teacher is not None or alignment is not None:
                self.teacher.pair(*pair)
            references.check_positions(features, self.teacher)
            sequence_parallel.check_layouts(config.model, self._layout, self.teacher.layout)
            self.width, self._head = self.teacher.width, None
            if self._cache is not None:  # a run without a loaded teacher needs its head too
                head = self.teacher.head() if wanted.targets else NO_HEAD
                made = Path(config.cache), self.width, head
                distributed.run_on_rank_0(lambda: answer_tensors.write_head(*made))
        else:
            logger.info("all %d records are in %s: no teacher is loaded", len(features), config.cache)
            self.width, self._head = kept
        alone = config.placement == "replica" and not sequence_parallel.is_on()
        self._stream = torch.cuda.Stream() if world.device.type == "cuda" and alone else None
        if world.device.type == "cuda" and config.placement in SHARDED:
            logger.info("the sharded teacher does not overlap with the student: communicators could block")
        self._begun: _Begun | None = None
        self._clock = hardware.Clock(world.device)

    def set_features(self, features: Features, unchanged: int, *, keeps: bool = False) -> None:
        """From now on indices are those of other features, which begin with the first `unchanged` of these.

        If there are more, the teacher is asked for all of them and the cache is left alone, unless `keeps`
        says that it is to hold the answers about the new ones too, because they will be asked for again.
        """
        if self._writer is not None:
            self._writer.take_arrived()  # it is about the old features
        if self._score is not None and len(features) > unchanged:
            self._score(features.take(range(unchanged, len(features))))
            self._cache.refresh()
            keeps = True
        self._features, self._reads = features, keeps or len(features) == unchanged
        if self._keys and keeps:
            del self._keys[unchanged:]
            self._keys += [record_key(features, i) for i in range(unchanged, len(features))]
        self._wait()  # and forget what was begun: its indices are those of the old features

    @property
    def overlaps(self) -> bool:
        """Whether `start` does anything."""
        return self._stream is not None

    def of(self, indices: Sequence[int], batch: Batch) -> TeacherAnswer:
        """The answer about a micro-batch of the records with these indices. Collective if sharded."""
        with self._clock.measure("stall"):
            begun = self._wait()
            if begun is not None and begun.indices == np.asarray(indices).tobytes():
                return begun.answer
            return self._answer(indices, batch)

    def start(self, indices: Sequence[int], batch: Batch) -> None:
        """Let the teacher begin on a micro-batch that `of` will ask for next.

        Two kinds of memory cross between the streams, and the allocator knows of neither. The answer is
        made on the teacher's stream and read on the student's: `record_stream` tells the allocator. The
        batch was made on the student's stream and is read on the teacher's: it is kept until `_wait`.
        """
        assert self._stream is not None
        self._wait()  # for a micro-batch that was begun and never asked for
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            answer = self._answer(indices, batch)
        for tensor in answer.tensors():
            if tensor.device == self._world.device:  # the host reads the spans of an aligned answer
                tensor.record_stream(torch.cuda.current_stream())
        self._begun = _Begun(np.asarray(indices).tobytes(), answer, batch)

    def _wait(self) -> _Begun | None:
        """What `start` began; only once the student's stream waits for its end may the batch be freed."""
        begun, self._begun = self._begun, None
        if begun is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return begun

    def timers(self) -> dict[str, float]:
        """Seconds since the last call in which the `teacher` worked, and the student waited (`stall`)."""
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
        """Write out the entries that are not on disk yet. This has to be called before a checkpoint."""
        if self._writer is not None:
            self._writer.flush()

    def _missing(self) -> int:
        """The number of training records that are not in the cache, the same on every rank. Collective."""
        missing = self._cache.missing(self._keys) if self._cache else len(self._features)
        return distributed.max_over_ranks(missing)

    def _answer(self, indices: Sequence[int], batch: Batch) -> TeacherAnswer:
        """The answer in the places of the student's tokens."""
        if self.alignment is None:
            return self._own_answer(indices, batch, None)
        theirs = self.alignment.rendered(self._features, indices)
        answer = self._own_answer(indices, batch, theirs)
        mine = sequence_parallel.owned(len(indices))
        both = self._features.only(indices, mine), theirs.only(range(len(theirs)), mine)
        return self.alignment.placed(answer, *both, self._student_rows)

    def _own_answer(self, indices: Sequence[int], batch: Batch, theirs: Features | None) -> TeacherAnswer:
        """The answer, read from the cache if all of it is there; else the teacher is asked for all of it.
        `theirs`: these records in the tokens of a teacher of another vocabulary."""
        if self._writer is not None:
            self._writer.take_arrived()
        mine = sequence_parallel.owned(len(indices))
        known: list[Entry | None] = [None] * len(indices)
        if self._cache is not None and self._reads:
            known = answer_tensors.known(self._cache, [self._keys[i] for i in indices], mine)
        if self._complete(known):
            return self._unpack(answer_tensors.join(known, self._world.device), self._head)
        assert self.teacher is not None
        asked, read = (self._features, indices) if theirs is None else (theirs, range(len(theirs))), indices
        told = asked
        if self._wanted.own:
            told = (self._features.own_alone(indices, questions=True)[0], range(len(indices)))
            every = self._wanted.questions or sequence_parallel.is_on()
            theirs, read = self._features.own_alone(indices, questions=every)
            asked = theirs, range(len(theirs))
        with self._clock.measure("teacher"):
            answer = self.teacher(self._for_teacher(*asked, batch))
            if self._wanted.pmi:
                read = references.readings(self._features, read, theirs)
                more = (self._for_teacher(own, range(len(own)), batch) for own in read)
                answer = references.purified(answer, *(self.teacher.states(own)[0] for own in more))
            if self._cache is None:
                return answer
            samples = self._config.cache_samples
            kept = [i for i, own in zip(indices, mine, strict=True) if own]
            uniforms = partial(sampled_form.uniforms_of, self._features, kept, samples, self._seed)
            packed = answer_tensors.pack(answer, self._config, self._wanted.temperature, uniforms)
        if self._reads:
            # the host goes on while the answer is on its way to it, and puts it into the cache later
            new = [own and not old for own, old in zip(mine, known, strict=True)]
            keys = [self._keys[i] if asks else None for i, asks in zip(indices, new, strict=True)]
            lengths = {name: rows * mine for name, rows in answer_tensors.lengths(*told).items()}
            self._writer.put(packed, keys, partial(answer_tensors.pieces, lengths=lengths))
            if any(known):
                # a record keeps its first answer, because another batch's padding would change the last bits
                fresh = answer_tensors.pieces(packed, lengths)
                kept = [old or now for old, now in zip(known, fresh, strict=True)]
                packed = answer_tensors.join(kept, self._world.device)
        # a new answer goes through the kept form too, so that asking and reading give the same step
        return self._unpack(packed, (answer.weight, answer.bias, answer.softcap))

    def _complete(self, known: list[Entry | None]) -> bool:
        """Whether nothing has to be asked for. Collective where ranks ask together: all of them or none."""
        lacking = int(None in known)
        can_choose = self._cache is not None and self._reads and self.teacher is not None
        if can_choose and (sequence_parallel.is_on() or self.teacher.group is not None):
            lacking = distributed.max_over_ranks(lacking)
        return not lacking

    def _for_teacher(self, features: Features, indices: Sequence[int], batch: Batch) -> Batch:
        """The micro-batch, of these features, as the teacher's family reads it."""
        is_same = features is self._features and self.teacher.layout == self._layout
        if is_same and (batch.row_lengths is None or self.teacher.packs):
            return batch
        return self.teacher.reading(features, indices, packed=batch.row_lengths is not None)

    def _unpack(self, packed: dict[str, Tensor], head: Head | None) -> TeacherAnswer:
        """The answer in packed tensors. Collective if its head is needed, not given, and sharded."""
        if head is None:
            needed = self._wanted.targets and self._config.cache_form == "states"
            head = self.teacher.head() if needed else NO_HEAD
        return answer_tensors.unpack(packed, head, self._head_rows)
