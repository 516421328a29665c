"""On-policy text: the student samples rationales, the teacher scores them, and the student learns from that.

Before the steps that `OnPolicyConfig.every` names, all ranks sample a text for each question that will need
one until the next sampling (`data/sampler.py`, `OnPolicySampler`). With `every` of one epoch or more that is
the offline form, in which the teacher's answers are kept in `teacher.cache` where there is one; with less it
is the online form, down to a sampling before every step. A step's micro-batches share what was sampled.

The text takes the place of the rationale in the explain stream, or of rationale and answer in the reason
stream. It has no cross entropy: the divergence from the teacher is all that it teaches (GKD, Agarwal et al.,
ICLR 2024, arXiv 2306.13649). Any `objective.divergence` goes with it; k1, k2 and k3 need it.

Why decode with a copy of the weights that every rank holds (`models.whole_model`), as evaluations do, and not
through the engine: ZeRO-3's prefetch trace then sees training steps alone.

    RUN/on_policy/step-STEP-DIGEST.jsonl    the text, written before training goes on (`step_files`)
    RUN/on_policy/step-STEP-DIGEST.part     the blocks of a sampling under way; the digest is that of weights
                                            and settings
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ibdistill.config.sections import Config
from ibdistill.data import id_rows
from ibdistill.models import decoding, families
from ibdistill.models.decoding import Sampling
from ibdistill.objectives.weights import streams_of
from ibdistill.runtime import distributed, files
from ibdistill.training import step_files
from ibdistill.training.job import Job

logger = logging.getLogger("ibdistill")

FOLDER = "on_policy"
BATCHES = 4
"""A block is so many batches of `run.eval_batch_size` of every rank."""


class Stopped(Exception):
    """A signal asked the run to stop between two blocks; the argument is the exit code."""


class Text(NamedTuple):
    """One sampled text."""

    record: int
    """The record's index in the training records."""
    id: str
    """The record's name."""
    ids: list[int]
    """The tokens, with the end token if it was reached."""
    text: str
    finished: bool
    """Whether it ended by itself, and is not empty."""


def interval(config: Config, steps_per_epoch: int) -> int:
    """Steps between two samplings; 0: there are none."""
    settings = config.on_policy
    return max(1, round(settings.every * steps_per_epoch)) if settings.share else 0


def is_due(job: Job) -> bool:
    """Whether text is sampled before the next step."""
    steps = interval(job.config, job.sampler.steps_per_epoch)
    first = round(job.config.on_policy.start * job.config.optim.max_steps)
    return steps > 0 and job.state.step >= first and (job.state.step - first) % steps == 0


def refresh(job: Job) -> dict[str, float]:
    """Sample the text of the coming steps and let them learn from it; what it was like, by TensorBoard tag.

    If it cannot be written, these steps learn from the data's text. Raises Stopped. Collective.
    """
    start, step = time.perf_counter(), job.state.step
    indices, texts = job.sampler.to_sample(window(job, step)), []
    try:
        with job.whole() as model:
            texts = sample_all(job, model, indices)
        job.state.own_text = distributed.run_on_rank_0(partial(_write, job, texts))
        use(job, texts, step)
    except OSError as error:
        job.state.own_text = ""
        logger.error("the student's own text cannot be kept, so the data's is learned: %s", error)
    unfinished = sum(not text.finished for text in texts)
    job.state.sampled += len(texts)
    job.state.unfinished += unfinished
    return {
        "on_policy/texts": len(texts),
        "on_policy/unfinished_share": unfinished / max(1, len(texts)),
        "on_policy/tokens": sum(len(text.ids) for text in texts) / max(1, len(texts)),
        "on_policy/seconds": time.perf_counter() - start,
    }


def restore(job: Job) -> None:
    """Learn from the text that the restored checkpoint names. Raises ValueError as `step_files.read` does."""
    name = job.state.own_text
    if name and not is_due(job):
        texts = [Text(**values) for values in step_files.read(job.folder / FOLDER / name)]
        use(job, texts, step_files.step_of(name))


def window(job: Job, step: int) -> range:
    """The steps that learn from what is sampled before `step`."""
    end = step + interval(job.config, job.sampler.steps_per_epoch)
    return range(step, min(end, job.config.optim.max_steps))


