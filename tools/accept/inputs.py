"""What the checks train on: folders of models with random weights, and generated records."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from accept.lines import Context
from ibdistill.config.load import load_settings
from ibdistill.config.sections import Config
from ibdistill.data import tokenizers
from ibdistill.data.tasks import demo
from ibdistill.planning.published_shapes import PUBLISHED

SHAPES = {
    "t5": "google/t5-v1_1-base",
    "t5-teacher": "google/t5-v1_1-base",
    "qwen2": "Qwen/Qwen2.5-0.5B",
    "qwen2-teacher": "Qwen/Qwen2.5-0.5B",
    "qwen2-large": "Qwen/Qwen2.5-7B",
}
_SMALL_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
_SMALL_QWEN2 = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
RECORDS = 1600


def configuration(context: Context, name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a model of `SHAPES`, with its tokenizer's special tokens; small in a dry run."""
    words = tokenizer(name)
    shape = dict(PUBLISHED[SHAPES[name]])
    if context.small:
        shape |= {"vocab_size": len(words)} | (_SMALL_T5 if name.startswith("t5") else _SMALL_QWEN2)
    special = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    if name.startswith("t5"):
        special |= {"decoder_start_token_id": words.pad_token_id, "dropout_rate": 0.0}
    return AutoConfig.for_model(**shape | special | overrides)


def model_folder(context: Context, name: str) -> Path:
    """A folder with a model of `SHAPES`, random bf16 weights, and its tokenizer; made at the first call."""
    folder = context.out / "work" / "models" / name
    if (folder / "tokenizer_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    kind = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
    torch.manual_seed(len(name))
    with torch.device(context.device):  # a GPU draws the weights of 7B in seconds
        model = kind.from_config(configuration(context, name), dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)  # last: it tells that the folder is whole
    return folder


@cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of `SHAPES`: the demo's for T5, and byte-level BPE of its words for Qwen2,
    since the loader makes Qwen2's folders byte-level whatever they hold."""
    if name.startswith("t5"):
        return tokenizers.demo_tokenizer()
    core = Tokenizer(BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" ".join(demo.vocabulary())] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def records_folder(context: Context) -> Path:
    """Records for the task jsonl, with the lengths of GSM8K's questions and rationales, in the demo's words.

    The logarithm of a question's length has mean 4.12 and deviation 0.35, that of a rationale's 4.07 and 0.5
    (`tools/bench/train.py` says where these are from).
    """
    folder = context.folder("records")
    if (folder / "test.jsonl").exists():
        return folder
    rng = np.random.default_rng(0)
    words = np.array(sorted(word for word in demo.vocabulary() if word.isalpha()))
    labels = [word for word in demo.vocabulary() if word.isalpha()][:9]
    scale = 0.2 if context.small else 1.0

    def text(mean: float, deviation: float) -> str:
        count = int(np.clip(scale * np.exp(rng.normal(mean, deviation)), 3, 250))
        return " ".join(rng.choice(words, count))

    for split, number in (("train", 160 if context.small else RECORDS), ("test", 45)):
        rows = [
            {"question": text(4.12, 0.35), "rationale": text(4.07, 0.5), "label": str(rng.choice(labels))}
            for _ in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(context: Context, run: str, student: str, **overrides: Any) -> Config:
    """The settings of a run of a student of `SHAPES` on the records, without figures and export."""
    flat = {
        "run.dir": str(context.folder("runs") / run),
        "run.report_to": [],
        "run.export": False,
        "run.log_every": 10,
        "run.test_limit": 8,
        "data.task": "jsonl",
        "data.path": str(records_folder(context)),
        "data.max_rationale_tokens": 256,
        "student.model": str(model_folder(context, student)),
        "student.precision": "fp32" if context.small else "bf16",
        "objective.method": "dss",
        "optim.batch_size": 8 if context.small else 64,
        "optim.lr": 1e-3 if context.small else 1e-4,
        "optim.max_steps": 1000,
    }
    return load_settings(None, flat | {name.replace("__", "."): value for name, value in overrides.items()})


def with_teacher(
    context: Context, teacher: str, placement: str, method: str = "ib+kd", **more: Any
) -> dict[str, Any]:
    """The overrides of `settings` for a teacher of `SHAPES`."""
    teacher = model_folder(context, teacher)
    values = {"teacher__model": str(teacher), "teacher__placement": placement, "objective__method": method}
    return values | {"teacher__precision": "fp32" if context.small else "bf16"} | more
