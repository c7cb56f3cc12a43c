"""Rank 0's pen: writes checkpoints, beside training where asked for.

The state is on the CPU and nobody else's when it comes here, so serialising, hashing and uploading it needs nothing of
the training thread. A checkpoint counts when its manifest stands, and only then becomes `saved_step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from prima_ray.base import PrimaError
from prima_ray.training.checkpoint import Origin, Progress, save_checkpoint
from prima_ray.training.config import CheckpointConfig
from prima_ray.training.engine import State

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """One at a time: a `save` waits for the one before it.

    Args:
        folder: the run's `checkpoints/`, a path or a URI.
        before: called in the writing thread before the state goes out: what must not be behind it.
        saved_step: the checkpoint that training goes on from; 0 for none.
    """

    def __init__(
        self,
        folder: str,
        config: CheckpointConfig,
        origin: Origin,
        *,
        before: Callable[[], None] | None = None,
        saved_step: int = 0,
    ) -> None:
        self._folder, self._config, self._origin, self._before = folder, config, origin, before
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if config.asynchronous else None
        self._pending: Future[None] | None = None
        self.saved_step = saved_step

    def save(self, state: State, progress: Progress) -> None:
        """Write a checkpoint, or begin to. ``state`` must not be changed any more.

        Raises:
            PrimaError: this one cannot be written, or the one before could not.
        """
        self.wait()
        if self._thread is None:
            self._write(state, progress)
        else:
            self._pending = self._thread.submit(self._write, state, progress)

    @property
    def failed(self) -> bool:
        """A write that was begun has failed, and nobody has been told: `wait` will."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Until what was begun is committed.

        Raises:
            PrimaError: it could not be written. Told once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """As `wait`, on the way out of something worse: a failure is only logged."""
        try:
            self.wait()
        except PrimaError as error:
            _log.warning("%s", error)
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, state: State, progress: Progress) -> None:
        if self._before:
            self._before()
        save_checkpoint(self._folder, state, progress, keep_last=self._config.keep_last, origin=self._origin)
        self.saved_step = progress.step
