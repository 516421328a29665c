"""A teacher behind a server (`teacher.placement` server) scores the training records before the first step,
and the student's own text after each sampling.

Its answers go into `teacher.cache` in the form top k, from which training reads them. Rank 0 talks to the
server, so nothing depends on the number of ranks. A run that is started again asks only about what is
missing, and with a complete cache about nothing.

A server is probed first: a known text has to come back as the token ids that the teacher's own tokenizer
makes of it, with log-probabilities that can be true. Where `teacher.model` is a folder with weights of at
most `PROBE_BYTES`, the probabilities are compared with those of these weights too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import Config, TeacherConfig
from ibdistill.config.teacher_consistency import needs_answers
from ibdistill.data import batches
from ibdistill.data.features import Features
from ibdistill.data.records import SEGMENTS
from ibdistill.models import families, presets
from ibdistill.models.architectures import ENCODER_DECODER, family
from ibdistill.models.whole_model import WholeModel
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import StopRequest
from ibdistill.teacher import answer_tensors, server_candidates, server_schemas
from ibdistill.teacher.answer_tensors import NO_HEAD
from ibdistill.teacher.cache import FINGERPRINT, AnswerCache
from ibdistill.teacher.cache_shard import Entry, record_key
from ibdistill.teacher.endpoints import Endpoints
from ibdistill.teacher.server_schemas import SCHEMAS, Scored
from ibdistill.teacher.vocabulary import PROBE, check_vocabulary, own_tokenizer

logger = logging.getLogger("ibdistill")

PROBE_BYTES = 4 << 30
"""Larger weights are not loaded for a probe, which has to be done within seconds."""
PROBE_DISTANCE = 0.05
"""Half the summed difference of probabilities, averaged over the probe's places, up to which a server agrees
with the weights at hand. Weights in bf16 move it by some 0.01; those of another model by more than 0.3."""
_ROUND = 1024
"""Records after which all ranks look whether a signal asks the run to stop, and the cache is written out."""
_TELL_SECONDS = 30.0


def check(config: Config, *, scores: bool = True) -> None:
    """Refuse a server that cannot be reached or disagrees, before anything expensive starts.

    Nothing is asked where a cache is there already, since it may be complete; `fill` asks for the rest.
    `scores`: whether this program will want the teacher's distributions. Raises ValueError.
    """
    teacher = config.teacher
    if teacher.placement != "server":
        return
    scores = scores and bool(needs_answers(config.objective))
    scores = scores and not (Path(teacher.cache) / FINGERPRINT).exists()
    writes = teacher.rationales != "none" and not (config.rationale_folder() / FINGERPRINT).exists()
    if scores or writes:
        endpoints = Endpoints(teacher)
        endpoints.check()
        if scores:
            probe(teacher, endpoints, own_tokenizer(teacher.model))


def probe(config: TeacherConfig, endpoints: Endpoints, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every address says about a known text what the teacher must say."""
    if config.model in presets.PRESETS:
        raise ValueError(
            f"teacher.model is the preset {config.model!r}, which no server has; give the folder or hub name "
            "of the served model, for its tokenizer"
        )
    model = families.load_config(config.model, "teacher.model")
    if family(model) == ENCODER_DECODER:
        raise ValueError(
            f"teacher.model is {config.model!r}, an encoder-decoder model, and servers score decoder-only "
            "models alone; take another teacher.placement"
        )
    ids = tokenizer(PROBE).input_ids
    expected = _local_probabilities(config, tokenizer, ids)
    for url in endpoints.urls:
        score(config, endpoints, PROBE, ids, model.vocab_size, url)  # by its own tokenizer
        scored = score(config, endpoints, ids, ids, model.vocab_size, url)
        if config.server_candidates == "student":
            given = server_candidates.ask(config, endpoints, ids, 0, scored.ids, url)
            distance = np.abs(np.exp(given) - np.exp(scored.logprobs)).sum(1).mean() / 2
            if distance > PROBE_DISTANCE:
                raise ValueError(
                    f"the teacher's server {url} contradicts itself: where candidates are asked for by their "
                    f"ids, probabilities of a known text differ by {distance:.3f}, and {PROBE_DISTANCE} is "
                    "allowed; set teacher.server_candidates teacher"
                )
        if expected is None:
            continue
        said = torch.from_numpy(np.exp(scored.logprobs))
        distance = (expected.gather(1, torch.from_numpy(scored.ids)) - said).abs().sum(1).mean().item() / 2
        if distance > PROBE_DISTANCE:
            raise ValueError(
                f"the teacher's server {url} disagrees with the weights in {config.model}: probabilities "
                f"of a known text differ by {distance:.3f}, and {PROBE_DISTANCE} is allowed (half the summed "
                "difference, averaged over its tokens); serve the model that teacher.model names"
            )
        logger.info("teacher's server %s agrees with the weights at hand up to %.4f", url, distance)


