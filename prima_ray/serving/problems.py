"""Errors over HTTP: every one of them is `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response

from prima_ray.base import PrimaError


class HttpProblem(Exception):  # noqa: N818 - an answer
    """Answered with a status and a sentence; nothing of the request is in it that a log must not hold."""

    def __init__(
        self, status: int, detail: str, *, reason: str, headers: Mapping[str, str] | None = None, close: bool = False
    ) -> None:
        """
        Args:
            reason: a word for metrics and logs.
            close: the connection ends with the answer: the rest of the body is not wanted.
        """
        super().__init__(status, detail)
        self.status, self.detail, self.reason = status, detail, reason
        self.headers = {**(headers or {}), **({"connection": "close"} if close else {})}


def refused(error: PrimaError, *, reason: str = "unusable_input") -> HttpProblem:
    """A user's mistake in a well-formed request."""
    return HttpProblem(422, one_line(error), reason=reason)


def busy(detail: str, *, reason: str, retry_after_s: float) -> HttpProblem:
    """The server cannot answer now."""
    return HttpProblem(503, detail, reason=reason, headers={"retry-after": str(max(1, round(retry_after_s)))})


def one_line(error: PrimaError) -> str:
    """The error without its place, which may be a path of this machine."""
    return f"{error.what.rstrip('.')}. {error.mend}" if error.mend else error.what


def problem_response(problem: HttpProblem, *, request_id: str) -> Response:
    """The answer that tells a problem."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "request_id": request_id,
    }
    text = json.dumps(body, ensure_ascii=False)
    # A lone surrogate of a `\ud800` in JSON has no UTF-8.
    data = text.encode("utf-8", "replace")
    return Response(data, status_code=problem.status, headers=problem.headers, media_type="application/problem+json")
