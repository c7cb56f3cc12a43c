"""Requests and tokens a minute, over a window that slides; shared by the threads that call."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_WINDOW_S = 60.0


class StoppedError(Exception):
    """The work was given up while this thread waited."""


@dataclass(slots=True)
class Ticket:
    """One call in the window."""

    at: float
    tokens: int


class RateLimiter:
    """Lets calls through as the limits allow.

    A call that is larger than the limit of tokens by itself goes when the window is empty.
    """

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        *,
        stop: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = requests
        self._tokens = tokens
        self._stop = stop
        self._clock = clock
        self._lock = threading.Lock()
        self._window: deque[Ticket] = deque()
        self._closed_until = 0.0

    def wait(self, tokens: int) -> Ticket:
        """Return when a call of so many tokens may begin.

        Raises:
            StoppedError: the work was given up.
        """
        while True:
            with self._lock:
                now = self._clock()
                pause_s = self._pause_s(now, tokens)
                if pause_s <= 0:
                    ticket = Ticket(now, tokens)
                    self._window.append(ticket)
                    return ticket
            self.sleep(pause_s)

    def _pause_s(self, now: float, tokens: int) -> float:
        while self._window and self._window[0].at <= now - _WINDOW_S:
            self._window.popleft()
        if now < self._closed_until:
            return self._closed_until - now
        full = self._requests is not None and len(self._window) >= self._requests
        if self._tokens is not None and self._window:
            full |= sum(item.tokens for item in self._window) + tokens > self._tokens
        return self._window[0].at + _WINDOW_S - now if full else 0.0

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """The call took so many tokens."""
        with self._lock:
            ticket.tokens = tokens

    def close(self, seconds: float) -> None:
        """Nobody calls for so long: the endpoint asked for it."""
        with self._lock:
            self._closed_until = max(self._closed_until, self._clock() + seconds)

    def sleep(self, seconds: float) -> None:
        """Wait.

        Raises:
            StoppedError: the work was given up.
        """
        if self._stop.wait(max(0.0, seconds)):
            raise StoppedError