def use(job: Job, texts: Sequence[Text], step: int) -> None:
    """Let the steps after `step` learn from the texts, until the next sampling."""
    settings = job.config.on_policy
    kept = [text for text in texts if text.finished or settings.unfinished == "keep"]
    indices = np.array([text.record for text in kept], dtype=int)
    own = job.gold.with_own_text(indices, [text.ids for text in kept])
    job.sampler.use(own, indices, window(job, step), job.gold)
    # text that lasts for more than an epoch is read again
    keeps = interval(job.config, job.sampler.steps_per_epoch) > job.sampler.steps_per_epoch
    job.learn_from(job.gold + own, keeps=keeps)


def _write(job: Job, texts: Sequence[Text]) -> str:
    """Write a round of texts, and remove its blocks; the file's name. Raises OSError. On rank 0."""
    folder = job.folder / FOLDER
    name = step_files.write(folder, job.state.step, [text._asdict() for text in texts])
    for path in folder.glob("*.part"):
        path.unlink()
    return name


def sample_all(job: Job, model: nn.Module, indices: Sequence[int]) -> list[Text]:
    """`sample` in blocks, of which the folder keeps each, so that an interrupted run goes on behind the last.

    Questions of similar length are in one block. Raises OSError, and Stopped between two blocks. Collective.
    """
    size = BATCHES * job.config.run.eval_batch_size * job.world.size
    if len(indices) <= size:
        return sample(job, model, indices)
    lengths = job.gold.questions[streams_of(job.config.objective)[-1]].lengths
    order = sorted(map(int, indices), key=lambda i: (-lengths[i], i))
    path, rows = distributed.run_on_rank_0(lambda: _there(job, model))
    found = {text.record: text for text in (Text(**row) for row in rows)}
    if found:
        logger.info("on-policy text: %d of %d are there from before", len(found), len(order))
    for start in range(0, len(order), size):
        block = order[start : start + size]
        if found.keys() >= set(block):
            continue
        texts = sample(job, model, block)
        found |= {text.record: text for text in texts}
        logger.info("on-policy text: %d of %d", len(found), len(order))
        if start + size < len(order):
            rows = [text._asdict() for text in texts]
            distributed.run_on_rank_0(partial(step_files.append, path, rows))
            if code := job.stop.exit_code():
                raise Stopped(code)
    return sorted(found.values())


def _there(job: Job, model: nn.Module) -> tuple[Path, list[dict]]:
    """The file of this round's blocks, and the rows that it holds. Raises OSError. On rank 0."""
    weights = 0
    for parameter in model.parameters():
        weights = zlib.crc32(parameter.detach().flatten().cpu().view(torch.uint8).numpy(), weights)
    made_with = files.digest(f"{weights} {job.config.on_policy} {job.config.run.seed}".encode()).hex()
    path = job.folder / FOLDER / f"step-{job.state.step:08d}-{made_with}.part"
    return path, step_files.pieces(path)


def sample(job: Job, model: nn.Module, indices: Sequence[int]) -> list[Text]:
    """A text for each record with one of these indices. Collective; every rank gets all of them.

    A text depends on the weights, the seed, the step and the record, and not on the batch or on the number of
    ranks, apart from rounding. `model` is whole on every rank, so the shares of the ranks may be uneven.
    """
    config, world = job.config, job.world
    settings, stream = config.on_policy, streams_of(config.objective)[-1]
    limit = settings.max_tokens or config.data.answer_limits()[stream]
    mine = list(indices)[world.rank :: world.size]
    keys = [f"{config.run.seed} {job.state.step} {job.gold.ids[i]} {stream} own" for i in mine]
    prompts = [job.gold.questions[stream][i] for i in mine]
    if not job.gold.whole_prompts:
        layout = families.layout(model, job.tokenizer)
        prompts = [id_rows.asked(question, **layout) for question in prompts]
    answers = decoding.decode(
        model,
        job.tokenizer,
        prompts,
        max_question_tokens=config.data.max_question_tokens,
        max_new_tokens=limit,
        device=world.device,
        batch_size=config.run.eval_batch_size,
        sampling=Sampling(settings.temperature, decoding.draws(keys, limit), settings.top_p),
    )
    found = []
    for index, answer in zip(mine, answers, strict=True):
        ended = answer.ids[-1:] == (job.tokenizer.eos_token_id,)
        finished = ended and bool(answer.text.strip())
        found.append(Text(int(index), job.gold.ids[index], list(answer.ids), answer.text, finished))
    shares = distributed.gather_objects(found)
    return sorted(text for share in shares for text in share)
