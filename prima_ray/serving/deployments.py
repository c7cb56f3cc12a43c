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
from typing import Any

from prima_ray.base import PrimaError
from prima_ray.serving.config import RateConfig, ServingConfig
from prima_ray.serving.engine import Answer, Question, Served
from prima_ray.serving.keys import KeyRing
from prima_ray.serving.metrics import Metrics
from prima_ray.serving.model import Model
from prima_ray.serving.rate import SharedLimiter, TokenBuckets
from prima_ray.serving.records import lines_to_stderr
from prima_ray.serving.serve_engine import MODEL_DEPLOYMENT, ServeEngine
from prima_ray.serving.turns import Turns

_log = logging.getLogger(__name__)


class ModelReplica:
    """One replica: one loaded model, one batch at a time in a thread, so that health checks are answered meanwhile."""

    def __init__(self, run: str, config: ServingConfig) -> None:
        """Raises:
        PrimaError: the run is damaged, or predicts its known exam otherwise than at training time.
        """
        from ray import serve

        _keep_to_loopback()
        self._config = config
        # One and the same: a thread that comes new to torch is slow at first.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model", initializer=_take_cores, initargs=(config,))
        self._model = self._thread.submit(Model, run, device=config.replica.device).result()
        self._thread.submit(self._model.check).result()
        self._began: float | None = None
        self._turns = Turns(max_size=config.batch.max_size, linger=config.batch.linger)
        self._batched = serve.batch(max_batch_size=config.batch.max_size, batch_wait_timeout_s=config.batch.wait_s)(
            self._answer
        )

    async def _answer(self, asked: list[tuple[Question, float]]) -> list[Answer | PrimaError]:
        self._began = began = time.monotonic()
        self._turns.begin()
        now = time.time()
        found: list[Answer | PrimaError]
        try:
            found = await self._run(self._model.answer, [question for question, _ in asked])
        finally:
            self._began = None
            self._turns.end(len(asked), time.monotonic() - began)
        for item, (_, sent) in zip(found, asked, strict=True):
            if isinstance(item, Answer):
                item.seconds.setdefault("queue", max(0.0, now - sent))
        return found

    async def answer(self, question: Question, sent: float) -> Answer | PrimaError:
        """A user's mistake is a value: raised in a batch it would be everybody's.

        Args:
            sent: when it was asked (seconds since the epoch).
        """
        # Serve closes a batch as soon as it sees one request, and lets it wait for the model as it is. So they wait
        # here, and go in together.
        await self._turns.wait()
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


def _take_cores(config: ServingConfig) -> None:
    """Called in the thread that asks the model: torch's libraries count threads by the thread that they are called
    from.
    """
    if config.replica.device == "cpu":
        import torch

        # This process is the replica's alone.
        torch.set_num_threads(max(1, int(config.replica.num_cpus)))


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
        name=MODEL_DEPLOYMENT,
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
        """`user_config: {model: NAME, fallback: NAME}` names the application to ask. One that does not answer well is
        refused, and what was asked before stays; a replica that starts anew has nothing before it and asks `fallback`.

        Serve sends a replica nothing until this is done. So it waits for the first model only; another one is looked at
        beside the requests.
        """
        name = str(user_config["model"])
        if self.engine.is_empty:
            await self._begin(name, user_config.get("fallback"))
            return
        if self._switch is not None:
            # The name that was told last counts.
            self._switch.cancel()
        self._switch = asyncio.create_task(self._change(name))

    async def _begin(self, name: str, fallback: Any) -> None:
        try:
            await self.engine.use(name)
        except Exception as error:
            if fallback is None:
                raise
            self._metrics.switched("refused")
            _log.error("the model %s is refused, %s is asked instead: %s", name, fallback, error)
            await self.engine.use(str(fallback))

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
