"""What stands before every route: who asks, how often, with what id; and what every answer carries. Plain ASGI.

To add a header that every answer has: `HEADERS`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from prima_ray.base import PrimaError, is_loopback
from prima_ray.serving.engine import Unavailable
from prima_ray.serving.keys import KeyRing
from prima_ray.serving.metrics import Metrics
from prima_ray.serving.problems import HttpProblem, busy, problem_response, refused
from prima_ray.serving.rate import RateLimiter
from prima_ray.serving.records import log_request

_log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "geolocation=(), microphone=()",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "cache-control": "no-store",
}
_OPEN = ("/v1/", "/metrics")
"""What wants a key where there are keys. The page is a form and holds nothing; probes have no keys."""


@dataclass(frozen=True)
class GuardConfig:
    """Who may ask."""

    keys: KeyRing | None
    local_only: bool
    """Only names of this machine as Host: a page of another site cannot reach a port on loopback by a name of its own
    (DNS rebinding)."""


class Guard:
    """Wraps an app; see the module."""

    def __init__(
        self, app: App, *, config: GuardConfig, limiter: RateLimiter, metrics: Metrics, known: Callable[[str], str]
    ) -> None:
        """
        Args:
            known: a path -> the route it belongs to, for metrics and logs: what strangers type is no label.
        """
        self._app, self._config, self._limiter, self._metrics, self._known = app, config, limiter, metrics, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _Call(scope, send)
        started = time.perf_counter()
        try:
            await self._admit(scope)
            await self._app(scope, receive, call.send)
        except Exception as error:
            await self._failed(call, error, scope, receive)
        seconds = time.perf_counter() - started
        route = self._known(path_of(scope))
        # A method is what the client says: one of a few, or "other".
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self._metrics.request(route, method, call.status, seconds)
        reason = call.reason or scope["state"].get("reason")
        if reason:
            self._metrics.refused(reason)
        if route.startswith("/v1/") or call.status >= 400:
            log_request(
                request_id=call.request_id,
                method=method,
                route=route,
                status=call.status,
                ms=round(1000 * seconds, 1),
                key=scope["state"].get("key"),
                reason=reason,
            )

    async def _admit(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), path_of(scope)
        host = _host_name(headers.get("host", ""))
        if self._config.local_only and not is_loopback(host):
            raise HttpProblem(421, "this server answers to names of this machine only", reason="host")
        origin = headers.get("origin")
        # A page from a file, or one that hides where it is from, says "null": another site as well.
        if origin is not None and _netloc(origin) != headers.get("host", "").lower():
            raise HttpProblem(403, "requests of other sites are not answered", reason="origin")
        key = None
        if path.startswith(_OPEN) and self._config.keys is not None:
            key = _key_name(self._config.keys, headers)
            scope["state"]["key"] = key
        if path.startswith("/v1/diagnoses") and scope["method"] == "POST":
            wait = await self._limiter.wait_s(key or "")
            if wait > 0:
                raise HttpProblem(
                    429,
                    "too many requests with this key" if key else "too many requests",
                    reason="rate",
                    headers={"retry-after": str(max(1, round(wait + 0.5)))},
                    close=True,
                )

    async def _failed(self, call: _Call, error: Exception, scope: Scope, receive: Receive) -> None:
        problem = as_problem(error)
        if problem.status == 500:
            # Of an exception's text nobody knows what it quotes: its kind and place say enough.
            _log.error("request %s failed: %s", call.request_id, _place(error))
        call.reason = problem.reason
        if call.begun:
            return
        await problem_response(problem, request_id=call.request_id)(scope, receive, call.send)


def as_problem(error: Exception) -> HttpProblem:
    """Whatever was raised, as an answer."""
    match error:
        case HttpProblem():
            return error
        case PrimaError():
            return refused(error)
        case Unavailable():
            return busy(error.detail, reason=error.reason, retry_after_s=error.retry_after_s)
        case HTTPException():
            detail = {404: "there is no such path", 405: "this path has other methods"}.get(
                error.status_code, str(error.detail)
            )
            return HttpProblem(error.status_code, detail, reason="route", headers=error.headers)
        case _:
            return HttpProblem(500, "this is our mistake; its request id is in the log", reason="internal")


class _Call:
    """One request under way."""

    def __init__(self, scope: Scope, send: Send) -> None:
        scope.setdefault("state", {})
        self.request_id = scope["state"]["request_id"] = str(uuid.uuid4())
        self.status, self.begun, self.reason = 500, False, ""
        self._send = send

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status, self.begun = message["status"], True
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers["x-request-id"] = self.request_id
        await self._send(message)


def _place(error: BaseException) -> str:
    trace, place = error.__traceback__, "nowhere"
    while trace is not None:
        place = f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}"


def _key_name(keys: KeyRing, headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    name = keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
    if name is None:
        raise HttpProblem(
            401,
            "an API key is needed: `Authorization: Bearer KEY`",
            reason="key",
            headers={"www-authenticate": 'Bearer realm="prima"'},
            close=True,
        )
    return name


def path_of(scope: Scope) -> str:
    """The path without what the app is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path") or "")


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
