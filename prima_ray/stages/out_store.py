"""A run directory on an object store, worked on in a local copy of its small files.

Whoever opens it holds a lease: an object that its owner writes anew every few seconds. A store has no locks that end
with their holder, so one that is not renewed while somebody watches is taken over. Two processes that begin within the
same second may both believe to have it, since pyarrow cannot write "only where there is none"; the one that wrote last
keeps it, and the other is refused when it finishes, at the latest.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from prima_ray.base import PrimaError, StrictConfig, json_text
from prima_ray.data.run_record import CONFIG, RECORD
from prima_ray.data.schema import split
from prima_ray.data.storage import Folder, WorkingCopy, reaching, reason
from prima_ray.stages.rundir import RunDir, open_run
from prima_ray.training.loop import KEPT_APART

_log = logging.getLogger(__name__)
LEASE = ".lease.json"
BEAT_S = 10.0
"""A lease is renewed so often, and given up by its watchers after three times as long."""
_MISSED = 3
_SETTLE_S = 1.0
"""Between writing a lease and believing it."""


@contextmanager
def open_on_store(
    config: StrictConfig,
    *,
    out: str,
    stage: str,
    execution_keys: frozenset[str] = frozenset(),
    prepared: Collection[str] = (),
) -> Iterator[RunDir]:
    """As `out_lock.open_alone`, for an address on an object store.

    Raises:
        PrimaError: as there; or the store cannot be reached.
    """
    store = Folder.at(out.rstrip("/"))
    with tempfile.TemporaryDirectory(prefix="prima-run-") as aside, leased(store) as lease:
        local = Path(aside) / (split(out)[1] or "run")
        files = WorkingCopy(local, store, without=(*KEPT_APART, LEASE))
        with reaching(out, "`out` cannot be reached"):
            there = {name.split("/")[0] for name in store.files()} - {LEASE}
        if there and CONFIG not in there:
            raise PrimaError(
                "`out` exists and is no run directory (it has no config.yaml)", where=out, mend="Choose another `out`."
            )
        _bring(files, there)
        try:
            run = open_run(config, out=str(local), stage=stage, execution_keys=execution_keys)
        except PrimaError as error:
            raise PrimaError(error.what, where=out, mend=error.mend) from None
        run = RunDir(path=run.path, stage=stage, finished=run.finished, files=files, check=lease.check)
        run.push()
        try:
            yield run
        except PrimaError:
            if not there:
                _give_up(store, {CONFIG, *prepared})
            raise


def _bring(files: WorkingCopy, there: set[str]) -> None:
    """All small files of a run that goes on; of a finished one what says so."""
    if RECORD not in there:
        files.pull()
        return
    with reaching(files.store.address, "cannot be read"):
        for name in (CONFIG, RECORD):
            files.fetch(name)


def _give_up(store: Folder, prepared: set[str]) -> None:
    """Empty a folder in which no work has begun: it would refuse the mended config as another one."""
    with suppress(OSError):
        names = [name for name in store.files() if name != LEASE]
        if {name.split("/")[0] for name in names} <= prepared:
            for name in names:
                store.remove(name)


class Lease:
    """Held by this process until `release`."""

    def __init__(self, store: Folder) -> None:
        self._store, self._owner = store, uuid.uuid4().hex
        self._beats, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Wait until nobody renews the lease, and write our own.

        Raises:
            PrimaError: somebody does.
        """
        seen = self._read()
        if seen is not None:
            _log.info(
                "%s: %s was working here; looking for up to %.0f s whether it still does",
                self._store.address,
                f"process {seen.get('pid')} on {seen.get('host')}",
                _MISSED * BEAT_S,
            )
        deadline = time.monotonic() + _MISSED * BEAT_S
        while seen is not None and time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_S / 4))
            now = self._read()
            if now is not None and now != seen:
                raise self._taken(now)
            seen = now
        self._write()
        time.sleep(min(_SETTLE_S, BEAT_S))
        self.check()
        self._thread.start()

    def check(self) -> None:
        """The lease must still be ours.

        Raises:
            PrimaError: another process has taken it.
        """
        found = self._read()
        if found is None or found.get("owner") != self._owner:
            raise self._taken(found or {})

    def release(self) -> None:
        """Give it back, if it is still ours."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(PrimaError, OSError):
            self.check()
            self._store.remove(LEASE)

    def _renew(self) -> None:
        while not self._done.wait(BEAT_S):
            try:
                self.check()
                self._write()
            except PrimaError as error:
                _log.warning("%s", error)

    def _read(self) -> dict[str, Any] | None:
        with reaching(self._store.address, "`out` cannot be reached"):
            try:
                found = json.loads(self._store.read(LEASE))
            except FileNotFoundError:
                return None
            except ValueError:
                return {}  # half of one: its writer was killed, or is writing
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        self._beats += 1
        known = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "beat": self._beats}
        try:
            self._store.write(LEASE, json_text(known).encode())
        except (OSError, pa.ArrowException) as error:
            raise PrimaError(f"`out` cannot be written to ({reason(error)})", where=self._store.address) from None

    def _taken(self, found: dict[str, Any]) -> PrimaError:
        holder = f" (process {found['pid']} on {found['host']})" if {"pid", "host"} <= set(found) else ""
        return PrimaError(
            f"another process is working in this folder{holder}",
            where=self._store.address,
            mend="Wait for it to end, or choose another `out`.",
        )


@contextmanager
def leased(store: Folder) -> Iterator[Lease]:
    """The folder is this process's until the block ends.

    Raises:
        PrimaError: another process renews its lease, or the store cannot be reached.
    """
    lease = Lease(store)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()
