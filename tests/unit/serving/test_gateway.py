"""The gateway of a cluster, without one: what it does when it is told of another model."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prima_ray.base import PrimaError
from prima_ray.serving.config import ServingConfig
from prima_ray.serving.deployments import Gateway
from prima_ray.serving.engine import Unavailable
from prima_ray.serving.keys import add_key


class _Engine:
    """Applications that answer when they are let."""

    def __init__(self) -> None:
        self.live = ""
        self.may = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        return not self.live

    async def use(self, app: str) -> None:
        if app == "away":
            raise Unavailable("no answer within 30 s", reason="timeout")
        await self.may.wait()
        if app == "broken":
            raise PrimaError("the known exam is not answered as at training time")
        self.live = app


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    logger = logging.getLogger("prima_ray")
    before = logger.handlers[:], logger.level, logger.propagate
    add_key(tmp_path / "keys", "clinic")
    yield Gateway(ServingConfig(), str(tmp_path / "keys"), None)
    logger.handlers[:], logger.level, logger.propagate = before


def test_another_model_is_looked_at_beside_the_requests(gateway: Gateway) -> None:
    async def story() -> list[str]:
        engine = gateway.engine = _Engine()  # type: ignore[assignment]
        engine.may.set()
        await gateway.reconfigure({"model": "a"})
        seen = [engine.live]
        engine.may.clear()
        for name in ("b", "broken"):
            # Serve sends no request until this returns, however long the other model takes.
            await gateway.reconfigure({"model": name})
            await asyncio.sleep(0)
            seen.append(engine.live)
        engine.may.set()
        assert gateway._switch is not None
        await gateway._switch
        return [*seen, engine.live]

    # The last name counts: b was never asked.
    assert asyncio.run(story()) == ["a", "a", "a", "a"]
    assert b'prima_switches_total{outcome="refused"} 1.0' in gateway._metrics.text()


def test_the_first_model_has_to_be_there(gateway: Gateway) -> None:
    gateway.engine = _Engine()  # type: ignore[assignment]
    with pytest.raises(Unavailable, match="no answer within 30 s"):
        asyncio.run(gateway.reconfigure({"model": "away"}))


def test_a_fallback_is_asked_where_the_first_model_is_refused(gateway: Gateway) -> None:
    engine = gateway.engine = _Engine()  # type: ignore[assignment]
    engine.may.set()
    asyncio.run(gateway.reconfigure({"model": "broken", "fallback": "a"}))
    assert engine.live == "a"
    assert b'prima_switches_total{outcome="refused"} 1.0' in gateway._metrics.text()


def test_requests_are_logged_where_nobody_has_set_logging_up() -> None:
    program = (
        "from prima_ray.serving.records import lines_to_stderr, log_request\n"
        "lines_to_stderr(); lines_to_stderr(); log_request(request_id='r', status=200)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert {"request_id": "r", "status": 200}.items() <= json.loads(line).items()
