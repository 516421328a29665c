"""Every setting of a run: its type, default, range and meaning.

A setting's value comes, in rising precedence, from the defaults below, from a recipe (a YAML
file that lists only what differs), and from `--section.field value` on the command line. All
values are checked before a model or a data set is touched: one by one by `config/fields.py`,
against each other by `config/consistency.py`. The strings below the fields are what `--help`
prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ibdistill.config.fields import (
    AtLeast32,
    AtLeastOne,
    AtLeastTwo,
    ClosedShare,
    Decay,
    NotNegative,
    NotNegativeInt,
    OpenShare,
    Positive,
    Seed,
    Share,
    ShareOrCount,
    ShareOrSteps,
)
from ibdistill.config.methods import METHODS, DivergenceName, EstimatorName

ReporterName = Literal["tensorboard", "jsonl", "wandb"]


@dataclass(kw_only=True)
class RunConfig:
    """The run's folder and seed, and what it does at intervals and at its end."""

    dir: str = ""
    """Run folder: configuration, checkpoints, events, result. Empty: `runs/RECIPE`."""
    seed: Seed = 0
    """Seed of initialisation, data order and dropout."""
    log_every: AtLeastOne = 10
    """Steps between two console lines and TensorBoard points."""
    report_to: list[ReporterName] = field(default_factory=lambda: ["tensorboard", "jsonl"])
    """Where curves go. tensorboard: `DIR/tensorboard`; jsonl: `DIR/metrics.jsonl`; wandb: Weights & Biases,
    which takes its key, project and mode from its environment variables. `[]`: nowhere."""
    term_gradients_every: NotNegativeInt = 100
    """Steps between two measurements of the gradient norm of each term of the loss; 0: never."""
    peak_tflops: NotNegative = 0.0
    """Peak rate of one device in 10^12 operations per second, of which `speed/mfu` is a share. 0: its data
    sheet's, in the run's precision, for the GPUs that `runtime/hardware.py` lists; for other devices measured
    once, by matrix products."""
    eval_every: NotNegativeInt = 0
    """Steps between two evaluations on the validation split; 0: only at the end."""
    eval_limit: NotNegativeInt = 0
    """Evaluate on at most this many validation records during training; 0: all of them."""
    eval_batch_size: AtLeastOne = 64
    """Records that one rank decodes together, in evaluations and when it answers `data.unlabelled`."""
    save_every: AtLeastOne = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: AtLeastOne = 2
    """Checkpoints kept besides the best one."""
    test_limit: NotNegativeInt = 0
    """Test on at most this many records of each task; 0: all of them."""
    final: Literal["last", "best"] = "last"
    """Which checkpoint is tested and exported: the last one, or the best of the evaluations on the validation
    split (see `eval_every`), as for small data sets, on which long training overfits."""
    patience: NotNegativeInt = 0
    """End the run after this many evaluations in a row (see `eval_every`) without a better score on the
    validation split; 0: never. The learning rate's schedule does not know of it."""
    export: bool = True
    """Write the student for `from_pretrained` to `DIR/student` at the end."""
    push_to_hub: str = ""
    """`NAME` or `OWNER/NAME`: the repository of the hub to which the exported student is then sent; it is
    made, private, if it is not there. The token comes from the environment (HF_TOKEN) or `hf auth login`."""
    max_skipped_steps: AtLeastOne = 5
    """End the run after this many steps in a row with a non-finite loss or gradient; fewer are skipped."""
    check_memory: bool = True
    """Refuse a run that cannot fit into memory before it loads anything: see `planning/memory_check.py`."""
    allow_config_change: bool = False
    """Resume although settings differ from those that the run folder was started with."""


