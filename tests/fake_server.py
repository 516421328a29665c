"""A server of one model over real HTTP, which answers as vLLM and SGLang do, and fails as told.

`python tests/fake_server.py FOLDER` serves a model until it is killed, and prints its address."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Fault = Callable[[str, int], str]
"""(route, number of the request) -> what goes wrong with it, empty: nothing."""


class FakeServer(ThreadingHTTPServer):
    """Serves the model of a folder under a name. `asked` counts requests by route; `chat` writes texts, else
    the model does."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, folder: str, *, name: str = "", key: str = "", chat: Callable[[str], str] | None = None
    ):
        self.folder, self.name, self.key, self.chat = folder, name or folder, key, chat
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.fault: Fault = lambda route, number: ""
        self.asked: dict[str, int] = {}
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is no news."""

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[n - 1, V] of every token but the first."""
        with self.lock, torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)

    def places(self, prompt: str | list[int], k: int) -> tuple[list[int], list[float], list[list[tuple]]]:
        """Token ids; and of every token but the first its log-probability, and the k best (id, logprob)."""
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        logprobs = self.logprobs(ids)
        best = logprobs.topk(k)
        own = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
        pairs = [
            list(zip(*row, strict=True))
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return ids, own, pairs

    def write(self, body: dict[str, Any]) -> dict[str, Any]:
        """An answer of a chat."""
        (message,) = body["messages"]
        if self.chat:
            text, used = self.chat(message["content"]), (len(message["content"]), 7)
        else:
            prompt = self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with self.lock:
                torch.manual_seed(body["seed"])
                sampling = (
                    {"do_sample": True, "temperature": body["temperature"]} if body["temperature"] else {}
                )
                output = self.model.generate(
                    **prompt, max_new_tokens=body["max_tokens"], **(sampling or {"do_sample": False})
                )
            new = output[0, prompt["input_ids"].shape[1] :]
            text, used = (
                self.tokenizer.decode(new, skip_special_tokens=True),
                (output.shape[1] - len(new), len(new)),
            )
        usage = dict(zip(("prompt_tokens", "completion_tokens"), used, strict=True))
        return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_) -> None: ...

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        with self.server.lock:
            number = self.server.asked[self.path] = self.server.asked.get(self.path, 0) + 1
            self.server.bodies.append(body)
        fault = self.server.fault(self.path, number)
        given = self.headers.get("Authorization", "")
        if self.server.key and given != f"Bearer {self.server.key}":
            return self._send(401, {"error": f"no such key: {given}"})
        if fault.isdigit():
            return self._send(int(fault), {"error": f"as told, {given}"})
        if fault == "slow":
            time.sleep(1.5)
        routes = {"/v1/models": self._models, "/v1/completions": self._vllm, "/generate": self._sglang}
        routes["/inference/v1/generate"] = self._vllm_given
        routes["/v1/chat/completions"] = lambda body, fault: self.server.write(body)
        if self.path not in routes:
            return self._send(404, {"error": "no such route"})
        self._send(200, routes[self.path](body, fault), cut=fault == "cut")

    def _send(self, code: int, answer: dict[str, Any], cut: bool = False) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        if code == 429:
            self.send_header("Retry-After", "0.1")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True

    def _models(self, body, fault) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.server.name}]}

    def _scored(self, prompt, k: int, fault: str):
        ids, own, places = self.server.places(prompt, k - (fault == "few"))
        if fault == "nan":
            places[3][2] = (places[3][2][0], float("nan"))
        if fault == "mass":
            places[3] = [(token, -0.1) for token, _ in places[3]]
        if fault == "own":
            own[3] = -0.001
        return ids, own, places

    def _vllm(self, body, fault) -> dict[str, Any]:
        ids, own, places = self._scored(body["prompt"], body["prompt_logprobs"], fault)
        said: list[dict[str, Any] | None] = [None]
        for token, logprob, place in zip(ids[1:], own, places, strict=True):
            found = {token: logprob} | dict(place)  # its own token comes first, whatever its rank
            if fault == "own":
                found[token] = logprob
            said.append({str(t): {"logprob": p, "decoded_token": ""} for t, p in found.items()})
        return {"choices": [{"text": "", "prompt_logprobs": said}]}

    def _sglang(self, body, fault) -> dict[str, Any]:
        prompt = body["text"] if "text" in body else body["input_ids"]
        if "token_ids_logprob" in body:
            return self._sglang_given(body, fault)
        ids, own, places = self._scored(prompt, body["top_logprobs_num"], fault)
        tokens = [[logprob, token, None] for token, logprob in zip(ids, [None, *own], strict=True)]
        top = [None, *([[p, t, None] for t, p in place] for place in places)]
        return {"text": "", "meta_info": {"input_token_logprobs": tokens, "input_top_logprobs": top}}

    def _given(self, ids: list[int], start: int, rows: np.ndarray, fault: str) -> np.ndarray:
        """The log-probabilities of the tokens `rows` [n - 1 - start, k]; -1: -inf."""
        scores = self.server.logprobs(ids)[start:].gather(1, torch.from_numpy(rows).clamp(min=0)).numpy()
        scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
        if fault == "given nan":
            scores[-1] = np.nan
        if fault == "given other":
            scores -= 1
        if fault == "given mass":
            scores[-1] = -0.1
        return scores[:-1] if fault == "given few" else scores

    def _vllm_given(self, body, fault) -> dict[str, Any]:
        """Token ids for each place, and a matrix as the text of a .npy file."""
        asked = body["sampling_params"]
        ids, start = body["token_ids"], asked["prompt_logprob_start"]
        rows = np.array(asked["prompt_logprob_token_ids"])
        if len(rows) != len(ids) - 1 - start:
            return {"error": "another number of rows"}
        file = io.BytesIO()
        np.save(file, self._given(ids, start, rows, fault))
        text = base64.b64encode(file.getvalue()).decode()
        said = {"given none": None, "given form": text[:40]}.get(fault, text)
        return {"choices": [], "prompt_token_id_logprobs": said}

    def _sglang_given(self, body, fault) -> dict[str, Any]:
        """One list of token ids for all places, whose first is empty."""
        ids, start, union = body["input_ids"], body["logprob_start_len"], body["token_ids_logprob"]
        rows = np.tile(np.array(union), (len(ids) - 1 - start, 1))
        scores = self._given(ids, start, rows, fault)
        named = [token + (fault == "given ids") for token in union]
        places = [[[p, t, None] for p, t in zip(row, named, strict=True)] for row in scores.tolist()]
        own = [None, *self.server.logprobs(ids)[range(start, len(ids) - 1), ids[start + 1 :]].tolist()]
        tokens = [[p, t, None] for p, t in zip(own, ids[start:], strict=True)]
        given = None if fault == "given form" else [None, *places]
        return {"meta_info": {"input_token_logprobs": tokens, "input_token_ids_logprobs": given}}


@contextmanager
def serving(folder: str, **settings) -> Iterator[FakeServer]:
    """A server in threads of this process."""
    server = FakeServer(folder, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    with serving(sys.argv[1]) as running:
        print(running.url, flush=True)
        while True:
            time.sleep(1)
