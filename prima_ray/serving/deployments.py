"""On Ray Serve: a model deployment that batches across requests, an engine that asks it, an ingress with the same app.

A model is a Serve application of its own, named by whoever starts it; whoever asks holds a handle to one of them. A new
model is another application: it is started, looked at, and only then asked (`ServeEngine.use`), so no request meets a
model that is not there yet, and a broken one is never asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

from prima_ray.base import PrimaError
from prima_ray.serving.config import RateConfig, ServingConfig
from prima_ray.serving.engine import Answer, Question, Served, Unavailable
from prima_ray.serving.keys import KeyRing
from prima_ray.serving.metrics import Metrics
from prima_ray.serving.model import Model
from prima_ray.serving.rate import SharedLimiter, TokenBuckets
from prima_ray.serving.records import lines_to_stderr

_log = logging.getLogger(__name__)
_RETRY_PAUSE_S = 0.2
_DEPLOYMENT = "Model"


class ModelReplica:
    """One replica: one loaded model, one batch at a time in a thread, so that health checks are answered meanwhile."""

    def __init__(self, run: str, config: ServingConfig) -> None:
        """Raises:
        PrimaError: the run is damaged, or predicts its known exam otherwise than at training time.
        """
        from ray import serve

        _keep_to_loopback()
        self._config = config
        if config.replica.device == "cpu":
            import torch

            # This process is the replica's alone.
            torch.set_num_threads(max(1, int(config.replica.num_cpus)))
        self._model = Model(run, device=config.replica.device)
        self._model.check()
        self._began: float | None = None
        # One and the same: a thread that comes new to torch is slow at first.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._batched = serve.batch(max_batch_size=config.batch.max_size, batch_wait_timeout_s=config.batch.wait_s)(
            self._answer
        )

    async def _answer(self, asked: list[tuple[Question, float]]) -> list[Answer | PrimaError]:
        self._began = time.monotonic()
        now = time.time()
        found: list[Answer | PrimaError]
        try:
            found = await self._run(self._model.answer, [question for question, _ in asked])
        finally:
            self._began = None
        for item, (_, sent) in zip(found, asked, strict=True):
            if isinstance(item, Answer):
                item.seconds.setdefault("queue", max(0.0, now - sent))
        return found

    async def answer(self, question: Question, sent: float) -> Answer | PrimaError:
        """A user's mistake is a value: raised in a batch it would be everybody's.

        Args:
            sent: when it was asked (seconds since the epoch).
        """
        found: Answer | PrimaError = await self._batched((question, sent))
        return found

    async def served(self) -> Served:
        """What this replica serves."""
        return self._model.served

    async def check(self) -> PrimaError | None:
        """See `Engine.check`; what is wrong is a value."""
        try:
            await self._run(self._model.check)
        except PrimaError as error:
            return error
        return None

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that fails. Python cannot end a thread that hangs."""
        began, limit = self._began, self._config.replica.hang_s
        if began is not None and time.monotonic() - began > limit:
            raise RuntimeError(f"a batch has been under way for more than {limit:g} s")


def _keep_to_loopback() -> None:
    """On a cluster that keeps to loopback a replica's port for other deployments does too; Serve has no setting for it.

    Every replica has one, whatever its deployment. It is bound when the replica's constructor is done, by a function of
    Serve's own (Ray 2.60); should that go, the test of open ports says so.
    """
    if os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "0":
        return
    from ray.serve._private import replica

    plain = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: plain(server, address.replace("[::]", "127.0.0.1"))


def model_application(run: str, config: ServingConfig) -> Any:
    """A run as a Serve application without a route.

    Args:
        run: a run directory that every node can read.
    """
    from ray import serve

    replica = config.replica
    deployment = serve.deployment(
        name=_DEPLOYMENT,
        # A batch is computed while the next one waits beside it.
        max_ongoing_requests=max(8, 2 * config.batch.max_size),
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": replica.num_cpus, "num_gpus": replica.num_gpus},
        health_check_period_s=replica.health_period_s,
        health_check_timeout_s=replica.health_timeout_s,
        graceful_shutdown_timeout_s=replica.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        **_replicas(config),
    )
    return deployment(ModelReplica).bind(run, config)


def _replicas(config: ServingConfig) -> dict[str, Any]:
    scaling = config.scaling
    if scaling.min_replicas == scaling.max_replicas:
        return {"num_replicas": scaling.max_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "look_back_period_s": scaling.look_back_s,
            "metrics_interval_s": scaling.interval_s,
        }
    }


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

        handle = await asyncio.to_thread(serve.get_deployment_handle, _DEPLOYMENT, app)
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


