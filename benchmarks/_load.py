"""Clients of an endpoint: each asks again as soon as it is answered. A process of its own.

python benchmarks/_load.py URL BODY.json --clients 16 --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp


async def drive(
    url: str, body: bytes, *, clients: int, seconds: float, enough: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Statuses (0: no answer at all) and times of what was asked in so many seconds, or until it is enough; `trace`: of
    each request the seconds until it ended, how many it took, and its status."""
    statuses: Counter[int] = Counter()
    times: list[float] = []
    trace: list[tuple[float, float, int]] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        began = time.perf_counter()
        end = began + seconds

        async def one() -> None:
            while time.perf_counter() < end and not enough():
                started = time.perf_counter()
                try:
                    async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
                        await response.read()
                        statuses[response.status] += 1
                        ended = time.perf_counter()
                        trace.append((ended - began, ended - started, response.status))
                        if response.status == 200:
                            times.append(ended - started)
                        elif response.status in (429, 503):
                            await asyncio.sleep(0.2)
                except (aiohttp.ClientError, TimeoutError):
                    statuses[0] += 1
                    ended = time.perf_counter()
                    trace.append((ended - began, ended - started, 0))

        await asyncio.gather(*(one() for _ in range(clients)))
        took = time.perf_counter() - began
    return {"statuses": dict(statuses), "trace": trace, **figures(times, took)}


def figures(times: list[float], took: float) -> dict[str, float]:
    """Answers a second, and the median and 99th percentile of their times in milliseconds."""
    cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [float("nan")] * 99
    return {"exams/s": len(times) / took, "p50 ms": 1000 * cuts[49], "p99 ms": 1000 * cuts[98]}


def run(url: str, body: Path, *, clients: int, seconds: float) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, url, str(body), "--clients", str(clients), "--seconds", str(seconds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("body", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    found = asyncio.run(drive(given.url, given.body.read_bytes(), clients=given.clients, seconds=given.seconds))
    found.pop("trace")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
