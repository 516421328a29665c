"""The student of a run and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig, ObjectiveConfig, StudentConfig
from ibdistill.data import chat_start, loading, reasoning, tokenizers
from ibdistill.data.tokenizers import load_tokenizer
from ibdistill.models import presets
from ibdistill.models.student import check_context, check_packing, load_student
from ibdistill.objectives import distillation, weights
from ibdistill.runtime import distributed
from ibdistill.training import run_folder


def build_student(
    config: StudentConfig,
    data: DataConfig,
    objective: ObjectiveConfig,
    records: loading.Loaded,
    folder: Path,
    seed: int,
    teacher: str = "",
) -> tuple[PreTrainedTokenizerBase, nn.Module]:
    """The tokenizer and the model, whole and in fp32 on the CPU, checked against data and objective.

    A tokenizer that is trained here goes to `folder`. In format chat its end token becomes that of a turn,
    and it is compared with that of the model `teacher`. Collective.
    """
    streams = weights.tokenized_streams(objective)
    tokenizer = _tokenizer(config, data, streams, records, folder)
    if data.format == "chat":
        own = "" if teacher in presets.PRESETS else teacher
        chat_start.settle(tokenizer, data, streams, own, records.train[0])
    student = load_student(config, tokenizer, seed)
    check_packing(student, data)
    check_context(student, data, streams, chat_start.overhead(tokenizer, data, streams))
    distillation.check_family(objective, student)
    return tokenizer, student


def _tokenizer(
    config: StudentConfig, data: DataConfig, streams: Sequence[str], records: loading.Loaded, folder: Path
) -> PreTrainedTokenizerBase:
    """The student's tokenizer. If it is trained here, rank 0 does so, once. Collective."""
    name = config.tokenizer
    if name == "train":
        target = folder / "tokenizer"

        # only rank 0 looks whether it is there, since a late rank may find what rank 0 has just written
        def make() -> None:
            if target.is_dir() and run_folder.has_begun(folder):
                return  # before that it may be of other settings, or half written
            texts = [text for r in records.train for text in (r.question, r.label, r.rationale) if text]
            around = [loading.TASKS[task].prefixes[stream] for task in records.test for stream in streams]
            around += [reasoning.marker_of(task, data) for task in records.test if "reason" in streams]
            tokenizers.train_tokenizer(texts + around, config.vocab_size, target)

        distributed.run_on_rank_0(make)
        return load_tokenizer(str(target), "student.tokenizer")
    if name:
        return load_tokenizer(name, "student.tokenizer")
    if config.model in presets.PRESETS:
        if not config.model.startswith("demo-"):
            raise ValueError(
                f"student.model is the preset {config.model!r}, which has no tokenizer of its own; "
                "set student.tokenizer to train, a hub name or a folder"
            )
        return tokenizers.demo_tokenizer()
    return load_tokenizer(config.model, "student.model")
