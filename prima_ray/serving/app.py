"""The HTTP app: routes over an `Engine`. The same app runs under uvicorn, in a test, and as an ingress of Ray Serve.

To add a route: a function here, and its name in `ROUTES`; what every route has in common is `guard`.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from prima_ray import __version__
from prima_ray.base import PrimaError
from prima_ray.inference.predictor import Exam
from prima_ray.serving.config import ServingConfig
from prima_ray.serving.engine import Engine, Question, Unavailable
from prima_ray.serving.examples import DIAGNOSIS_OPERATION, PROBLEMS
from prima_ray.serving.guard import App, Guard, GuardConfig, as_problem
from prima_ray.serving.keys import KeyRing
from prima_ray.serving.limits import Held, parse_request, read_body
from prima_ray.serving.metrics import Metrics
from prima_ray.serving.problems import HttpProblem, problem_response
from prima_ray.serving.rate import RateLimiter, TokenBuckets
from prima_ray.serving.records import Audit
from prima_ray.serving.schemas import Diagnosis, attributes_schema

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
ROUTES = ("/v1/diagnoses", "/v1/schema", "/healthz", "/readyz", "/metrics", "/openapi.json", *PAGE)


def create_app(
    engine: Engine,
    config: ServingConfig | None = None,
    *,
    keys: KeyRing | None = None,
    local_only: bool = True,
    limiter: RateLimiter | None = None,
    metrics: Metrics | None = None,
    audit: Audit | None = None,
) -> App:
    """The whole endpoint.

    Args:
        keys: who may ask; None: everybody, for loopback alone.
        local_only: see `guard.GuardConfig`.
        limiter: None: buckets of this process.

    Raises:
        PrimaError: the audit file cannot be written.
    """
    config = config or ServingConfig()
    metrics = metrics or Metrics()
    app = FastAPI(
        title="prima_ray",
        version=__version__,
        summary="Diagnosis from images and clinical metadata. Research software, no medical device.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=PROBLEMS,
    )
    _add_diagnoses(app, engine, config, metrics, audit or Audit(config.audit))
    _add_operations(app, engine, metrics)
    _add_page(app)
    if keys is not None:
        _announce_keys(app)

    async def fail(request: Request, error: Exception) -> Response:
        problem = as_problem(error)
        request.state.reason = problem.reason
        return problem_response(problem, request_id=request.state.request_id)

    for kind in (HTTPException, HttpProblem, PrimaError, Unavailable, Exception):
        app.add_exception_handler(kind, fail)
    return Guard(
        app,
        config=GuardConfig(keys=keys, local_only=local_only),
        limiter=limiter or TokenBuckets(config.rate),
        metrics=metrics,
        known=lambda path: path if path in ROUTES else "other",
    )


def _add_diagnoses(app: FastAPI, engine: Engine, config: ServingConfig, metrics: Metrics, audit: Audit) -> None:
    held = Held(config.limits)

    @app.post("/v1/diagnoses", response_model=Diagnosis, openapi_extra=DIAGNOSIS_OPERATION, tags=["diagnosis"])
    async def diagnose(request: Request) -> Response:
        """Diagnose one exam: 1 to 8 photos and whatever is known of the patient."""
        with held.room(request.headers) as room:
            started = time.perf_counter()
            body = await read_body(request.receive, request.headers, config.limits)
            room.takes(len(body))
            photos, attributes, explain = await parse_request(body, request.headers, config.limits)
            del body
            read_s = time.perf_counter() - started
            question = Question(Exam(images=photos, attributes=attributes), explain)
            metrics.serves(engine.served())
            metrics.under_way(1)
            try:
                answer = await engine.answer(question)
            finally:
                metrics.under_way(-1)
        request_id = request.state.request_id
        metrics.answered(answer)
        metrics.stages({"read": read_s, "total": time.perf_counter() - started})
        audit.write(request_id, key=request.scope["state"].get("key"), photos=photos, answer=answer)
        found = {**answer.fields, "request_id": request_id, "model": answer.card.model_dump()}
        return JSONResponse(Diagnosis.model_validate(found).model_dump(mode="json"))

    @app.get("/v1/schema", tags=["diagnosis"], response_class=_SchemaResponse)
    async def schema() -> Response:
        """The attributes as JSON Schema, and which model answers."""
        served = engine.served()
        found = attributes_schema(served.data_set, served.read_attributes)
        return _SchemaResponse({**found, "x-model": served.card.model_dump()})


class _SchemaResponse(JSONResponse):
    media_type = "application/schema+json"


def _add_operations(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    checks = _Checks(engine)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["operations"])
    async def readyz() -> dict[str, Any]:
        """A known exam has just been predicted as it was at training time."""
        card = engine.served().card
        metrics.serves(engine.served())
        try:
            await checks.check()
        except PrimaError as error:
            metrics.ready(False)
            raise Unavailable(error.what, reason="not_ready") from None
        except Unavailable:
            metrics.ready(False)
            raise
        metrics.ready(True)
        return {"status": "ready", "model": card.model_dump()}

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def text() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), headers={"content-type": metrics.content_type})


class _Checks:
    """One look at the model at a time: whoever asks meanwhile gets its outcome, so strangers cannot make it work."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """See `Engine.check`."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._engine.check())
        await asyncio.shield(self._running)


def _add_page(app: FastAPI) -> None:
    folder = importlib.resources.files("prima_ray.serving") / "page"
    for path, (name, kind) in PAGE.items():
        data = (folder / name).read_bytes()

        async def page(data: bytes = data, kind: str = kind) -> Response:
            return Response(data, media_type=kind, headers={"content-security-policy": _PAGE_POLICY})

        app.add_api_route(path, page, methods=["GET"], include_in_schema=False)


def _announce_keys(app: FastAPI) -> None:
    inner = app.openapi

    def openapi() -> dict[str, Any]:
        found = inner()
        found.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in found["paths"].items():
            if path.startswith(("/v1/", "/metrics")):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
        return found

    app.openapi = openapi  # type: ignore[method-assign]