class Limiter:
    """Token buckets in an actor: one count for all replicas of an ingress."""

    def __init__(self, config: RateConfig) -> None:
        _keep_to_loopback()
        self._buckets = TokenBuckets(config)

    async def take(self, key: str) -> float:
        return self._buckets.take(key)


class Gateway:
    """The ingress of a cluster: the same app in a replica of Serve's."""

    def __init__(self, config: ServingConfig, keys: str, limiter: Any) -> None:
        """Raises:
        PrimaError: the keys cannot be read.
        """
        _keep_to_loopback()
        lines_to_stderr()
        self._config = config
        self._keys = KeyRing(keys)
        self._limiter = SharedLimiter(config.rate, limiter)
        self._metrics = Metrics()
        self._switch: asyncio.Task[None] | None = None
        self.engine = ServeEngine(config)

    def __serve_build_asgi_app__(self) -> Any:
        from prima_ray.serving.app import create_app

        return create_app(
            self.engine,
            self._config,
            keys=self._keys,
            local_only=False,
            limiter=self._limiter,
            metrics=self._metrics,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """`user_config: {model: NAME}` names the application to ask. One that does not answer well is refused, and what
        was asked before stays.

        Serve sends a replica nothing until this is done. So it waits for the first model only; another one is looked at
        beside the requests.
        """
        name = str(user_config["model"])
        if self.engine.is_empty:
            await self.engine.use(name)
            return
        if self._switch is not None:
            # The name that was told last counts.
            self._switch.cancel()
        self._switch = asyncio.create_task(self._change(name))

    async def _change(self, name: str) -> None:
        try:
            await self.engine.use(name)
        except Exception as error:
            self._metrics.switched("refused")
            _log.error("the model %s is refused, the former one stays: %s", name, error)
        else:
            self._metrics.switched("done")
            _log.info("live: %s", self.engine.served().card.version)


def build_model(args: dict[str, Any]) -> Any:
    """For `import_path` of a Serve config file; `args` are `run` and the keys of `ServingConfig`."""
    settings = {key: value for key, value in args.items() if key != "run"}
    return model_application(str(args["run"]), ServingConfig.model_validate(settings))


def build_gateway(args: dict[str, Any]) -> Any:
    """For `import_path` of a Serve config file; `args` are `api_keys` (a file) and the keys of `ServingConfig`.

    Which model it asks says the deployment's `user_config`, see `Gateway.reconfigure`; `args.model` where that is not
    given.
    """
    from ray import serve

    settings = {key: value for key, value in args.items() if key not in ("api_keys", "model")}
    config = ServingConfig.model_validate(settings)
    limiter = serve.deployment(name="Limiter", num_replicas=1, max_ongoing_requests=1000)(Limiter)
    quiet = {"enable_access_log": False, "log_level": "INFO"}
    gateway = serve.deployment(
        name="Gateway",
        # The bound is the model's queue, whose refusals say when to come back; beyond twice that Serve waits.
        max_ongoing_requests=2 * config.max_queued_requests,
        logging_config=quiet,
        user_config={"model": args["model"]} if "model" in args else None,
        graceful_shutdown_timeout_s=config.replica.drain_s,
    )
    return gateway(serve.ingress()(Gateway)).bind(config, str(args["api_keys"]), limiter.bind(config.rate))


def start_serve() -> None:
    """Serve without a proxy: whoever asks has a handle, and no port is opened."""
    from ray import serve

    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
    # Serve sets its logger in this process up as it starts.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def run_model(run: str, name: str, config: ServingConfig) -> None:
    """Start a model's application and wait until it runs.

    Raises:
        PrimaError: its replicas do not start.
    """
    from ray import serve

    try:
        serve.run(model_application(run, config), name=name, route_prefix=None)
    except RuntimeError as error:
        with contextlib.suppress(Exception):
            serve.delete(name)
        raise PrimaError(f"the model does not start ({_reason(error)})", where=run) from None


def remove_model(name: str) -> None:
    """Drain an application and take it away."""
    from ray import serve

    serve.delete(name)


def stop_serve() -> None:
    """Every replica goes."""
    from ray import serve

    serve.shutdown()


def _reason(error: BaseException) -> str:
    """Of a replica that does not start, Serve gives a text with the traceback: its last line says why."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else type(error).__name__)
