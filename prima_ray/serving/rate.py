"""How many requests a key may send: a token bucket each. One bucket store serves all replicas of an ingress."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from prima_ray.serving.config import RateConfig
from prima_ray.serving.engine import Unavailable

_MAX_BUCKETS = 10_000


class RateLimiter(Protocol):
    """Where requests are counted."""

    async def wait_s(self, key: str) -> float:
        """0 and one token less, or the seconds until there is one."""


class TokenBuckets:
    """Buckets in this process."""

    def __init__(self, config: RateConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Key -> (tokens, when they were counted)."""

    async def wait_s(self, key: str) -> float:
        return self.take(key)

    def take(self, key: str) -> float:
        """See `RateLimiter.wait_s`."""
        if self._config.per_minute is None:
            return 0.0
        rate, burst, now = self._config.per_minute / 60, float(self._config.burst), self._clock()
        tokens, counted = self._buckets.get(key, (burst, now))
        tokens = min(burst, tokens + (now - counted) * rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / rate
        self._buckets[key] = (tokens - (wait == 0), now)
        self._buckets.move_to_end(key)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return wait


class SharedLimiter:
    """Buckets in an actor of Serve's, one count for all replicas of an ingress."""

    def __init__(self, config: RateConfig, handle: Any) -> None:
        """
        Args:
            handle: of a deployment with `take`, see `deployments.Limiter`.
        """
        self._config, self._handle = config, handle

    async def wait_s(self, key: str) -> float:
        if self._config.per_minute is None:
            return 0.0
        try:
            found = await asyncio.wait_for(self._handle.take.remote(key), 2.0)
        except Exception:
            # Without a count nobody is let in: a limit that fails open is none.
            raise Unavailable("requests cannot be counted now", reason="limiter", retry_after_s=2.0) from None
        return float(found)
