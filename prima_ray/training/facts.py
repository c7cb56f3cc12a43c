"""What a machine has, as the checks see it: observed here, or by a task on a node of the cluster.

No torch and no Ray: a node answers as soon as a worker of Ray's has started.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import socket
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from prima_ray.base import PrimaError, is_uri
from prima_ray.data.storage import Folder, reason
from prima_ray.training.engine_build import compiler_name, extensions_folder, op_is_built

BuildState = Literal["whole", "running", "broken off"]
SHM = Path("/dev/shm")  # noqa: S108 - the memory that Ray's object store lies in, no temporary file
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class FolderState:
    """Whether something could be written into a folder, or where it would be made."""

    address: str
    """As the config resolves it."""
    error: str | None = None
    """Why nothing could be written."""
    free_bytes: int | None = None
    """None on an object store."""
    total_bytes: int | None = None


@dataclass(frozen=True)
class Build:
    """An operation in torch's folder of compiled extensions."""

    path: str
    state: BuildState


@dataclass(frozen=True)
class Facts:
    """One machine."""

    host: str
    python: str
    packages: dict[str, str] = field(default_factory=dict)
    """Version by name, of those that are required; one that is missing has none."""
    memory_bytes: int | None = None
    """What this machine or container may use; None where the system does not say."""
    available_bytes: int | None = None
    shm_bytes: int | None = None
    """Size of /dev/shm; None where there is none."""
    compiler: str | None = None
    """Path of the C++ compiler."""
    op_is_built: bool = False
    """DeepSpeed's communication op for CPUs."""
    builds: tuple[Build, ...] = ()
    folders: tuple[FolderState, ...] = ()
    missing: tuple[str, ...] = ()
    """Inputs that are not there."""


def observe(folders: Sequence[str] = (), inputs: Sequence[str] = (), *, probe: str = "") -> Facts:
    """What there is on this machine.

    Args:
        folders: a file of the name ``probe`` is written into each of them and left for `sweep`.
        inputs: local paths that have to be there.
    """
    memory, available = _memory()
    return Facts(
        host=socket.gethostname(),
        python=platform.python_version(),
        packages=_installed(),
        memory_bytes=memory,
        available_bytes=available,
        shm_bytes=shutil.disk_usage(SHM).total if SHM.is_dir() else None,
        compiler=shutil.which(compiler_name()),
        op_is_built=op_is_built(),
        builds=_builds(extensions_folder()),
        folders=tuple(_write_probe(address, probe) for address in folders),
        missing=tuple(path for path in inputs if not is_uri(path) and not Path(path).exists()),
    )


def requirements() -> tuple[list[Requirement], SpecifierSet]:
    """What the package needs on this platform, without extras, and the Python it runs on."""
    try:
        about = importlib.metadata.metadata("prima_ray")
        listed, python = about.get_all("Requires-Dist") or [], about["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        # A checkout on the path, as `ray job submit --working-dir` makes one.
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        listed, python = project["dependencies"], project["requires-python"]
    found = [Requirement(item) for item in listed]
    needed = [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]
    return needed, SpecifierSet(python)


def _installed() -> dict[str, str]:
    found = {}
    for item in requirements()[0]:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[item.name] = importlib.metadata.version(item.name)
    return found


def existing_folder(path: str | Path) -> Path:
    """The folder itself, or the nearest above it that is there: where it would be made."""
    whole = Path(path).absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.exists())


def probe_folder(address: str) -> Folder:
    """Where a probe of ``address`` is written."""
    folder = Folder.at(address)
    return Folder.at(existing_folder(folder.path)) if folder.is_local else folder


def _write_probe(address: str, probe: str) -> FolderState:
    # The driver has found out where the folder would be made: on a node that has less of it, nothing is shared.
    try:
        folder = Folder.at(address)
        if folder.is_local and not folder.path.is_dir():
            return FolderState(address, error="no such folder" if not folder.path.exists() else "it is a file")
        if probe:
            folder.write(probe, b"prima doctor\n")
    except (OSError, PrimaError) as error:
        return FolderState(address, error=error.what if isinstance(error, PrimaError) else reason(error))
    if not folder.is_local:
        return FolderState(address)
    usage = shutil.disk_usage(folder.path)
    return FolderState(address, free_bytes=usage.free, total_bytes=usage.total)


def sweep(folders: Sequence[str], probe: str) -> None:
    """Take the probes away again."""
    for address in folders:
        with suppress(OSError, PrimaError):
            Folder.at(address).remove(probe)


def _builds(folder: Path | None) -> tuple[Build, ...]:
    """Operations that were, or are being, compiled: torch keeps a `lock` beside each."""
    if folder is None:
        return ()
    found = []
    with suppress(OSError):
        for lock in sorted(folder.glob("*/lock")):
            whole = any(lock.parent.glob("*.so"))
            state: BuildState = "running" if is_held(lock) else "whole" if whole else "broken off"
            found.append(Build(str(lock), state))
    return tuple(found)


def is_held(lock: Path) -> bool:
    """Whether a process holds the kernel's lock on a file."""
    try:
        fcntl: Any = import_module("fcntl")
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _memory() -> tuple[int | None, int | None]:
    """Bytes in all and available, a container's limit counted in."""
    if not _MEMINFO.exists():
        return None, None
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE))
    total, available = int(lines["MemTotal"]) * 1024, int(lines["MemAvailable"]) * 1024
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):
            limit = int(path.read_text())
            total, available = min(total, limit), min(available, limit)
    return total, available
