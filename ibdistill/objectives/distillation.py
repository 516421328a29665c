"""The objective: which terms, with which weights, on which streams.

    total = alpha CE_predict + (1 - alpha) CE_explain + beta MI
            + gamma (alpha KD_predict + (1 - alpha) KD_explain)

or, in the reason stream (methods `cot...`), the same with the answer in the place of predict and the
rationale in that of explain; where both are trained, each has its share of the total. Each CE and KD is a
mean over the step's target tokens of its segment, and MI a mean over the step's questions (`vid`, `vib`:
over the tokens of its questions), over all ranks and micro-batches. A method (`config.methods.METHODS`) says
which of the terms there are.

Where a method trains one stream only (`finetune`), alpha has no say: that stream's cross entropy has
weight 1, so that its learning rate means the same as in ordinary finetuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ibdistill.config.methods import SAMPLED
from ibdistill.config.sections import ObjectiveConfig
from ibdistill.data.batches import Batch
from ibdistill.data.records import STREAMS
from ibdistill.models import forward as models_forward
from ibdistill.models.architectures import ENCODER_DECODER, family, softcap
from ibdistill.models.families import base_of
from ibdistill.objectives.question_terms import Bottleneck, VidMap
from ibdistill.objectives.teacher_answers import TeacherAnswer
from ibdistill.objectives.token_weights import weighed
from ibdistill.objectives.weights import GRADIENT, mi_settings, pairs_of, text_of, uses_vib, uses_vid
from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss.aligned import AlignedStream, AlignedTeacher, head_loss
from ibdistill.ops.head_loss.api import MISettings, Stream, TeacherDistributions, TeacherStream, Weights
from ibdistill.ops.head_loss.divergences import DIVERGENCES


def check_family(objective: ObjectiveConfig, model: nn.Module) -> None:
    """Raise ValueError for `vib` with a model in which no single state stands between question and answer."""
    base = base_of(model)
    if uses_vib(objective) and family(base) != ENCODER_DECODER:
        raise ValueError(
            f"objective.estimator is vib, but student.model is decoder-only ({base.config.model_type}): its "
            "answer reads the question's states in every layer; choose an encoder-decoder student or another "
            "estimator"
        )


class Pair(NamedTuple):
    """One call of the head loss: a segment with the label, and perhaps one with the rationale, which are
    its predict and its explain stream. A tuple, so that ZeRO-3's hooks find the tensors in it."""

    names: tuple[str, str | None]
    label: Stream
    rationale: Stream | None
    weights: Weights
    teacher: TeacherDistributions | AlignedTeacher | None

    def named(self, term: str) -> str:
        """The name of one of its terms with the segment in the place of the stream."""
        kind, _, stream = term.rpartition("_")
        segments = dict(zip(STREAMS, self.names, strict=True))
        return f"{kind}_{segments[stream]}" if stream in segments else term


def pair_weights(names: tuple[str, str | None], factors: Mapping[str, float]) -> Weights:
    """The weights of a pair's terms, from those by segment (`weights.step_weights`)."""
    found = {"mi": factors["mi"] if names[1] else 0.0}
    for stream, segment in zip(STREAMS, names, strict=True):
        if segment:  # the student's own text has no cross entropy
            found |= {f"{kind}_{stream}": factors.get(f"{kind}_{segment}", 0.0) for kind in ("ce", "kd")}
    return Weights(**found)


def split_text(text: Stream, own: int) -> tuple[Stream, Stream]:
    """A segment of which the last `own` questions are the student's own text, as two: the data's text of all
    questions, where those have none, and the own text of those."""
    first = len(text.cu) - 1 - own
    rows = int(text.cu[first])
    data = Stream(text.hidden[:rows], text.labels[:rows], text.cu.clamp(max=rows))
    return data, Stream(text.hidden[rows:], text.labels[rows:], text.cu[first:] - rows)


def split_teacher(
    target: TeacherStream | AlignedStream, rows: int, questions: int
) -> Sequence[TeacherStream | AlignedStream]:
    """What the teacher says about the two parts that `split_text` has made: of `rows` positions, and of the
    questions from number `questions` on."""
    if isinstance(target, AlignedStream):
        return target.split(rows, questions)
    parts = slice(rows), slice(rows, None)
    return [TeacherStream(*(None if part is None else part[chosen] for part in target)) for chosen in parts]


