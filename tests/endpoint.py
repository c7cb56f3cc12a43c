"""An endpoint on loopback, in a thread of the test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prima_ray.serving.app import create_app
from prima_ray.serving.config import ServingConfig
from prima_ray.serving.engine import Engine
from prima_ray.serving.keys import KeyRing
from prima_ray.serving.server import build_server, listen


@contextmanager
def running(engine: Engine, *, keys: KeyRing | None = None, **limits: Any) -> Iterator[int]:
    """The port of an endpoint in a thread; keywords of `LimitsConfig`."""
    config = ServingConfig.model_validate({"limits": limits})
    listening = listen("127.0.0.1", 0)
    listening.listen()
    server = build_server(create_app(engine, config, keys=keys), config.limits)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()
