"""A teacher of another vocabulary (`objective.alignment` text): what it reads, and its answers in the
student's places.

The teacher reads the questions in its own tokens, under its own chat template in format chat, and then the
text of the student's own target tokens, whatever they are: cut ones, and text that the student sampled. So
only its answers have to be brought to the student's places:

- states of the question's tokens (`vid`): a student's token gets the mean of the teacher's states over the
  tokens of the aligned span that it lies in, so tokens that both share get the teacher's own state;
- states at the target's tokens (`kd`): they come with the spans of the text (`ops.head_loss.aligned`).

How the text is aligned is in `data.alignment`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data import alignment, chat, token_ids
from ibdistill.data.alignment import END
from ibdistill.data.features import Features
from ibdistill.data.ragged import Ragged
from ibdistill.data.records import SEGMENTS, Record, segments_of
from ibdistill.objectives.teacher_answers import TeacherAnswer
from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss.aligned import OWN, AlignedStream, Side
from ibdistill.teacher.vocabulary import own_tokenizer

logger = logging.getLogger("ibdistill")

LEAST_SHARED = 0.05
"""The least share of the smaller vocabulary that both must have."""
LEAST_ALIGNED = 0.1
"""The least number of aligned spans per target token of the student's, in the training text."""
_LOOKED_AT, _SHOWN = 500, 2000