class _LossHead(nn.Module):
    """The head's weight and the loss on it, as one module.

    ZeRO-3 gathers a module's own parameters around that module's forward, so the loss has to
    happen inside a module that owns the head. The parameter is the model's own, not a copy.
    """

    def __init__(self, head: nn.Linear, softcap: float | None, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.objective = objective
        self.weight = head.weight
        self.bias = head.bias
        self.softcap = softcap
        self.measures = False
        """Whether the next forward also measures each term's gradient (`term_gradients`)."""

    def forward(self, pairs: Sequence[Pair], mi: MISettings | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the pairs' losses, and all their terms, named by segment."""
        total, terms = 0.0, {}
        for pair in pairs:
            arguments = pair.label, pair.rationale, self.weight, self.bias
            own_mi, teacher = mi if pair.rationale is not None else None, pair.teacher
            if teacher is not None:
                head = self.weight, self.bias, self.softcap
                teacher = weighed(self.objective, teacher, pair.names, (pair.label, pair.rationale), head)
            settings = {"mi": own_mi, "teacher": teacher, "softcap": self.softcap}
            loss, own = head_loss(*arguments, weights=pair.weights, **settings)
            if self.measures:
                own |= term_gradients(*arguments, pair.weights, **settings)
            total, terms = total + loss, terms | {pair.named(name): value for name, value in own.items()}
        return total, terms


def term_gradients(
    predict: Stream,
    explain: Stream | None,
    weight: Tensor,
    bias: Tensor | None,
    weights: Weights,
    *,
    mi: MISettings | None,
    **rest: Any,
) -> dict[str, Tensor]:
    """`gradient_TERM` -> squared norm of d (weight x TERM) / d (target states), 0-d fp32, for terms in use.

    The norm is taken where all terms meet, in the states that enter the head, so that it costs one head loss
    per term and no engine takes part. Micro-batches and ranks hold different states of one sum, so the
    squares of a step add up to that of the global batch. `rest` goes to `head_loss`.
    """
    squares = {}
    nothing = Weights(**dict.fromkeys(asdict(weights), 0.0))
    for name, factor in asdict(weights).items():
        if factor == 0:
            continue
        streams = [s and s._replace(hidden=s.hidden.detach().requires_grad_()) for s in (predict, explain)]
        with torch.enable_grad():
            loss, _ = head_loss(
                *streams,
                weight.detach(),
                None if bias is None else bias.detach(),
                weights=replace(nothing, **{name: factor}),
                mi=mi if name == "mi" else None,
                **rest,
            )
        hidden = [s.hidden for s in streams if s is not None]
        gradients = torch.autograd.grad(loss, hidden, allow_unused=True)
        squares[f"{GRADIENT}{name}"] = sum(g.float().square().sum() for g in gradients if g is not None)
    return squares


@torch.no_grad()
def teacher_accuracy(answer: TeacherAnswer, batch: Batch) -> dict[str, Tensor]:
    """`teacher_right`: of `teacher_asked` questions with a label, those whose label the teacher would write;
    0-d fp32.

    Greedy decoding writes a text if and only if each of its tokens is the most probable one after
    the tokens before it, so the scores of the label say it and nothing has to be decoded. Behind a rationale
    (the segment `answer`) the teacher has read the rationale.
    """
    segment = "predict" if "predict" in answer.targets else "answer"
    target, labels, cu = answer.targets[segment], batch.labels[segment], batch.cu[segment]
    if isinstance(target, AlignedStream):
        labels, cu = target.labels, target.cu
    if isinstance(target, TeacherStream) and target.hidden is None:
        best = target.ids[:, 0]
    else:
        best = nn.functional.linear(target.hidden, answer.weight, answer.bias).argmax(-1)
    differs = torch.nn.functional.pad((best != labels).cumsum(0), (1, 0))
    cu = cu.long()
    asked = cu[1:] > cu[:-1]  # a record may lack an answer in the reason stream
    first, last = (to_device(bounds[asked], labels.device) for bounds in (cu[:-1], cu[1:]))
    right = (differs[last] == differs[first]).sum()
    return {"teacher_right": right.float(), "teacher_asked": torch.full_like(right, len(first)).float()}


class Distillation(nn.Module):
    """What the engine wraps: the student, its head and the loss, in one forward."""

    def __init__(
        self,
        model: nn.Module,
        objective: ObjectiveConfig,
        *,
        teacher_width: int = 0,
        seed: int = 0,
    ) -> None:
        """`teacher_width`: size of the teacher's question states, for vid; `seed`: for vid's map."""
        super().__init__()
        self.model = model
        self.head = _LossHead(model.get_output_embeddings(), softcap(base_of(model).config), objective)
        self.objective = objective
        self.mi = mi_settings(objective)
        width = model.get_input_embeddings().embedding_dim
        self.vid = VidMap(width, teacher_width, seed) if uses_vid(objective) else None
        self.vib = Bottleneck(width) if uses_vib(objective) else None

    def forward(
        self,
        batch: Batch,
        weights: Mapping[str, float],
        answer: TeacherAnswer | None = None,
        question_tokens: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's total (0-d fp32), and the sums of all terms, detached.

        `weights`: the factor of each term's sum (`weights.step_weights`). `question_tokens`: of the whole
        step, for vid and vib.
        """
        states = models_forward.states(self.model, batch, bottleneck=self.vib)
        segments = {
            name: Stream(hidden, batch.labels[name], batch.cu[name])
            for name, hidden in states.targets.items()
        }
        own = []
        if batch.own is not None:
            text, _ = text_of(batch.streams)
            segments[text], sampled = split_text(segments[text], batch.own)
            if answer is not None and answer.targets:
                rows, first = len(segments[text].labels), len(batch.question_ids) - batch.own
                rows = 0 if self.objective.divergence in SAMPLED else rows
                parts = split_teacher(answer.targets[text], rows, first)
                answer = replace(answer, targets=answer.targets | {text: parts[0], "sampled": parts[1]})
            segments["sampled"], own = sampled, [("sampled", None)]
        pairs = [
            Pair(
                names,
                segments[names[0]],
                segments.get(names[1]),
                pair_weights(names, weights),
                self._teacher(answer, names),
            )
            for names in [*pairs_of(batch.streams), *own]
        ]
        total, terms = self.head(pairs, self.mi)
        if self.vid is not None:
            factor = self.objective.beta / question_tokens
            vid, more = self.vid(states.questions, answer.questions, factor, measures=self.head.measures)
            total, terms = total + vid, terms | more
        if self.vib is not None:
            kl, squares = states.bottleneck
            factor = self.objective.beta / question_tokens
            total, terms["vib"] = total + factor * kl, kl.detach()
            if self.head.measures:  # in the question's states, as for vid
                terms[f"{GRADIENT}vib"] = factor**2 * squares.detach()
        asked = answer is not None and answer.targets and self.objective.divergence not in SAMPLED
        # a label whose tokens lie on several ranks is right or wrong on none of them
        if self.head.measures and asked and (batch.ranks == 1 or batch.exchanges):
            terms |= teacher_accuracy(answer, batch)
        return total, terms

    def _teacher(
        self, answer: TeacherAnswer | None, names: tuple[str, str | None]
    ) -> TeacherDistributions | AlignedTeacher | None:
        beta, divergence = self.objective.divergence_beta, self.objective.divergence
        # the data's tokens are not draws of the student's
        if answer is None or not answer.targets or (divergence in SAMPLED and names[0] != "sampled"):
            return None
        if beta is None:
            beta = 0.5 if divergence in SAMPLED else DIVERGENCES[divergence].beta
        settings = {
            "predict": answer.targets[names[0]],
            "explain": answer.targets.get(names[1]),  # a method may train on the label alone
            "weight": answer.weight,
            "bias": answer.bias,
            "softcap": answer.softcap,
            "divergence": divergence,
            "beta": beta,
            "temperature": self.objective.kd_temperature,
        }
        if answer.vocabularies:
            return AlignedTeacher(vocabularies=answer.vocabularies, **settings)
        return TeacherDistributions(**settings)
