"""When waiting requests go in to a model that answers one batch at a time. No Ray."""

from __future__ import annotations

import asyncio


class Turns:
    """Requests wait while a batch is computed and then go in together.

    Under load those who have just been answered ask again within a moment, and would find the next batch gone without
    them: after a batch of several it is held back for a part of the time that the batch took, or until as many wait as
    were there. After a batch of one nobody waits.
    """

    def __init__(self, *, max_size: int, linger: float) -> None:
        """
        Args:
            max_size: requests a batch.
            linger: the part, 0 to 1, of a batch's time that the next one is held back for at most.
        """
        self._max_size, self._linger = max_size, linger
        self._free = asyncio.Event()
        self._free.set()
        self._waiting = 0
        self._wanted = 0
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self) -> None:
        """Returns when the next batch may go in: at once where none is under way or held back."""
        self._waiting += 1
        try:
            if self._timer is not None and self._waiting >= self._wanted:
                self._open()
            await self._free.wait()
        finally:
            self._waiting -= 1

    def begin(self) -> None:
        """A batch has gone in."""
        self._stop_timer()
        self._free.clear()

    def end(self, size: int, seconds: float) -> None:
        """A batch is answered.

        Args:
            size: its requests.
            seconds: that it took.
        """
        self._wanted = min(self._max_size, size + self._waiting)
        if size > 1 and self._linger and self._waiting < self._wanted:
            self._timer = asyncio.get_running_loop().call_later(self._linger * seconds, self._open)
        else:
            self._open()

    def _open(self) -> None:
        self._stop_timer()
        self._free.set()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
