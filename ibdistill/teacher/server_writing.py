"""A teacher behind a server writes rationales and labels through `/v1/chat/completions`.

It may be known by its text alone: neither its weights nor its tokenizer are needed. Every question is one
message of the user's, made from `teacher.template`, and rank 0 asks. A text is kept as soon as it is there
(`texts`), and the tokens that the server counts are logged and kept beside it, in
`rank-R-RANDOM.usage.json`.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ibdistill.config.sections import Config
from ibdistill.data.records import Record
from ibdistill.runtime import distributed, files
from ibdistill.runtime.distributed import StopRequest
from ibdistill.teacher.endpoints import Endpoints
from ibdistill.teacher.generation import ENOUGH, check_unparsed, keep
from ibdistill.teacher.texts import FORMAT, Texts, parse

logger = logging.getLogger("ibdistill")

ROUTE = "/v1/chat/completions"
_USAGE = ("prompt_tokens", "completion_tokens")


class ServerWriter:
    """Asks the server for the teacher's texts; as `generation.Writer`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
        self._path = folder / f"rank-00000-{uuid.uuid4().hex[:12]}.jsonl"
        self._used: Counter[str] = Counter()

    def write_all(self, todo: list[tuple[Record, str, Texts]], stop: StopRequest) -> dict[str, Texts]:
        """Ask about every (record, key, prompts) of the list, and return key -> texts. Collective.

        Raises ValueError if the texts cannot be written, too many cannot be parsed or the server refuses,
        Unreachable if it is down for too long, and SystemExit if a signal asked the run to stop.
        """
        self._endpoints = Endpoints(self._config.teacher)
        size = max(ENOUGH, 4 * self._config.teacher.server_requests)
        written: dict[str, Texts] = {}
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            written |= distributed.run_on_rank_0(partial(self._round, part, stop))
            asked = [(record, written[key]) for record, key, _ in todo if key in written]
            unparsed = [(record, texts) for record, texts in asked if parse(texts, record) is None]
            logger.info("teacher's text: %d of %d, %d unparsable", len(asked), len(todo), len(unparsed))
            if len(asked) >= ENOUGH:
                check_unparsed(self._config, len(asked), unparsed)
            if code := stop.exit_code():
                logger.warning("stopped by a signal after %d records, exit code %d", len(asked), code)
                dist.barrier()
                sys.exit(code)
        return written

    def _round(self, part: list[tuple[Record, str, Texts]], stop: StopRequest) -> dict[str, Texts]:
        """The texts about some records, each kept at once, and the tokens that they took."""
        found: dict[str, Texts] = {}
        try:
            for (record, key, _), (text, used) in self._endpoints.each(self._ask, part, stop):
                self._used.update(used)
                found[key] = {"answer": text}
                if failure := keep(self._path, [(record, key, found[key])]):
                    raise ValueError(failure)
        finally:
            if found:
                with suppress(OSError):  # a report, which ends no run
                    files.write_json(self._path.with_suffix(".usage.json"), dict(self._used))
                counts = ", ".join(f"{self._used[name]} {name}" for name in ("requests", *_USAGE))
                logger.info("teacher's text cost %s", counts)
        return found

    def _ask(self, item: tuple[Record, str, Texts]) -> tuple[str, dict[str, int]]:
        """What the server writes about one (record, key, prompts), and what it counts."""
        _, key, prompts = item
        config, data = self._config, self._config.data
        body = {
            "model": config.teacher.served_model,
            "messages": [{"role": "user", "content": prompts["answer"]}],
            "temperature": config.teacher.temperature,
            "max_tokens": data.max_label_tokens + data.max_rationale_tokens,
            # each question has a seed of its own, which does not depend on the order of the requests
            "seed": int.from_bytes(files.digest(f"{config.run.seed} {key}".encode(), 4), "little") >> 1,
        }
        return self._endpoints.post(ROUTE, body, self._read)

    def _read(self, answer: Any) -> tuple[str, dict[str, int]]:
        try:
            text = answer["choices"][0]["message"]["content"]
            usage = {name: int((answer.get("usage") or {}).get(name, 0)) for name in _USAGE}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"its answer has not the form of {ROUTE} ({type(error).__name__} {str(error)[:100]})"
            ) from error
        # a model that was cut off while it still thought has written nothing
        text = text.encode(errors="replace").decode() if isinstance(text, str) else ""
        return text, usage | {"requests": 1}


def fingerprint(config: Config, template: str) -> dict[str, Any]:
    """Everything that a text depends on besides its prompt, as far as this side knows it."""
    data, teacher = config.data, config.teacher
    return {
        "format": FORMAT,
        "teacher": f"{teacher.served_model} on a server",
        "template": template,
        "temperature": teacher.temperature,
        "max_tokens": data.max_label_tokens + data.max_rationale_tokens,
        "seed": config.run.seed,
    }