class TextAlignment:
    """The student's and the teacher's tokenizer on the same text."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        streams: Sequence[str],
    ) -> None:
        """Read the tokenizer of the teacher `model`; `tokenizer` is the student's.

        In format chat the teacher's end token becomes that of a turn under its template, as the student's.

        Raises ValueError for a teacher without tokenizer or template, a kind of tokenizer whose tokens' bytes
        are not known, and vocabularies that share next to nothing.
        """
        self.tokenizer = own_tokenizer(model)
        if data.format == "chat":
            chat.adopt_turn_end(self.tokenizer, data, streams)
        self._data, self._streams = data, streams
        self._student = alignment.pieces_of(tokenizer, "student.tokenizer")
        self._teacher = alignment.pieces_of(self.tokenizer, "teacher.model")
        self._shared = alignment.shared(self._student, self._teacher)
        self._sides: dict[tuple[int, int], tuple[tuple[Side, Side], ...]] = {}
        mine, yours = len(self._student.own), len(self._teacher.own)
        both = len(self._shared[0].bucket) - 1  # without the end tokens
        self.figures = f"student.tokenizer has {mine} tokens, the teacher's {yours}, and they share {both}"
        if both < LEAST_SHARED * min(mine, yours):
            raise ValueError(
                f"objective.alignment is 'text', and {self.figures}, less than {LEAST_SHARED:.0%} of the "
                "smaller vocabulary; take a teacher whose tokenizer is closer to the student's, or distil "
                "through the teacher's text: teacher.rationales with teacher.placement none"
            )

    def with_questions(
        self, features: Features, records: Sequence[Record], prefixes: alignment.Prefixes
    ) -> Features:
        """The features of these records, with their questions in the teacher's tokens."""
        rows = alignment.questions(records, prefixes, self.tokenizer, self._data, features.streams)
        return replace(features, teacher_questions=rows)

    def check(self, features: Features) -> None:
        """Log how well the training text aligns, and how the teacher reads the first record. Raises
        ValueError if it hardly aligns."""
        some = range(min(len(features), _LOOKED_AT))
        theirs = self.rendered(features, some)
        single = spans = covered = tokens = 0
        for segment, own in theirs.targets.items():
            for i in some:
                found = self._spans(features.targets[segment][i], own[i])
                spans += len(found)
                single += sum(b - a == d - c == 1 for a, b, c, d, *_ in found)
                covered += sum(b - a for a, b, *_ in found)
                tokens += len(features.targets[segment][i])
        message = (
            f"{self.figures}; of the {tokens} target tokens of {len(some)} training records "
            f"{covered / max(1, tokens):.1%} lie in {spans} aligned spans, and {single / max(1, spans):.1%} "
            "of these are one token on both sides"
        )
        if spans < LEAST_ALIGNED * tokens:
            raise ValueError(
                f"objective.alignment is 'text', and {message}: fewer than {LEAST_ALIGNED} spans per token, "
                "so the teacher has little to say about the student's tokens; take a teacher whose tokenizer "
                "is closer to the student's"
            )
        logger.info("alignment: %s", message)
        for stream, prompts in theirs.questions.items():
            target = [i for segment in SEGMENTS[stream] for i in theirs.targets[segment][0].tolist()]
            shown = [ascii(self.tokenizer.decode(ids))[:_SHOWN] for ids in (prompts[0], target)]
            logger.info("alignment: teacher, %s: question %s, target %s", stream, *shown)

    def rendered(self, features: Features, indices: Sequence[int]) -> Features:
        """The records with these indices as the teacher reads them."""
        targets = {}
        for segment in segments_of(features.streams):
            first = segment != "answer"  # behind a rationale
            raw = [b"".join(self._student.of(features.targets[segment][i])) for i in indices]
            texts = [alignment.text_for(r, self._student, self._teacher, begins_target=first) for r in raw]
            end = [self.tokenizer.eos_token_id]
            encoded = token_ids.text_ids(texts, self.tokenizer)
            rows = [ids + end * r.endswith(END) for ids, r in zip(encoded, raw, strict=True)]
            targets[segment] = Ragged(rows)
        questions = {s: Ragged(own[i] for i in indices) for s, own in features.teacher_questions.items()}
        return replace(
            features,
            ids=[features.ids[i] for i in indices],
            groups=features.groups[list(indices)],
            questions=questions,
            targets=targets,
            samples=None,
            own=None,
            teacher_questions={},
        )

    def placed(
        self,
        answer: TeacherAnswer,
        features: Features,
        theirs: Features,
        head_rows: int,
    ) -> TeacherAnswer:
        """An answer about `theirs`, which `rendered` has made, in the places of the student's tokens.

        `features`: the same records in these tokens.

        `head_rows`: the number of rows of the student's head.
        """
        questions = answer.questions
        if questions is not None:
            questions = self._pooled(questions, features.first_questions, theirs.first_questions)
        targets = {}
        for segment, target in answer.targets.items():
            own, rows, lengths = features.targets[segment], [], [0]
            place = np.zeros(2, dtype=np.int64)
            for ids, others in zip(own, theirs.targets[segment], strict=True):
                shift = np.array([place[0], place[0], place[1], place[1], 0, 0])
                rows += [np.array(span) + shift for span in self._spans(ids, others)]
                place += len(ids), len(others)
                lengths.append(int(place[1]))
            labels = torch.from_numpy(theirs.targets[segment].flat).long()
            targets[segment] = AlignedStream(
                target.hidden,
                to_device(labels, target.hidden.device),
                torch.tensor(lengths, dtype=torch.int32),
                torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, 6)),
            )
        if not targets:
            return replace(answer, questions=questions)
        known = self._vocabularies((head_rows, len(answer.weight)), answer.weight.device)
        return replace(answer, questions=questions, targets=targets, vocabularies=known)

    def _vocabularies(self, rows: tuple[int, int], device: torch.device) -> tuple[tuple[Side, Side], ...]:
        """`AlignedTeacher.vocabularies` for heads of so many rows, the student's and the teacher's.

        Rows beyond the tokenizers, which mean nothing, are partners in their order.
        """
        if rows not in self._sides:
            begins = len(self._student.texts), len(self._teacher.texts)
            spare = max(0, min(have - begin for have, begin in zip(rows, begins, strict=True)))
            self._sides[rows] = tuple(
                tuple(
                    Side.of(torch.tensor([*ids, *range(begin, begin + spare)], device=device), have)
                    for ids, begin, have in zip(table[:2], begins, rows, strict=True)
                )
                for table in self._shared
            )
        return self._sides[rows]

    def _spans(self, mine: Sequence[int], yours: Sequence[int]) -> list[tuple[int, ...]]:
        """The rows of `AlignedStream.spans` of one target, counted from its own beginning. A span with a
        character that one of the tokenizers does not know is left out."""
        sides = self._student.of(mine), self._teacher.of(yours)
        lead, found = alignment.begins(*sides), []
        for a, b, c, d in alignment.spans(*sides):
            if self._student.unknown in mine[a:b] or self._teacher.unknown in yours[c:d]:
                continue
            kind = lead if a == 0 else 0
            text, other = b"".join(sides[0][a:b]), b"".join(sides[1][c:d])
            text, other = text[kind == 1 :], other[kind == 2 :]
            bucket = self._shared[kind].bucket.get(text, OWN) if text == other else OWN
            found.append((a, b, c, d, bucket, kind))
        return found

    def _pooled(self, states: Tensor, questions: Ragged, theirs: Ragged) -> Tensor:
        """The teacher's question states [N_teacher, D], as one for each of the student's question tokens."""
        owners: list[int] = []
        counts: list[int] = []
        for ids, others in zip(questions, theirs, strict=True):
            mine = self._student.of(ids, special=True)
            yours = self._teacher.of(others, special=True)
            for a, b, c, d in alignment.spans(mine, yours, cover=True):
                owners.extend([len(counts)] * (b - a))
                counts.append(d - c)
        mine, lengths = (
            to_device(torch.tensor(n, dtype=torch.int64), states.device) for n in (owners, counts)
        )
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        # a sum in the order of the tokens, on a GPU too, where `index_add` has none
        pooled = torch.segment_reduce(wide, "mean", lengths=lengths, unsafe=True)
        return pooled[mine].to(states.dtype)
