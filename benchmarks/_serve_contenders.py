"""The servers that `serve.py` compares, each a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel


class Request(BaseModel):
    """The body, in FastAPI's own way."""

    images: list[str]
    attributes: dict[str, Any] = {}


def plain_fastapi(run: str, port: int, *, threads: int, torch_threads: int) -> None:
    """What one writes without Ray Serve: FastAPI's own parsing, a thread pool, one model. No limits, keys, metrics."""
    import anyio.to_thread
    import torch
    import uvicorn
    from fastapi import FastAPI

    from prima_ray.inference.diagnosis import Diagnoser
    from prima_ray.inference.predictor import Exam

    diagnoser = Diagnoser.load(run)
    torch.set_num_threads(torch_threads)
    app = FastAPI()
    limiter = anyio.CapacityLimiter(threads)

    @app.post("/v1/diagnoses")
    async def diagnose(request: Request) -> dict[str, Any]:
        exam = Exam(tuple(map(base64.b64decode, request.images)), request.attributes)
        found = await anyio.to_thread.run_sync(diagnoser.diagnose_one, exam, limiter=limiter)
        return found.as_dict()

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


class Noop:
    """Answers at once: what is left is the way to the model and back."""

    def __init__(self, run: str) -> None:
        from prima_ray.serving.model import Model

        model = Model(run)
        self.served = model.served
        self._answer = None
        self._fill = model.answer

    def answer(self, questions: Sequence[Any]) -> list[Any]:
        if self._answer is None:
            self._answer = self._fill(questions[:1])[0]
        return [self._answer] * len(questions)

    def check(self) -> None:
        pass


def noop_fastapi(run: str, port: int) -> None:
    """The endpoint's own app over a model that does nothing, in one process."""
    from prima_ray.serving.app import create_app
    from prima_ray.serving.config import LimitsConfig
    from prima_ray.serving.engine import LocalEngine
    from prima_ray.serving.server import listen, serve_app

    asyncio.run(serve_app(create_app(LocalEngine(Noop(run))), listen("127.0.0.1", port), LimitsConfig()))


def noop_serve(run: str, port: int) -> None:
    """The same app over the same model behind Ray Serve."""
    from prima_ray.serving import deployments
    from prima_ray.stages.serve import run_serve

    plain = deployments.ModelReplica.__init__

    class NoopReplica(deployments.ModelReplica):
        def __init__(self, path: str, config: Any) -> None:
            plain(self, path, config)
            self._model = Noop(path)  # type: ignore[assignment]

    deployments.ModelReplica = NoopReplica  # type: ignore[misc]
    run_serve(run, port=port)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("fastapi", "noop-fastapi", "noop-serve"))
    parser.add_argument("port", type=int)
    parser.add_argument("run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--torch-threads", type=int, default=1)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    match given.kind:
        case "fastapi":
            plain_fastapi(given.run, given.port, threads=given.threads, torch_threads=given.torch_threads)
        case "noop-fastapi":
            noop_fastapi(given.run, given.port)
        case _:
            noop_serve(given.run, given.port)


if __name__ == "__main__":
    main()
