"""An OpenAI-compatible server on loopback for tests: it answers from the passages in the prompt, or misbehaves as told.

A behaviour is a function of a `Request`; it returns a `Response`. `honest` is the one that others wrap.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prima_ray.knowledge.sentences import split_text

_PASSAGE = re.compile(r"<<(P\d+) ([0-9a-f]{12})>>\nFrom: (.*)\nText: ((?s:.*?))\n<</\1 \2>>")


@dataclass
class Request:
    """What a client asked."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int
    """From 1, in the order of arrival."""
    answered: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        return self.body["messages"]

    @property
    def question(self) -> str:
        return self.messages[1]["content"]

    @property
    def attempt(self) -> int:
        said = re.match(r"Attempt (\d+) cannot be used", self.mistake)
        return int(said[1]) + 1 if said else 1

    @property
    def mistake(self) -> str:
        """What the client says about the answer before; empty at the first attempt."""
        return self.messages[3]["content"] if len(self.messages) > 2 else ""

    @property
    def passages(self) -> dict[str, str]:
        return {label: text for label, _, _, text in _PASSAGE.findall(self.question)}

    @property
    def factor(self) -> str:
        return re.search(r"^Factor: ([^(\n]*)", self.question, re.MULTILINE)[1].strip()

    @property
    def diagnosis(self) -> str:
        return re.search(r"^Diagnosis: (.*)", self.question, re.MULTILINE)[1]


@dataclass
class Response:
    """What the server says."""

    content: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    error: str = "no"
    finish_reason: str = "stop"
    raw: bytes | None = None
    """The whole body, instead."""
    usage: bool = True


Behaviour = Callable[[Request], Response]


def entry(direction: str, *statements: tuple[str, str, str], **keys: Any) -> str:
    """An answer; statements are (text, passage, quote)."""
    answer = {
        "direction": direction,
        "strength": "weak" if statements else None,
        "summary": f"It is said: {direction}.",
        "statements": [
            {"text": text, "quotes": [{"passage": passage, "quote": quote}]} for text, passage, quote in statements
        ],
        **keys,
    }
    return json.dumps(answer)


def honest(request: Request) -> Response:
    """Quotes the sentences that hold a word of the factor, the diagnosis and a direction."""
    found: dict[str, list[tuple[str, str, str]]] = {"raises": [], "lowers": []}
    words = [word for word in request.factor.split() if len(word) > 2]
    for label, text in request.passages.items():
        for sentence in split_text(text):
            if any(word in sentence.text.lower() for word in words) and request.diagnosis in sentence.text.lower():
                for direction, said in found.items():
                    if direction in sentence.text:
                        said.append((sentence.text, label, sentence.text))
    direction = max(found, key=lambda name: len(found[name]))
    if not found[direction]:
        return Response(entry("no_evidence"))
    return Response(entry(direction, *found[direction][:6]))


def first(number: int, behaviour: Behaviour, then: Behaviour = honest) -> Behaviour:
    """One behaviour for the first requests, then another."""
    return lambda request: (behaviour if request.number <= number else then)(request)


def attempts(number: int, behaviour: Behaviour, then: Behaviour = honest) -> Behaviour:
    """One behaviour for the first attempts at each pair, then another."""
    return lambda request: (behaviour if request.attempt <= number else then)(request)


def failing(status: int, **headers: str) -> Behaviour:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: Response(status=status, headers=named, error=f"trouble {status}")


def saying(content: str | None, **keys: Any) -> Behaviour:
    return lambda _: Response(content, **keys)


def slow(seconds: float, then: Behaviour = honest) -> Behaviour:
    def behave(request: Request) -> Response:
        time.sleep(seconds)
        return then(request)

    return behave


class LlmServer:
    """The server: `behaviour` may be changed at any time, `requests` is what came in."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                request = outer._begin(self.path, dict(self.headers.items()), body)
                try:
                    response = outer.behaviour(request)
                    self._send(request, response)
                    request.answered = response.status == 200
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    outer._end()

            def _send(self, request: Request, response: Response) -> None:
                payload = response.raw if response.raw is not None else json.dumps(_body(request, response)).encode()
                self.send_response(response.status)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
                self.wfile.flush()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.api_base = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def _begin(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Request:
        with self._lock:
            request = Request(path, headers, body, len(self.requests) + 1)
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return request

    def _end(self) -> None:
        with self._lock:
            self._at_once -= 1

    @property
    def answered(self) -> list[str]:
        """What was asked in the requests that were answered."""
        return [json.dumps(request.messages) for request in self.requests if request.answered]


def _body(request: Request, response: Response) -> dict[str, Any]:
    if response.status != 200:
        return {"error": {"message": response.error, "type": "trouble", "code": response.status}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {
        "id": f"answer-{request.number}",
        "object": "chat.completion",
        "created": 0,
        "model": request.body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": response.content},
                "finish_reason": response.finish_reason,
            }
        ],
        **({"usage": usage} if response.usage else {}),
    }


@contextmanager
def serving(behaviour: Behaviour = honest) -> Iterator[LlmServer]:
    """A server that runs until the block ends."""
    server = LlmServer(behaviour)
    thread = threading.Thread(target=server._http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()
        thread.join()
