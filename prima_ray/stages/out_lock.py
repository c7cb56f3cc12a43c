"""A run directory that one process works in: opened, locked, and given up where nothing came of it.

The lock is the kernel's, on a file in the folder: it goes with the process, however that ends, so that a killed run
can be taken up at once. The file goes too when the work ends; one that a killed process left is as good as none.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, StrictConfig, is_uri
from prima_ray.data.fetched import local_copy
from prima_ray.data.run_record import CONFIG, RECORD
from prima_ray.data.storage import Folder
from prima_ray.stages.rundir import RunDir, is_fresh, open_run

_fcntl: Any = None
with suppress(ImportError):  # where it is missing (not a POSIX system), nobody is kept out
    _fcntl = import_module("fcntl")

LOCK = ".lock"


class InUseError(PrimaError):
    """Another process is working in the folder."""


@contextmanager
def open_alone(
    config: StrictConfig,
    *,
    out: str,
    stage: str,
    execution_keys: frozenset[str] = frozenset(),
    prepared: Collection[str] = (),
) -> Iterator[RunDir]:
    """`open_run`, and the folder is this process's until the block ends.

    Where a `PrimaError` ends the block and nothing but ``prepared`` was written, the folder is as it was before: it
    would refuse the mended config as another one.

    Args:
        prepared: files and folders that are written before the work begins and say nothing without it.

    Raises:
        PrimaError: as `open_run`; another process is working in the folder, or it cannot be written to.
    """
    if is_uri(out) and not Folder.at(out).is_local:
        from prima_ray.stages.out_store import open_on_store

        with open_on_store(config, out=out, stage=stage, execution_keys=execution_keys, prepared=prepared) as on_store:
            yield on_store
        return
    out = str(local_copy(out))
    fresh, made = is_fresh(out), not Path(out).exists()
    given_up = False
    run = open_run(config, out=out, stage=stage, execution_keys=execution_keys)
    try:
        with locked(run) as (mine, is_locked):
            try:
                yield mine
            except PrimaError:
                given_up = fresh and is_locked and _give_up(run.path, prepared)
                raise
    finally:
        if given_up and made:
            with suppress(OSError):  # somebody else has begun in it
                run.path.rmdir()


@contextmanager
def locked(run: RunDir) -> Iterator[tuple[RunDir, bool]]:
    """An opened run that is this process's until the block ends, and whether a lock could be had.

    Raises:
        PrimaError: another process is working in the folder, or it cannot be written to.
    """
    handle = _lock(run)
    try:
        # The process that held the lock may have finished the run since it was opened.
        yield replace(run, finished=(run.path / RECORD).exists()), handle is not None
    finally:
        if handle is not None:
            (run.path / LOCK).unlink(missing_ok=True)
            os.close(handle)


def _lock(run: RunDir) -> int | None:
    """The lock file's descriptor, which no program that is started inherits; None where locks cannot be had."""
    if _fcntl is None:
        return None
    path = run.path / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise _gone(run.path) from None
        except OSError as error:
            if run.finished:
                # A finished run may lie where nothing can be written.
                return None
            raise PrimaError(f"`out` cannot be written to ({error.strerror})", where=run.path) from None
        try:
            _fcntl.flock(handle, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InUseError(
                "another process is working in this folder",
                where=run.path,
                mend="Wait for it to end, or choose another `out`.",
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        if _is_at(path, handle):
            break
        # Its holder removed the file between the two calls.
        os.close(handle)
    if not (run.path / CONFIG).exists():
        path.unlink(missing_ok=True)
        os.close(handle)
        raise _gone(run.path)
    return handle


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _gone(path: Path) -> PrimaError:
    return PrimaError("another process gave this folder up just now", where=path, mend="Run the stage again.")


def _give_up(path: Path, prepared: Collection[str]) -> bool:
    """Empty a folder in which no work has begun; False where it has."""
    found = {item.name for item in path.iterdir()}
    if not found <= {CONFIG, LOCK, *prepared}:
        return False
    for name in found & set(prepared):
        item = path / name
        if item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink()
    (path / CONFIG).unlink(missing_ok=True)
    return True
