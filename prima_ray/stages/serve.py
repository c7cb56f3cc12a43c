"""Serve: a run as an endpoint over HTTP, and a page at `/`."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

from prima_ray.base import PrimaError, is_loopback, is_uri
from prima_ray.config import load_config
from prima_ray.data.run_record import check_model
from prima_ray.inference.predictor import check_diagnoses
from prima_ray.serving import deployments
from prima_ray.serving.app import create_app
from prima_ray.serving.config import ServingConfig
from prima_ray.serving.keys import KeyRing, add_key
from prima_ray.serving.metrics import Metrics
from prima_ray.serving.serve_engine import ServeEngine
from prima_ray.serving.server import listen, serve_app
from prima_ray.training.cluster import connect, disconnect
from prima_ray.training.config import RayContextConfig

_log = logging.getLogger(__name__)
PORT = 8000


def run_serve(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    api_keys: str | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """What `prima serve` does: serve until SIGINT or SIGTERM. At SIGHUP the run is read again, and goes live if it is
    sound.

    Returns:
        the run that was served last.

    Raises:
        PrimaError: a mistake in the arguments, the config or the run.
    """
    settings = load_config(ServingConfig, config, overrides)
    keys = KeyRing(api_keys) if api_keys else None
    if keys is None and not is_loopback(host):
        raise PrimaError(
            "this address can be reached from other machines: --api-keys FILE is needed",
            where=host,
            mend="`prima keys FILE --add NAME` makes a file with a key; 127.0.0.1 needs none.",
        )
    check_run(run)
    listening = listen(host, port)
    try:
        replicas = settings.scaling.max_replicas * max(settings.replica.num_cpus, 0.1)
        # Room for a second model beside the first one while they are switched.
        connect(RayContextConfig(num_cpus=int(2 * replicas) + 1), num_workers=0, loopback=True)
        deployments.start_serve()
        endpoint = Endpoint(run, settings)
        app = create_app(endpoint.engine, settings, keys=keys, local_only=keys is None, metrics=endpoint.metrics)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"

        async def serve() -> None:
            hangup = asyncio.Event()
            # Before the model is loaded, too: by itself the signal would end the process.
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
            await endpoint.begin()
            watcher = asyncio.create_task(endpoint.switch_at(hangup))
            await serve_app(
                app,
                listening,
                settings.limits,
                started=lambda: _log.info(
                    "serving %s at %s (Ctrl-C ends it, SIGHUP reads the run again)", endpoint.run, address
                ),
            )
            watcher.cancel()

        asyncio.run(serve())
    finally:
        listening.close()
        deployments.stop_serve()
        disconnect()
    return run


class Endpoint:
    """The model that is live, and how another one takes its place."""

    def __init__(self, run: str, config: ServingConfig) -> None:
        self.run, self.metrics = run, Metrics()
        self.app = ""
        """The application that is asked."""
        self.engine = ServeEngine(config)
        self._config, self._count = config, 0

    async def begin(self) -> None:
        """The first model.

        Raises:
            PrimaError: it does not start, or predicts its known exam otherwise than at training time.
        """
        await self._go_live()

    async def switch_at(self, hangup: asyncio.Event) -> None:
        """Whenever it is set: the run's folder, or what its link points to now, goes live if it is sound."""
        while True:
            await hangup.wait()
            hangup.clear()
            try:
                await self._go_live()
            except Exception as error:
                # Whatever it is, the model that is live stays.
                self.metrics.switched("refused")
                _log.error("the run is refused, the former model stays: %s", error)
            else:
                self.metrics.switched("done")
                _log.info("live: %s", self.engine.served().card.version)

    async def _go_live(self) -> None:
        await asyncio.to_thread(check_run, self.run)
        self._count += 1
        name = f"model-{self._count}"
        # The folder that a link points to now: replicas that start later must not read another model.
        at = self.run if is_uri(self.run) else str(Path(self.run).resolve())
        await asyncio.to_thread(deployments.run_model, at, name, self._config)
        try:
            former = await self.engine.use(name)
        except BaseException:
            await asyncio.to_thread(deployments.remove_model, name)
            raise
        self.app = name
        if former is not None:
            await asyncio.to_thread(deployments.remove_model, former)


def check_run(run: str) -> None:
    """Before any replica reads it: a model that diagnoses, with the files that its run wrote.

    Raises:
        PrimaError: it is not.
    """
    check_diagnoses(run)
    check_model(run)


def run_keys(path: str, *, add: str) -> str:
    """What `prima keys` does: a new key, shown once.

    Raises:
        PrimaError: the name is taken or none, or the file is damaged.
    """
    key = add_key(path, add)
    _log.info("%s: the hash of a key for %s was added. The key is shown once:", path, add)
    return key
