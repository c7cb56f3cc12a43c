"""What only a socket shows: bodies without end, heads that trickle, connections without number."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from prima_ray.base import PrimaError
from prima_ray.serving.engine import LocalEngine
from prima_ray.serving.model import Model
from prima_ray.serving.server import listen
from tests.endpoint import running

HEAD = b"POST /v1/diagnoses HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def is_answered_by(connection: socket.socket, request: bytes, start: bytes) -> bool:
    """True where the answer begins so."""
    connection.sendall(request)
    return connection.recv(65536).startswith(start)


def is_answered(connection: socket.socket) -> bool:
    """True where a request for `/healthz` is, on a connection that stays."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            part = connection.recv(65536)
            if not part:
                return False
            answer += part
        return answer.startswith(b"HTTP/1.1 200 OK")
    return False


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_body_of_200_mb_is_refused_at_its_head(model: Model) -> None:
    with running(LocalEngine(model)) as port, connect(port) as one:
        one.sendall(HEAD + b"Content-Length: 200000000\r\n\r\n" + b"x" * 1000)
        answer = rest(one)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"the body has more than 33554432 bytes"' in answer


def test_a_body_of_unknown_length_is_refused_when_it_is_too_long(model: Model) -> None:
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with running(LocalEngine(model), max_body_bytes=1_000_000) as port, connect(port) as one:
        one.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 200_000_000 // len(chunk):
                one.sendall(chunk)
                sent += 1
        answer = rest(one)
    assert answer.startswith(b"HTTP/1.1 413 ") or not answer
    # What lies in the sockets' buffers is not yet read.
    assert sent * len(chunk) < 50_000_000


def test_a_body_that_trickles_is_given_up(model: Model) -> None:
    with running(LocalEngine(model), body_timeout_s=0.3) as port, connect(port) as one:
        one.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        answer = rest(one)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"the body was not there after 0.3 s"' in answer


def test_a_head_that_trickles_is_given_up(model: Model) -> None:
    with running(LocalEngine(model), header_timeout_s=0.3) as port, connect(port) as one, connect(port) as silent:
        one.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-")
        assert rest(one) == b""
        assert rest(silent) == b""
        # One that is in time is answered, and again on the same connection.
        with connect(port) as good:
            assert is_answered(good)
            assert is_answered(good)
            good.sendall(b"GET /healthz")
            assert rest(good) == b""


def test_bodies_share_a_bound(model: Model) -> None:
    with running(LocalEngine(model), max_held_bytes=1_000_000) as port, connect(port) as one, connect(port) as two:
        one.sendall(HEAD + b"Content-Length: 900000\r\n\r\n" + b"x")
        assert is_answered_by(two, HEAD + b"Content-Length: 200000\r\n\r\n", b"HTTP/1.1 503 ")
        one.close()
        with connect(port) as three:
            assert is_answered_by(three, HEAD + b"Content-Length: 3\r\n\r\n{}}", b"HTTP/1.1 400 ")


def test_connections_are_bounded(model: Model) -> None:
    with running(LocalEngine(model), max_connections=3) as port, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(port)) for _ in range(3)]
        assert all(map(is_answered, held))
        with connect(port) as more:
            assert not is_answered(more)
        held[0].close()
        with connect(port) as more:
            assert is_answered(more)


def test_what_is_no_http_is_refused(model: Model) -> None:
    with running(LocalEngine(model)) as port:
        for data in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 2_000_000, b"NONSENSE\r\n\r\n"):
            with connect(port) as one:
                with contextlib.suppress(ConnectionError):
                    one.sendall(data + b"\r\n\r\n")
                answer = rest(one)
                assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:100]
        with connect(port) as good:
            assert is_answered(good)


def test_small_answers_do_not_wait_for_the_clients_acknowledgement() -> None:
    """Nagle's algorithm is off, as on sockets that asyncio makes itself."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ours: socket.socket = writer.get_extra_info("socket")
            found.set_result(ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = listen("127.0.0.1", 0)
        async with await asyncio.start_server(note, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            value = await found
            writer.close()
        return value

    assert asyncio.run(accepted()) == 1


def test_a_port_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as one:
        one.listen()
        port = one.getsockname()[1]
        with pytest.raises(PrimaError) as caught:
            listen("127.0.0.1", port)
    assert str(caught.value) == (
        f"127.0.0.1: the endpoint cannot listen on port {port} (Address already in use)\n"
        "  Choose another --port or --host."
    )
