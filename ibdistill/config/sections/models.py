"""Settings of the student and of its teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ibdistill.config.fields import (
    AtLeast32,
    AtLeastOne,
    Byte,
    ClosedShare,
    Decay,
    NotNegative,
    NotNegativeInt,
    Positive,
)


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
    layers: NotNegativeInt = 0
    """Layers of a hub or local model that stay, evenly spaced (`models/depth.py`); an encoder-decoder model
    keeps so many of each stack. 0: all."""
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

    placement: Literal["none", "replica", "zero3", "zero3_node", "cpu_offload", "cache", "server"] = "none"
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
    cache_form: Literal["auto", "states", "topk", "sampled"] = "auto"
    """What is kept per target position: the last hidden state, the most probable tokens, or tokens drawn from
    the distribution (for divergence forward). auto: topk, but states for `objective.mi_pair` teacher, which
    pools over every token, and for divergence k1, k2 and k3 unless a server answers. `teacher/README.md` has
    the bytes that each form takes."""
    cache_top_k: AtLeastOne = 64
    """Tokens per position that `cache_form` topk keeps; the probability of all others is one number."""
    cache_samples: Byte = 12
    """Draws per position of `cache_form` sampled, with `run.seed`; a token that is drawn again is kept once,
    with a count of one byte."""
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
    server_urls: list[str] = field(default_factory=list)
    """Addresses of the servers of placement server, such as `http://node7:8000`, all with the same model. The
    key, if they want one, is in the environment variable IBDISTILL_TEACHER_API_KEY."""
    server_schema: Literal["vllm", "sglang"] = "vllm"
    """How the server is asked for log-probabilities: see `teacher/server_schemas.py`."""
    server_candidates: Literal["teacher", "student"] = "teacher"
    """Whose most probable tokens at each place of the student's own text (`on_policy.share`) the server gives
    probabilities of. student: for divergences that look where the student's mass is, such as reverse; vLLM
    needs its V2 model runner for it."""
    server_model: str = ""
    """The model's name on the server; empty: `teacher.model`."""
    server_requests: AtLeastOne = 16
    """Requests under way at the same time."""
    server_timeout: Positive = 300.0
    """Seconds without a byte of its answer after which a request is given up and made again."""
    server_wait: Positive = 900.0
    """Seconds for which a request is made again and again, with pauses, before the run ends with exit code
    6."""

    @property
    def served_model(self) -> str:
        """The model's name on the server."""
        return self.server_model or self.model
