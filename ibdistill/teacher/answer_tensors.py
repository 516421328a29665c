"""A teacher's answer as the tensors that `teacher.cache` keeps, and what those tensors depend on.

    questions                states of the question's tokens [n, D_teacher]             for vid
    SEGMENT                  last hidden states at the segment's tokens [n, D_teacher]  `cache_form` states
    SEGMENT.ids              [n, k] int32, the k most probable tokens at each place     `cache_form` topk
    SEGMENT.probabilities    [n, k] float16, their probabilities                        `cache_form` topk
    SEGMENT.ids, .counts, .distinct    tokens drawn at each place, see `sampled_form`   `cache_form` sampled

Beside the entries a cache holds one more file: the teacher's head, which turns states into logits again,
and the teacher's width, so that a run whose records are all in the cache need not load the teacher.

The bytes and the loss of accuracy of the forms are in teacher/README.md. `objective.mi_pair` teacher
pools the teacher's distribution over the whole vocabulary, and therefore keeps states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import TeacherConfig
from ibdistill.data.features import Features
from ibdistill.data.records import SEGMENTS, segments_of
from ibdistill.data.tokenizers import bos_of
from ibdistill.models import families
from ibdistill.objectives.teacher_answers import TeacherAnswer, Wanted
from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss.arguments import TeacherStream
from ibdistill.ops.head_loss.softcap import capped
from ibdistill.runtime import files
from ibdistill.teacher import sampled_form
from ibdistill.teacher.cache import AnswerCache
from ibdistill.teacher.cache_shard import Entry, checksum
from ibdistill.teacher.vocabulary import fit_rows

logger = logging.getLogger("ibdistill")

Head = tuple[Tensor | None, Tensor | None, float | None]
"""A head: weight [V, D_teacher], bias [V], cap of its logits; NO_HEAD where no distributions are wanted."""

NO_HEAD: Head = (None, None, None)

_HEAD = "head.tensors"  # safetensors, under a name that the cache does not take for a shard


def pack(
    answer: TeacherAnswer,
    config: TeacherConfig,
    temperature: float,
    uniforms: Callable[[str], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors that are kept of an answer.

    `temperature` is that of the probabilities in forms topk and sampled. `uniforms`: a segment's
    `sampled_form.uniforms`.
    """
    packed = {} if answer.questions is None else {"questions": answer.questions}
    for segment, target in answer.targets.items():
        head = answer.weight, answer.bias, answer.softcap
        if config.cache_form == "states":
            packed[segment] = target.hidden
        elif config.cache_form == "sampled":
            drawn = sampled_form.draw(target.hidden, head, temperature, uniforms(segment))
            packed |= {f"{segment}.{name}": x for name, x in sampled_form.pack(drawn).items()}
        else:
            ids, probabilities = top_k(target.hidden, head, config.cache_top_k, temperature)
            packed |= {f"{segment}.ids": ids.int(), f"{segment}.probabilities": probabilities.half()}
    return packed


def unpack(packed: dict[str, Tensor], head: Head, vocabulary: int) -> TeacherAnswer:
    """The answer that `pack` has packed. `head` is read only where the kept form is states.

    `vocabulary`: rows of the student's head.
    """
    questions = packed.get("questions")
    segments = [segment for segment in segments_of(SEGMENTS) if segment in packed]
    if segments:
        return TeacherAnswer(questions, {s: TeacherStream(hidden=packed[s]) for s in segments}, *head)
    drawn = [segment for segment in segments_of(SEGMENTS) if f"{segment}.distinct" in packed]
    if drawn:  # a pair of segments has one k
        k = max(int(n.max()) if len(n := packed[f"{segment}.distinct"]) else 1 for segment in drawn)
    targets = {
        segment: sampled_form.unpack(
            *(packed[f"{segment}.{name}"] for name in ("ids", "counts", "distinct")),
            k=k,
            vocabulary=vocabulary,
        )
        for segment in drawn
    } or {
        segment: TeacherStream(
            ids=packed[f"{segment}.ids"].long(), probabilities=packed[f"{segment}.probabilities"].float()
        )
        for segment in segments_of(SEGMENTS)
        if f"{segment}.ids" in packed
    }
    return TeacherAnswer(questions, targets)


