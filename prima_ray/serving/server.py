"""uvicorn, with the bounds that it does not have: time for a request's head, and a number of connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from prima_ray.base import PrimaError
from prima_ray.serving.config import LimitsConfig
from prima_ray.serving.guard import App

_log = logging.getLogger(__name__)
_KEEP_ALIVE_S = 30
_DRAIN_S = 30
_MAX_HEAD_BYTES = 512 * 1024
"""More than one read of asyncio's (256 KiB), which may hold a part of the body."""


def bounded_protocol(limits: LimitsConfig) -> type[asyncio.Protocol]:
    """A protocol of uvicorn's that closes a connection whose request has no whole head in time (slow-loris)."""

    class Bounded(_protocol()):  # type: ignore[misc]
        _head_timer: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                # Before a byte is read: whoever is over the number is not worth an answer's work.
                transport.abort()
                return
            self._await_head()

        def data_received(self, data: bytes) -> None:
            if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
                self._await_head()
            if self._head_timer is not None:
                self._head_bytes += len(data)
                if self._head_bytes > _MAX_HEAD_BYTES:
                    self.transport.abort()
                    return
            super().data_received(data)

        def on_headers_complete(self) -> None:
            self._head_is_there()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(limits.header_timeout_s, self._too_slow)

        def _head_is_there(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            self._head_timer = None
            if self.transport is not None and not self.transport.is_closing():
                self.transport.abort()

    return Bounded


def _protocol() -> type[Any]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    return HttpToolsProtocol


class _Server(uvicorn.Server):
    """uvicorn's own raises a signal again when it has drained: the command would end as if it had been killed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket on this interface and no other; port 0 takes a free one.

    Raises:
        PrimaError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is said: asyncio turns Nagle's algorithm off only where it knows that this is TCP, and with it an
    # answer's body waits 40 ms for the client's delayed acknowledgement of its head.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise PrimaError(
            f"the endpoint cannot listen on port {port} ({reason})", where=host, mend="Choose another --port or --host."
        ) from None
    found.set_inheritable(True)
    return found


def build_server(app: App, limits: LimitsConfig) -> uvicorn.Server:
    """A server of the app, without signal handlers."""
    return _Server(
        uvicorn.Config(
            app,
            http=bounded_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_DRAIN_S,
            proxy_headers=False,
        )
    )


async def serve_app(
    app: App,
    listening: socket.socket,
    limits: LimitsConfig,
    *,
    started: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; answers under way are finished first.

    Args:
        started: called once the port answers.
    """
    server = build_server(app, limits)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if started is not None and server.started:
        started()
    await task
