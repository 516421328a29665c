"""The target `pmi` (`objective.kd_target`): what a teacher that sees the reference says, less what it copies.

A teacher that is shown the reference, a record's own rationale and label, scores a student's text better, and
part of that is mere copying, which the student cannot do when it is asked. So the teacher reads the same
tokens y three times, and with x the question and r the reference the target at each position is

    q(y_t)  =  softmax over y_t of   log p(y_t | x, y_<t)  +  log p(y_t | x, r, y_<t)  -  log p(y_t | r, y_<t)

The last two are the pointwise mutual information of the question and the next token, given the reference:
the teacher that sees question and reference, minus the teacher that sees the reference alone. Where the
reference says it all they cancel, and the target is the teacher's usual one.

The idea is from Shen et al., "Purified OPSD: On-Policy Self-Distillation Without Losing How to Think", 2026,
arXiv 2607.02234, of which no more than the abstract could be had. The formula is this project's: without its
first term, each of the many tokens that all three hold impossible would get the weight exp(0), the same as a
token that all three are sure of, and with it the target is a distribution around the teacher's own.

A head is linear, and softmax does not see what is the same for all tokens. So q is what the head makes of the
states h(x) + h(x, r) - h(r), exactly: whatever reads a teacher's states (the head loss in all its forms, the
cache, spans of another vocabulary) has this target without knowing. A cap on the logits would break that, so
`Teacher` refuses one. The sum is taken in fp32 and rounded once to the precision of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data import alignment
from ibdistill.data.features import Features
from ibdistill.data.records import Record
from ibdistill.objectives.teacher_answers import TeacherAnswer
from ibdistill.ops.head_loss.arguments import TeacherStream
from ibdistill.teacher.teacher import Teacher

INTRODUCTION = "Reference solution:"
_MARGIN = 32  # tokens of the introduction, and of the ends of lines


def with_references(
    features: Features,
    records: Sequence[Record],
    prefixes: alignment.Prefixes,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
) -> Features:
    """The features of these records, with what the teacher reads besides their questions.

    `tokenizer`: the teacher's. A question with its reference may be as long as both limits of `data` allow.
    """
    limit = data.max_question_tokens + data.max_rationale_tokens + data.max_label_tokens + _MARGIN
    data = replace(data, max_question_tokens=limit)
    with_question, alone = [], []
    for record in records:
        reference = "\n".join(part for part in (INTRODUCTION, record.rationale, record.label) if part)
        system = tuple(turn for turn in record.history if turn[0] == "system")
        with_question.append(replace(record, question=f"{record.question}\n\n{reference}"))
        alone.append(replace(record, question=reference, history=system))
    tables = [
        alignment.questions(rows, prefixes, tokenizer, data, features.streams)
        for rows in (with_question, alone)
    ]
    return replace(features, with_reference=tables[0], reference_alone=tables[1])


def check_positions(features: Features, teacher: Teacher) -> None:
    """Raise ValueError unless the teacher has positions for every record with its reference."""
    longest = max((table.lengths.max(initial=0) for table in features.with_reference.values()), default=0)
    behind = max(int(own.lengths.max(initial=0)) for own in features.targets.values())
    need = int(longest) + 1 + behind * (teacher.layout.get("separator") is not None)
    if longest and teacher.positions is not None and need > teacher.positions:
        raise ValueError(
            "objective.kd_target is 'pmi', for which the teacher reads rationale and label with the question,"
            f" and teacher.model {teacher.config.model!r} has {teacher.positions} positions where {need} are "
            "needed; lower data.max_question_tokens and data.max_rationale_tokens, or leave kd_target out"
        )


def readings(features: Features, indices: Sequence[int], theirs: Features | None) -> list[Features]:
    """The records with these indices as a teacher reads them that sees question and reference, and the
    reference alone. `theirs`: these records in the tokens of a teacher of another vocabulary."""
    taken = features.take(indices)
    asked = taken if theirs is None else theirs
    return [replace(asked, questions=table) for table in (taken.with_reference, taken.reference_alone)]


def purified(answer: TeacherAnswer, seen: dict[str, Tensor], alone: dict[str, Tensor]) -> TeacherAnswer:
    """The answer with the states of the target `pmi`, from those [N, D] of each segment in the `readings`."""
    targets = {}
    for segment, plain in answer.targets.items():
        wide = torch.promote_types(plain.hidden.dtype, torch.float32)
        hidden = plain.hidden.to(wide) + (seen[segment].to(wide) - alone[segment].to(wide))
        targets[segment] = TeacherStream(hidden=hidden.to(plain.hidden.dtype))
    return replace(answer, targets=targets)