def lengths(features: Features, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """How many rows of packed tensors belong to each of these records, by content."""
    tables = {"questions": features.first_questions, **features.targets}
    return {name: table.lengths[list(indices)] for name, table in tables.items()}


def pieces(packed: dict[str, Tensor], lengths: dict[str, np.ndarray]) -> list[Entry]:
    """Each record's part of packed tensors, where these are. `lengths`: [records] rows, by content."""
    rows = {name: lengths[name.split(".")[0]] for name in packed} | sampled_form.lengths_of(packed, lengths)
    parts = {name: tensor.split(rows[name].tolist()) for name, tensor in packed.items()}
    return [dict(zip(parts, record, strict=True)) for record in zip(*parts.values(), strict=True)]


def known(cache: AnswerCache, keys: Sequence[bytes], mine: Sequence[bool]) -> list[Entry | None]:
    """The entries of the records with these keys, or None; without any rows where they are not `mine`."""
    found = [entry[0] if (entry := cache.get([key])) else None for key in keys]
    return [
        {name: tensor[:0] for name, tensor in entry.items()} if entry and not own else entry
        for entry, own in zip(found, mine, strict=True)
    ]


def join(entries: Sequence[Entry], device: torch.device) -> dict[str, Tensor]:
    """The records' entries, on the host or on the device, as one packed tensor per name on the device."""

    def joined(parts: list[Tensor]) -> Tensor:
        if all(part.device.type == "cpu" for part in parts):
            return to_device(torch.cat(parts), device)
        return torch.cat([to_device(part, device) for part in parts])

    return {name: joined([entry[name] for entry in entries]) for name in entries[0]}


def fingerprint(
    config: TeacherConfig,
    wanted: Wanted,
    tokenizer: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that a record's entry depends on besides its tokens. `theirs`: the tokenizer of a teacher of
    another vocabulary than that of the student's `tokenizer`; None: it reads the student's tokens. `seed`: of
    the form sampled."""
    holds = ["question states"] * wanted.questions + ["target states"] * wanted.targets
    found = {
        "teacher": families.identity(config.model),
        "tokenizer": _digest(tokenizer),
        "precision": "8bit" if config.load_in_8bit else config.precision,
        "holds": holds,
    }
    if config.placement == "server":  # in whichever precision it works
        found |= {"precision": "server", "served": config.served_model}
    if config.server_candidates == "student":
        found["candidates"] = "the student's, in its own text"
    # What a tokenizer puts in front of a question is in the teacher's rows, and not in an entry's key. Most
    # put nothing there, and their caches need no word of it.
    if (bos := bos_of(theirs or tokenizer)) is not None:
        found["bos"] = bos
    if wanted.pmi:
        found["target"] = "pmi"
    if wanted.own:
        found["text"] = "the student's own"
    if theirs is not None:
        found["teacher_tokenizer"] = _digest(theirs)
    if wanted.targets and config.cache_form == "topk":
        found |= {"top_k": config.cache_top_k, "temperature": wanted.temperature}
    if wanted.targets and config.cache_form == "sampled":
        found |= {"samples": config.cache_samples, "temperature": wanted.temperature, "seed": seed}
    return found


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return files.digest(repr(sorted(tokenizer.get_vocab().items())).encode()).hex()


def write_head(folder: Path, width: int, head: Head) -> None:
    """Write the teacher's width and, where there is one, its head, unless the cache has them already."""
    if read_head(folder, torch.device("cpu")) is not None:
        return
    weight, bias, softcap = head
    tensors = {"weight": weight, "bias": bias}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
    metadata = {"width": str(width), "checksum": checksum(tensors)}
    if softcap is not None:
        metadata["softcap"] = repr(float(softcap))
    files.write_atomically(folder / _HEAD, save(tensors, metadata=metadata))


def read_head(folder: Path, device: torch.device, rows: int | None = None) -> tuple[int, Head] | None:
    """What `write_head` wrote: the teacher's width, and its head on `device`, fitted to `rows`.

    None if it is not there or damaged, which is warned of: a loaded teacher writes it again.
    """
    path = folder / _HEAD
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            metadata = file.metadata()
        if metadata["checksum"] != checksum(tensors):
            raise ValueError("its checksum is another")
        width = int(metadata["width"])
        softcap = float(metadata["softcap"]) if "softcap" in metadata else None
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is damaged and is not used: %s", path, error)
        return None
    weight, bias = (tensors[name].to(device) if name in tensors else None for name in ("weight", "bias"))
    if weight is not None and rows is not None:
        weight, bias = fit_rows(weight, bias, rows)
    return width, (weight, bias, softcap)


def top_k(hidden: Tensor, head: Head, k: int, temperature: float, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of each position and their probabilities: [N, k] int64 and fp32.

    Logits exist for `chunk` positions at a time.
    """
    weight, bias, softcap = head
    found = []
    for part in hidden.split(chunk):
        logits = capped(torch.nn.functional.linear(part, weight, bias).float(), softcap)
        found.append(torch.softmax(logits / temperature, -1).topk(min(k, len(weight))))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])