@dataclass(kw_only=True)
class DataConfig:
    """Which records a run learns from."""

    task: str | list[str] = "demo"
    """Name of a task in `ibdistill/data/tasks`, or several for a mixture."""
    path: str | None = None
    """Folder or file that holds the data; none: the demo's generator, or the hub by the task's name."""
    label_source: Literal["gt", "llm", "teacher"] = "gt"
    """Training labels from the ground truth, from the LLM's output, or, where the teacher writes
    (`teacher.rationales`), from the teacher; `jsonl` training records may then lack one. Scores always
    use the ground truth."""
    llm: Literal["palm", "gpt-neox"] = "palm"
    """The LLM whose rationales (and labels) are read from the data release of Distilling Step-by-Step, which
    holds those of two LLMs for some tasks."""
    question_field: str = "question"
    """Name of the question's field, for the task `jsonl` and for `unlabelled`."""
    label_field: str = "label"
    """Name of the label's field, for the task `jsonl` and for `unlabelled`."""
    rationale_field: str = "rationale"
    """Name of the rationale's field, for the task `jsonl`."""
    answer_check: Literal["text", "value", "choice"] = "text"
    """When an answer to the task `jsonl` is right. text: it is the label's text, or both are numbers of one
    value; value: both have one exact value, expressions included; choice: it is the option, by text or
    letter, of those that the question lists as `(a) ...` lines."""
    missing_rationales: Literal["refuse", "predict_only"] = "refuse"
    """Training records without a rationale, where the method trains on rationales. predict_only: they train
    the predict stream alone, for methods that have one."""
    long_reasoning: Literal["drop", "cut", "refuse"] = "drop"
    """Rationales of the reason stream beyond `max_rationale_tokens`, the marker before the answer included.
    drop: such records do not train it, and are counted; cut: they lose their end, and the marker and the
    answer stay; refuse: the run does not start. The explain stream always cuts."""
    answer_marker: str = ""
    """What stands between rationale and answer in the reason stream. Empty: the task's own words, for most
    tasks `The answer is:`."""
    format: Literal["plain", "chat"] = "plain"
    """How a question becomes a prompt. plain: prefix, question and separator; chat: a conversation under the
    tokenizer's own chat template, for decoder-only models. The prefixes of predict and explain stand in the
    user's text there, and the reason stream has none."""
    system: str = ""
    """The system message of every conversation in format chat. Empty: what the template does without one."""
    think_open: str = ""
    """What begins a rationale of the reason stream in format chat. Empty: `<think>`."""
    think_close: str = ""
    """What ends a rationale of the reason stream in format chat, before the answer. Empty: `</think>`."""
    loss_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Of a conversation of several turns (`messages` of a `jsonl` record, in format chat): whether each turn
    of the assistant is learned, or the last one. Scores are those of the last one."""
    subsample: ShareOrCount = 1.0
    """Training records to keep: a share up to 1, or a number above 1. Drawn with `subsample_seed`."""
    subsample_seed: Seed = 0
    """Seed of the subsample, apart from `run.seed` so that a data-efficiency curve can vary either."""
    valid_share: OpenShare = 0.1
    """Share of the training records held out for validation where a task has no validation split."""
    mixture_weights: list[Positive] | None = None
    """Relative weights of a mixture's tasks; none: their sizes to the power 1 / `mixture_temperature`."""
    mixture_temperature: Positive = 1.0
    """1: tasks in proportion to their sizes, which need not be known; larger: more even, as in T5."""
    derive_rationales: bool = False
    """Give SVAMP.json, which has no rationales, some that are derived from its equations: they are right, and
    no human wrote them."""
    choice_labels: Literal["text", "letter"] = "text"
    """Training labels of multiple-choice tasks: the right option's text, as in the data release of Distilling
    Step-by-Step, or its letter, which a student without pretraining can spell. Answers may give either."""
    map_numbers: bool = False
    """Write the i-th number of a question as `n<i>` in all texts (arithmetic tasks)."""
    bucket_batches: AtLeastOne = 1
    """Number of batches that are sorted by length together, which saves padding and makes batches less
    random: see `data/sampler.py`. 1: plain shuffling."""
    packing: Literal["off", "on"] = "off"
    """on: the rows of a micro-batch lie one behind the other without padding, and attention stays within each
    (`ops/packed_attention.py`). The losses are the same. off: rows are padded."""
    unlabelled: AtLeastOne | str | None = None
    """Questions to learn from where the student's two streams agree, see `training/pseudo_labels.py`: a JSONL
    file of them, as the student reads them without the prefix; for the task demo how many to generate. None:
    off."""
    agree_at: list[OpenShare] = field(default_factory=lambda: [0.4, 0.7])
    """When the unlabelled questions are answered, as shares of `optim.max_steps` in rising order."""
    agree_share: OpenShare = 0.5
    """Share of each later batch that questions with agreed answers take; the rest stays labelled records."""
    taught: AtLeastOne | str | None = None
    """Unlabelled questions, as for `unlabelled`, that join the training records with the label and rationale
    that the teacher writes (`teacher.rationales` and `label_source` teacher). None: off."""
    demo_test_seed: Seed = 777001
    """Seed of the demo's test problems. Each seed gives 2,000 others, none of which is in another split or in
    the unlabelled text, so a figure can be reported on problems that no choice was made on."""
    max_question_tokens: AtLeastTwo = 1024
    """Longer questions are cut, and counted."""
    max_label_tokens: AtLeastTwo = 64
    """Longer labels are cut, and counted; also the length limit when decoding them. A reason stream is
    decoded up to `max_rationale_tokens` and this many tokens."""
    max_rationale_tokens: AtLeastTwo = 256
    """Longer rationales are cut, and counted; also the length limit when decoding them. For those of a reason
    stream see `long_reasoning`."""

    def answer_limits(self) -> dict[str, int]:
        """Stream -> the most tokens of an answer."""
        label, rationale = self.max_label_tokens, self.max_rationale_tokens
        return {"predict": label, "explain": rationale, "reason": rationale + label}

    def pseudo_batch_size(self, batch_size: int) -> int:
        """Number of pseudo-labelled records in each batch once there are any."""
        return round(self.agree_share * batch_size)