def score(
    config: TeacherConfig,
    endpoints: Endpoints,
    prompt: str | Sequence[int],
    ids: Sequence[int],
    rows: int,
    url: str = "",
    k: int = 0,
) -> Scored:
    """What the server says about a prompt whose token ids are `ids`, over a vocabulary of `rows`.

    `url`: this address alone, in a single try. `k`: candidates; 0: `teacher.cache_top_k`. Raises as
    `Endpoints.post` does.
    """
    schema, k = SCHEMAS[config.server_schema], k or config.cache_top_k
    body = schema.request(config.served_model, prompt, min(k, rows))
    return endpoints.post(
        schema.route, body, lambda answer: server_schemas.read(schema, answer, ids, k, rows), url
    )


def fill(
    config: TeacherConfig,
    wanted: Wanted,
    tokenizer: PreTrainedTokenizerBase,
    features: Features,
    streams: Sequence[str],
    head_rows: int,
    stop: StopRequest,
    *,
    probes: bool = True,
    writer: WholeModel | None = None,
) -> None:
    """Let the server score all of `features` that is not in `teacher.cache` yet. Collective.

    Where the objective learns from tokens that the student drew (`Wanted.own`), only these are scored, and an
    entry has each token's own probability in the place of the most probable ones.

    Args:
        tokenizer: the student's, which must be the teacher's too.
        streams: those whose targets are scored.
        head_rows: number of rows of the student's head.
        probes: whether the server is probed first; it has been otherwise.
        writer: the student, whose most probable tokens are asked about; None: the teacher's own are.

    Raises ValueError as `AnswerCache`, `probe` and `Endpoints.post` do, and SystemExit if a signal asked the
    run to stop. What was scored until then is in the cache.
    """
    filling = _Filling(config, wanted, tokenizer, features, streams, head_rows, stop, probes)
    missing, rows = distributed.run_on_rank_0(filling.open)
    for start in range(0, len(missing), _ROUND):
        part, given = missing[start : start + _ROUND], {}
        if writer is not None:
            given = server_candidates.of(config, writer, tokenizer, features, part, streams, rows)
        distributed.run_on_rank_0(partial(filling.round, part, given))
        if code := stop.exit_code():
            logger.warning("stopped by a signal while the teacher's server scored, exit code %d", code)
            dist.barrier()
            raise SystemExit(code)


