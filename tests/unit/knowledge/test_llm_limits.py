"""Requests and tokens a minute, on a clock that does not run by itself."""

from __future__ import annotations

import threading

import pytest

from prima_ray.knowledge.llm_limits import RateLimiter, StoppedError


class Clock(threading.Event):
    """A clock that goes on as somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        self.now += timeout or 0.0
        return self.is_set()


def limiter(requests: int | None = None, tokens: int | None = None) -> tuple[RateLimiter, Clock]:
    clock = Clock()
    return RateLimiter(requests, tokens, stop=clock, clock=clock), clock


def test_without_limits_nobody_waits() -> None:
    limits, clock = limiter()
    for _ in range(1000):
        limits.wait(10**6)
    assert clock.waits == []


def test_requests_a_minute() -> None:
    limits, clock = limiter(requests=3)
    begun = []
    for _ in range(8):
        limits.wait(1)
        begun.append(clock.now - 1000)
        clock.now += 10
    assert begun == [0, 10, 20, 60, 70, 80, 120, 130]


def test_tokens_a_minute_are_corrected_when_they_are_known() -> None:
    limits, clock = limiter(tokens=100)
    ticket = limits.wait(60)
    limits.wait(40)
    assert clock.waits == []
    limits.settle(ticket, 10)
    limits.wait(50)
    assert clock.waits == []
    limits.wait(20)
    assert clock.waits == [60.0]


def test_a_call_beyond_the_limit_goes_alone() -> None:
    limits, clock = limiter(tokens=100)
    limits.wait(500)
    assert clock.waits == []
    limits.wait(1)
    assert clock.waits == [60.0]


def test_while_closed_nobody_calls() -> None:
    limits, clock = limiter()
    limits.close(30)
    limits.close(5)
    limits.wait(1)
    assert clock.waits == [30.0]


def test_who_waits_can_be_stopped() -> None:
    limits, clock = limiter(requests=1)
    limits.wait(1)
    clock.set()
    with pytest.raises(StoppedError):
        limits.wait(1)
