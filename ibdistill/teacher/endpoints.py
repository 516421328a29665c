"""Requests to a teacher behind a server: several addresses, bounded concurrency, retries, and what ends them.

What may pass by itself is tried again with growing pauses, at the next address, for up to
`teacher.server_wait` seconds: no connection, a cut one, no answer in time, HTTP 408, 429 and 5xx. A server's
`Retry-After` is honoured. Everything else is refused at once.

The key comes from the environment alone. It goes into the header `Authorization` and nowhere else: it is
masked in what a server says, and redirects, which could carry it to another host, are not followed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from ibdistill.config.sections import TeacherConfig
from ibdistill.runtime.distributed import StopRequest, Unreachable

logger = logging.getLogger("ibdistill")
T = TypeVar("T")
R = TypeVar("R")

KEY = "IBDISTILL_TEACHER_API_KEY"
"""The environment variable with the server's key."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_QUIET_SECONDS = 10.0
"""So long after a warning of a failure others are not shown, since many requests fail together."""
_PASSING = (408, 429)


class _Passing(Exception):
    """A failure that may pass by itself, and the seconds that the server asks to wait."""

    def __init__(self, what: str, seconds: float = 0.0) -> None:
        super().__init__(what)
        self.seconds = seconds


class Endpoints:
    """The addresses of `teacher.server_urls`. For several threads."""

    def __init__(self, config: TeacherConfig) -> None:
        """Raises ValueError if the key cannot stand in a header."""
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in config.server_urls]
        self._config = config
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and (self._key.isprintable())):
            raise ValueError(f"the environment variable {KEY} has characters that no key has; set it anew")
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # else it logs every request
        self._client = httpx2.Client(
            timeout=config.server_timeout,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx2.Limits(max_connections=config.server_requests + 1),
        )
        self._next = random.randrange(len(self.urls))  # so that many jobs do not all begin with the first
        self._said = -_QUIET_SECONDS
        self._ended = threading.Event()

    def check(self) -> None:
        """Raise ValueError unless every address can be reached and, where it lists its models, has ours."""
        for url in self.urls:
            try:
                names = self._send(url, "/v1/models", None, _names)
            except _Passing as failure:
                raise ValueError(
                    f"teacher.server_urls: {failure}. Start the server, or correct the address"
                ) from None
            except LookupError:  # not every server has this route
                continue
            if self._config.served_model not in names:
                raise ValueError(
                    f"teacher.server_urls: {url} serves {', '.join(names)[:200] or 'no model'}, and not "
                    f"{self._config.served_model!r}; correct teacher.server_model (empty: teacher.model)"
                )

    def post(self, route: str, body: dict[str, Any], read: Callable[[Any], R], url: str = "") -> R:
        """What `read` makes of the answer, from the next address, or from `url` in a single try.

        `read` raises ValueError for an answer that cannot be used. Raises ValueError for what no second try
        mends, and Unreachable after `teacher.server_wait` seconds without an answer.
        """
        begin, pause, seconds = time.monotonic(), _FIRST_PAUSE, 0.0
        while True:
            if self._ended.wait(seconds):
                raise Unreachable("the run ends, so the teacher's server is not asked again")
            self._next += 1
            address = url or self.urls[self._next % len(self.urls)]
            try:
                return self._send(address, route, body, read)
            except LookupError as error:
                ways_out = "correct teacher.server_schema or teacher.server_model"
                if self._config.server_candidates == "student":  # which have a route of their own
                    ways_out += ", or set teacher.server_candidates teacher"
                raise ValueError(f"{error}; {ways_out}") from None
            except _Passing as failure:
                if url:
                    raise ValueError(f"teacher.server_urls: {failure}") from None
                seconds = max(pause * random.uniform(0.5, 1.0), failure.seconds)
                left = begin + self._config.server_wait - time.monotonic()
                if seconds > left:
                    raise Unreachable(
                        f"the teacher's server gave no answer for teacher.server_wait "
                        f"({self._config.server_wait:g}) seconds; the last failure: {failure}. What it said "
                        "before is kept: start the server, and the same command goes on from there"
                    ) from None
                self._say(f"{failure}; trying again in {seconds:.1f} s, for {left:.0f} s more at most")
            pause = min(2 * pause, _LONGEST_PAUSE)

    def each(self, do: Callable[[T], R], items: Sequence[T], stop: StopRequest) -> Iterator[tuple[T, R]]:
        """(item, do(item)) as they are done, `teacher.server_requests` at a time, until a signal asks the run
        to stop; what `do` raises ends it. Requests that are under way then are not waited for."""
        pool = ThreadPoolExecutor(self._config.server_requests)
        running = {pool.submit(do, item): item for item in items}
        try:
            while running and not stop.is_asked:
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            if running:
                self._ended.set()
            pool.shutdown(wait=not running, cancel_futures=True)

    def _send(self, url: str, route: str, body: dict[str, Any] | None, read: Callable[[Any], R]) -> R:
        """One request. Raises _Passing, LookupError (there is no such route or model) or ValueError."""
        try:
            response = self._client.request("GET" if body is None else "POST", url + route, json=body)
            said = response.text
        except httpx2.TimeoutException:
            seconds = self._config.server_timeout
            raise _Passing(f"{url} did not answer within teacher.server_timeout ({seconds:g} s)") from None
        except httpx2.TransportError as error:
            raise _Passing(f"{url} cannot be reached: {self._masked(str(error))}") from None
        code = response.status_code
        what = f"{url} answers HTTP {code} to {route}: {self._masked(said)}"
        if code in _PASSING or code >= 500:
            raise _Passing(what, _seconds(response.headers.get("Retry-After", "")))
        if code in (401, 403):
            given = "is refused" if self._key else "is not set"
            raise ValueError(f"{what}. The key in the environment variable {KEY} {given}")
        if code in (404, 405):
            raise LookupError(what)
        if code != 200:
            raise ValueError(what)
        try:
            answer = json.loads(said)
        except (ValueError, RecursionError):  # as of a connection that was cut
            raise _Passing(f"{url} answers with what is no JSON: {self._masked(said)}") from None
        try:
            return read(answer)
        except ValueError as error:
            raise ValueError(f"the teacher's server {url}: {self._masked(str(error), 1000)}") from None

    def _masked(self, text: str, longest: int = 300) -> str:
        """A text for a message: cut, and without the key."""
        return (text.replace(self._key, "***") if self._key else text)[:longest]

    def _say(self, what: str) -> None:
        if time.monotonic() - self._said >= _QUIET_SECONDS:
            self._said = time.monotonic()
            logger.warning("teacher.server_urls: %s", what)


def _names(answer: Any) -> list[str]:
    """The names of the models in an answer of `/v1/models`."""
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError):
        raise ValueError("its list of models has not the form of OpenAI's") from None


def _seconds(retry_after: str) -> float:
    """The seconds of a header `Retry-After`, a number or a date (RFC 9110, section 10.2.3); 0: none."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