class _Filling:
    """The way of `fill` through the records; `open` and then `round`, on rank 0 alone."""

    def __init__(
        self,
        config: TeacherConfig,
        wanted: Wanted,
        tokenizer: PreTrainedTokenizerBase,
        features: Features,
        streams: Sequence[str],
        head_rows: int,
        stop: StopRequest,
        probes: bool,
    ) -> None:
        self._config, self._wanted, self._tokenizer, self._features = config, wanted, tokenizer, features
        self._streams, self._head_rows, self._stop, self._probes = streams, head_rows, stop, probes
        self._scored = features
        if wanted.own:
            self._scored, _ = features.own_alone(range(len(features)), questions=True)
        self._done, self._tokens, self._told = 0, 0, time.monotonic()

    def open(self) -> tuple[list[int], int]:
        """Open the cache, and probe the server if it will be asked.

        The records that are missing, and how many tokens both models have a row for.
        """
        config, tokenizer = self._config, self._tokenizer
        folder = Path(config.cache)
        self._cache = AnswerCache(folder, answer_tensors.fingerprint(config, self._wanted, tokenizer), rank=0)
        keys = {record_key(self._features, i): i for i in range(len(self._features))}
        self._todo = {i: key for key, i in keys.items() if key not in self._cache}
        rows = self._head_rows
        if self._todo:
            self._endpoints = Endpoints(config)
            model = families.load_config(config.model, "teacher.model")
            rows = min(rows, model.vocab_size)
            own = check_vocabulary(config.model, tokenizer, self._head_rows, model.vocab_size)
            if self._probes:
                self._endpoints.check()
                probe(config, self._endpoints, own)
            self._layout = families.layout(model, own)
            answer_tensors.write_head(folder, 0, NO_HEAD)  # a form of top k needs none
            said = "teacher's server: %d of %d records are to be scored by %s"
            if self._probes:
                logger.info(said, len(self._todo), len(keys), ", ".join(self._endpoints.urls))
        return list(self._todo), rows

    def round(self, part: Sequence[int], given: dict[int, Entry]) -> None:
        """Score these records, and see them on disk, whatever ends the round. `given`: their candidates."""
        try:
            try:
                asking = self._endpoints.each(lambda one: self._entry(one, given.get(one)), part, self._stop)
                for index, entry in asking:
                    self._cache.put(self._todo[index], entry)
                    self._tell(entry)
            finally:
                self._cache.flush()
        except OSError as error:
            raise ValueError(str(error)) from error

    def _tell(self, entry: Entry) -> None:
        """Log how far it is, now and then."""
        self._done += 1
        self._tokens += sum(len(rows) for name, rows in entry.items() if name.endswith(".ids"))
        is_last = self._probes and self._done == len(self._todo)
        if time.monotonic() - self._told > _TELL_SECONDS or is_last:
            self._told = time.monotonic()
            message = "teacher's server: %d of %d records scored, %d target tokens"
            logger.info(message, self._done, len(self._todo), self._tokens)

    def _entry(self, index: int, given: Entry | None) -> Entry:
        """One record's entry of the cache, in the form of `answer_tensors.pack`; `given`: its candidates."""
        batch = batches.collate(self._scored, [index], self._streams, **self._layout)
        entry: Entry = {}
        k = 1 if self._wanted.own else min(self._config.cache_top_k, self._head_rows)
        for number, stream in enumerate(batch.streams):
            labels = torch.cat([batch.labels[segment] for segment in SEGMENTS[stream]])
            row = batch.input_ids[number][batch.attention_mask[number] == 1]
            ids, logprobs = np.zeros((0, k), dtype=np.int64), np.zeros((0, k))
            if len(labels):
                # the last target is not read in training; here its probability is asked for
                tokens = [*row.tolist(), int(labels[-1])]
                try:
                    if given is None:
                        found = score(self._config, self._endpoints, tokens, tokens, self._head_rows, k=k)
                        ids, logprobs = found.ids, found.logprobs
                    else:
                        at = {s: batch.positions[s].numpy() for s in SEGMENTS[stream]}
                        ids, logprobs = server_candidates.score(
                            self._config, self._endpoints, tokens, at, given
                        )
                except distributed.Unreachable:
                    raise
                except ValueError as error:
                    raise ValueError(f"record {self._features.ids[index]}: {error}") from None
                if self._wanted.own:
                    ids, logprobs = np.array(tokens[1:])[:, None], found.own[:, None]
            for segment in SEGMENTS[stream]:
                at = batch.positions[segment].numpy()
                entry[f"{segment}.ids"] = torch.from_numpy(ids[at]).int()
                probabilities = torch.from_numpy(np.exp(logprobs[at]))
                # that of the student's token may be too small for 16 bits, and its logarithm is what counts
                exact = self._wanted.own or self._config.server_candidates == "student"
                entry[f"{segment}.probabilities"] = probabilities.float() if exact else probabilities.half()
        return entry


def _local_probabilities(
    config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> torch.Tensor | None:
    """[n - 1, V] fp64, by the weights in the folder `teacher.model`; None: there are none, or too many."""
    folder = Path(config.model)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
    if not files or sum(path.stat().st_size for path in files) > PROBE_BYTES:
        logger.info("teacher's server: its probabilities are not compared with weights at hand")
        return None
    model = families.load_model(config.model, tokenizer, setting="teacher.model").eval()
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0, :-1]
    return torch.softmax(logits.double(), -1)
