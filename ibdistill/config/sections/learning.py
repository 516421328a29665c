"""Settings of what is minimised, on which text, by which optimizer, under which ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibdistill.config.fields import (
    AtLeastOne,
    ClosedShare,
    Decay,
    NotNegative,
    NotNegativeInt,
    OpenShare,
    Positive,
    Share,
    ShareOrSteps,
)
from ibdistill.config.methods import METHODS, DivergenceName, EstimatorName


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised: alpha CE_predict + (1 - alpha) CE_explain + beta MI + gamma KD."""

    method: Literal[tuple(METHODS)] = "dss"
    """finetune: the predict stream's cross entropy only. dss: both cross entropies. ib: these and the
    mutual-information term. kd: these and the distillation term. ib+kd: all four. cot: rationale, then answer
    in one text (the reason stream), the cross entropies of its two segments; cot+ib, cot+kd, cot+ib+kd: these
    and the terms of that name. dss+cot: all three streams."""
    alpha: Share = 0.5
    """Weight of the predict stream's cross entropy (paper: 0.5), and of the answer's in the reason stream;
    the rationale has the rest."""
    reason_share: OpenShare = 0.5
    """The reason stream's share of the total where the other two streams are trained as well (dss+cot)."""
    beta: NotNegative | None = None
    """Weight of the mutual-information term; none: 1 for vid, 0.001 for vib, else 0.1 (as in the paper)."""
    estimator: EstimatorName = "auto"
    """Form of the mutual-information term: see `ops/head_loss/estimators.py`, `ops/vid` and `ops/vib.py`.
    auto: vid with an online teacher, else paper."""
    pool: Literal["max", "mean"] = "max"
    """How a stream's distributions are pooled over its positions (paper: max)."""
    mi_gradient: Literal["explain", "predict", "both"] = "explain"
    """The stream that the term's gradient reaches; the other is its detached target (paper: explain). In a
    reason stream explain stands for the rationale and predict for the answer."""
    mi_pair: Literal["student", "teacher"] = "student"
    """Whose explain distribution paper and normalized pair with the student's predict stream."""
    infonce_temperature: Positive = 0.1
    """InfoNCE's cosine similarities are divided by this; the best value depends on the student."""
    gamma: NotNegative = 1.0
    """Weight of the distillation term: alpha KD_predict + (1 - alpha) KD_explain, or the same of the reason
    stream's answer and rationale."""
    divergence: DivergenceName = "forward"
    """forward: KL(teacher || student). reverse: KL(student || teacher). jsd: the generalised Jensen-Shannon
    divergence. For skew_forward, skew_reverse, adaptive, total_variation and top1 see
    `ops/head_loss/divergences.py`. k1 (the policy gradient of the reverse KL), k2 and k3: estimates from the
    tokens that the student has drawn (`on_policy`), see `ops/head_loss/sampled_token.py`; the data's text has
    its cross entropy alone then."""
    divergence_beta: OpenShare | None = None
    """The divergence's parameter. jsd: the teacher's share in the mixture (none: 0.5, the symmetric form).
    skew_forward, skew_reverse: the first distribution's share in the mixture (none: 0.1). adaptive: the
    probability of the head (none: 0.5). The others have none."""
    kd_temperature: Positive = 1.0
    """Temperature of both distributions; the term is multiplied with its square."""
    kd_target: Literal["teacher", "pmi"] = "teacher"
    """teacher: the teacher's distributions. pmi: these times what the question adds to the record's own
    rationale and label, which the teacher reads too; for the student's own text (`teacher/references.py`)."""
    alignment: Literal["none", "text"] = "none"
    """none: student and teacher must have one vocabulary. text: the teacher may have another tokenizer and
    reads the same text in its own tokens; `kd` compares both where their tokens end at the same byte
    (`ops/head_loss/aligned.py`), and `vid` takes the mean of the teacher's states there."""
    kd_first: ShareOrSteps = 0
    """Only the first tokens of each rationale and own text are distilled: so many, or below 1 that share of
    them; 0: all. The papers of this and the next three are in `objectives/token_weights.py`."""
    kd_later: NotNegative = 0.0
    """Later tokens weigh more in the distillation term: a token's weight is its place in the text, between 0
    and 1, to this power; 0: all weigh the same."""
    kd_entropy: Literal["none", "student", "teacher"] = "none"
    """Whose entropy at a token is the token's weight in the distillation term; none: nobody's."""
    kd_entropy_share: Share = 1.0
    """Below 1: instead, only that share of each text's tokens is distilled, those with the largest
    `kd_entropy`."""