@dataclass(kw_only=True)
class StudentConfig:
    """The model that is trained."""

    model: str = "demo-student"
    """A preset of `models/presets.py` (random weights), a hub name, or a local folder."""
    tokenizer: str = ""
    """Hub name or folder; `train`: one trained on the training split; empty: the model's own."""
    vocab_size: AtLeast32 = 4000
    """Pieces of a tokenizer that is trained here (an upper bound)."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Whether a hub or local model keeps its weights or only its shape. Presets are always random."""
    dropout: Decay | None = None
    """Dropout rate; none: the model's own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: bf16 weights and activations with fp32 master weights and optimizer states. fp32: all of it in
    fp32, whose products are in full precision on a GPU too, without TF32. auto: bf16 on a GPU that has it,
    else fp32."""
    lora_rank: NotNegativeInt = 0
    """Rank of LoRA adapters; 0: train all weights."""
    lora_alpha: Positive = 16.0
    """LoRA's scale is `lora_alpha / lora_rank`."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get adapters, or `all-linear`; empty: those that peft has for the
    model's type, and all linear layers where it has none."""
    load_in_4bit: bool = False
    """Frozen weights in 4 bits through bitsandbytes below the adapters (QLoRA, Dettmers et al., arXiv
    2305.14314); with `lora_rank`, a GPU, pretrained weights and ZeRO up to stage 2 only."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """torch.compile the encoder (if there is one) and the decoder."""


@dataclass(kw_only=True)
class TeacherConfig:
    """The online teacher: a frozen model that writes rationales and scores the student's targets."""

    placement: Literal["none", "replica", "zero3", "zero3_node", "cpu_offload", "cache"] = "none"
    """Where the teacher's weights live: see `teacher/teacher.py`. none: no teacher; rationales come with the
    data."""
    model: str = ""
    """A hub name, a local folder, or a preset (random weights, for measurements)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the teacher's weights and hidden states."""
    load_in_8bit: bool = False
    """Weights in 8 bits through bitsandbytes; a GPU and placement replica only."""
    cache: str = ""
    """Folder where the teacher's answers are kept, so that it scores every question once; empty: nowhere."""
    cache_form: Literal["auto", "states", "topk"] = "auto"
    """What is kept per target position: the last hidden state, or the most probable tokens. auto: topk, but
    states for `objective.mi_pair` teacher, which pools over every token. `teacher/README.md` has the bytes
    that each form takes."""
    cache_top_k: AtLeastOne = 64
    """Tokens per position that `cache_form` topk keeps; the probability of all others is one number."""
    rationales: Literal["none", "missing", "all"] = "none"
    """Training records that the teacher explains and answers; missing: those without a rationale or label."""
    keep: Literal["all", "agree"] = "all"
    """Train on all records that the teacher answers, or only on those with the right label (agree)."""
    template: str = ""
    """How the teacher is asked: a text with `{question}` in it, or a file that holds such a text; it then
    gives rationale and label in one answer. Empty: by the task's two prefixes, as a student is asked, which
    an instructed language model does not understand."""
    temperature: NotNegative = 0.0
    """Temperature at which the teacher's text is drawn, with `run.seed`; 0: greedy decoding."""
    max_unparsed: ClosedShare = 0.5
    """Stop if more than this share of the teacher's answers has no rationale and label: then its template is
    wrong, and the run would silently train on what is left."""
    write_batch_size: AtLeastOne = 32
    """Records that one rank asks the teacher about together."""
    rationale_cache: str = ""
    """Folder of the texts that the teacher wrote; empty: `RUN/rationales`."""


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
    `ops/head_loss/divergences.py`."""
    divergence_beta: OpenShare | None = None
    """The divergence's parameter. jsd: the teacher's share in the mixture (none: 0.5, the symmetric form).
    skew_forward, skew_reverse: the first distribution's share in the mixture (none: 0.1). adaptive: the
    probability of the head (none: 0.5). The others have none."""
    kd_temperature: Positive = 1.0
    """Temperature of both distributions; the term is multiplied with its square."""


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


@dataclass(kw_only=True)
class Config:
    """All sections of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def rationale_folder(self) -> Path:
        """The folder of the teacher's texts. Raises ValueError if the teacher writes none."""
        if self.teacher.rationales == "none":
            raise ValueError("teacher.rationales is 'none'; set it to missing or all")
        return Path(self.teacher.rationale_cache or Path(self.run.dir) / "rationales")
