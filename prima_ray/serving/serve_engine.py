"""Asks a model that is a Serve application, and changes to another one without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any, cast

from prima_ray.base import PrimaError
from prima_ray.serving.config import ServingConfig
from prima_ray.serving.engine import Answer, Question, Served, Unavailable

MODEL_DEPLOYMENT = "Model"
_RETRY_PAUSE_S = 0.2


@dataclass
class _Active:
    """A model that is asked."""

    app: str
    handle: Any
    served: Served
    under_way: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class ServeEngine:
    """See `engine.Engine`. Repeats what a lost replica left unanswered, until the request's time is over."""

    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._active: _Active | None = None

    async def use(self, app: str) -> str | None:
        """Ask this application from now on; it must be running.

        Returns:
            the application that was asked before, whose last answers have been given.

        Raises:
            PrimaError: it does not predict its known exam as at training time; the former one stays.
            Unavailable: it does not answer; the former one stays.
        """
        from ray import serve

        handle = await asyncio.to_thread(serve.get_deployment_handle, MODEL_DEPLOYMENT, app)
        served: Served = await self._ask(handle.served.remote, time.monotonic() + self._config.request_timeout_s)
        await self._check(handle)
        former, self._active = self._active, _Active(app, handle, served)
        if former is None:
            return None
        if former.under_way:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(former.idle.wait(), self._config.request_timeout_s)
        return former.app

    @property
    def is_empty(self) -> bool:
        """Nothing is asked yet."""
        return self._active is None

    def served(self) -> Served:
        return self._now().served

    async def answer(self, question: Question) -> Answer:
        deadline = time.monotonic() + self._config.request_timeout_s
        active = self._now()
        active.under_way += 1
        active.idle.clear()
        try:
            found = await self._ask(lambda: active.handle.answer.remote(question, time.time()), deadline)
        finally:
            active.under_way -= 1
            if not active.under_way:
                active.idle.set()
        if isinstance(found, PrimaError):
            raise found
        return cast(Answer, found)

    async def check(self) -> None:
        await self._check(self._now().handle)

    async def _check(self, handle: Any) -> None:
        found = await self._ask(handle.check.remote, time.monotonic() + self._config.request_timeout_s)
        if isinstance(found, PrimaError):
            raise found

    async def _ask(self, call: Any, deadline: float) -> Any:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        limit = self._config.request_timeout_s
        while True:
            response = None
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    response = call()
                    return await response
            except TimeoutError:
                if response is not None:
                    response.cancel()
                raise Unavailable(f"no answer within {limit:g} s", reason="timeout") from None
            except BackPressureError:
                raise Unavailable("too many requests are waiting", reason="queue_full", retry_after_s=1.0) from None
            except (RayActorError, ReplicaUnavailableError):
                # A diagnosis changes nothing, so it can be asked for again.
                await asyncio.sleep(min(_RETRY_PAUSE_S, max(0.0, deadline - time.monotonic())))
            except DeploymentUnavailableError:
                raise Unavailable("the model cannot be started", reason="no_model") from None

    def _now(self) -> _Active:
        if self._active is None:
            raise Unavailable("no model is served yet", reason="no_model")
        return self._active