@dataclass(kw_only=True)
class OnPolicyConfig:
    """Text that the student samples itself and learns from by the distillation term alone."""

    share: ClosedShare = 0.0
    """Share of each batch's questions whose rationale is the student's own (lambda of GKD, Agarwal et al.,
    ICLR 2024, arXiv 2306.13649); in a reason stream rationale and answer are. For methods with kd."""
    every: Positive = 1.0
    """Epochs between two samplings. Below 1 text is sampled within an epoch, at most before every step."""
    start: Decay = 0.0
    """Share of the run's steps before the first sampling, in which all text is the data's."""
    temperature: Positive = 1.0
    """Temperature of the samples."""
    top_p: Share = 1.0
    """Samples are drawn from the most probable tokens alone, as many as have this probability together."""
    max_tokens: NotNegativeInt = 0
    """The most tokens of a sample; 0: as many as the data's text may have."""
    unfinished: Literal["keep", "replace"] = "keep"
    """Samples that reach the limit without an end, and empty ones. keep: the teacher scores them as they are.
    replace: such a question keeps the data's text until the next sampling."""


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, its schedule and the batch."""

    lr: Positive = 5e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up: to 0 linearly or along half a cosine, or not at all."""
    warmup_steps: ShareOrSteps = 0
    """Steps of linear warm-up; below 1: the share of `max_steps`, rounded to the nearest whole step."""
    max_steps: AtLeastOne = 10_000
    """Optimizer updates in all."""
    batch_size: AtLeastOne = 64
    """Questions in one optimizer update, over all ranks and micro-batches."""
    micro_batch_size: NotNegativeInt = 0
    """Questions in one forward pass of one rank; 0: `batch_size` / ranks, without accumulation."""
    tokens_per_batch: NotNegativeInt = 0
    """Tokens of questions and targets in one optimizer update, over all ranks and micro-batches, at most, in
    place of `batch_size`; the ranks get near-equal tokens and squared lengths. 0: `batch_size` counts."""
    tokens_per_forward: NotNegativeInt = 0
    """With `tokens_per_batch`, about the tokens in one forward pass of one rank; 0: `tokens_per_batch` /
    ranks, without accumulation."""
    sequence_parallel: AtLeastOne = 1
    """So many neighbouring ranks share each sequence, a part of its tokens each, and count as one rank above
    (Ulysses, `models/sequence_parallel.py`). For decoder-only students with `data.packing` on; it has to
    divide the ranks and the attention heads."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay; not applied to norms, biases and embeddings."""
    adam_beta1: Decay = 0.9
    """Decay of the running mean of AdamW's gradients."""
    adam_beta2: Decay = 0.999
    """Decay of the running mean of AdamW's squared gradients; large language models often take 0.95."""
    adam_eps: Positive = 1e-8
    """Added to AdamW's denominator; larger values damp the steps of weights with tiny gradients."""
    clip_norm: NotNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    relative_bias_lr_scale: Positive = 1.0
    """Learning-rate factor of T5's relative position biases; tiny models from scratch need about 10."""


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """ZeRO and offload."""

    config: str = "auto"
    """A name in ds_configs/ or a path. The file holds ZeRO and offload settings only. auto: zero2, or on
    one rank, where ZeRO has nothing to divide and costs time, zero0."""
