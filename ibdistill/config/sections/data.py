"""Settings of the data: which records a run learns from, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ibdistill.config.fields import AtLeastOne, AtLeastTwo, OpenShare, Positive, Seed, ShareOrCount


@dataclass(kw_only=True)
class DataConfig:
    """Which records a run learns from."""

    task: str | list[str] = "demo"
    """Name of a task in `ibdistill/data/tasks`, or several for a mixture."""
    path: str | None = None
    """Folder or file that holds the data; none: the demo's generator, or the hub by the task's name."""
    cache_dir: str = ""
    """Folder of the tables that records and token ids are read from: made once on a node, mapped into memory
    by its ranks, and used by later runs on the same data. Empty: `ibdistill` in Hugging Face's cache
    (`HF_HOME`). See `data/README.md`."""
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
