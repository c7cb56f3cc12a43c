"""A folder on any pyarrow filesystem: a local disk, an NFS mount, or an object store (``s3://``, ``gs://``).

Object stores have no rename, no append and no lock: what is written here is whole files, put where they stay, and
whoever needs "all or nothing" writes a manifest last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
from pyarrow import fs as pafs

from prima_ray.base import PrimaError, is_uri, write_atomic
from prima_ray.data.schema import join, open_filesystem

_PIECE = 1 << 22


@dataclass(frozen=True)
class Folder:
    """A folder that need not exist yet. Names of files are relative to it, with ``/``."""

    address: str
    """As a user writes it: a path, or a URI."""
    filesystem: pafs.FileSystem
    root: str
    """The folder's path on its filesystem."""

    @classmethod
    def at(cls, address: str | Path) -> Self:
        """The folder that a path or a URI names.

        Raises:
            PrimaError: the URI's scheme is unknown.
        """
        text = str(address)
        filesystem, root = open_filesystem(text)
        return cls(text, filesystem, root.rstrip("/") or root)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def path(self) -> Path:
        """The local path; only where `is_local`."""
        return Path(self.root)

    def folder(self, name: str) -> Folder:
        """A folder inside of this one."""
        return Folder(join(self.address, name), self.filesystem, join(self.root, name))

    def where(self, name: str) -> str:
        """The address of a file, for messages."""
        return join(self.address, name)

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """A file's bytes; None where there is no such file."""
        found: pafs.FileInfo = self.filesystem.get_file_info(join(self.root, name))
        size: int | None = found.size if found.type == pafs.FileType.File else None
        return size

    def files(self, *, without: tuple[str, ...] = ()) -> dict[str, int]:
        """Name -> bytes of every file below; empty where there is no folder.

        Args:
            without: names of folders, at any depth, that are left out.
        """
        return {name: size for name, (size, _) in self.stamps(without=without).items()}

    def stamps(self, *, without: tuple[str, ...] = ()) -> dict[str, tuple[int, int | None]]:
        """As `files`, with the time of the last change in nanoseconds."""
        files = self._walk(without) if self.is_local else self._flat()
        found = {self._name(info): (info.size, info.mtime_ns) for info in files}
        return {
            name: stamp for name, stamp in sorted(found.items()) if not set(without).intersection(name.split("/")[:-1])
        }

    def folders(self) -> list[str]:
        """Names of the folders directly below; on a store, of those that hold a file."""
        if self.is_local:
            return sorted(info.base_name for info in self._list(self.root) if info.type == pafs.FileType.Directory)
        return sorted({name.split("/")[0] for name in map(self._name, self._flat()) if "/" in name})

    def is_empty(self) -> bool:
        """It holds nothing, or is not there."""
        return not (self._list(self.root) if self.is_local else self._flat())

    def _walk(self, without: tuple[str, ...]) -> Iterator[pafs.FileInfo]:
        waiting = [self.root]
        while waiting:
            for info in self._list(waiting.pop()):
                if info.type == pafs.FileType.File:
                    yield info
                elif info.base_name not in without:
                    waiting.append(info.path)

    def _flat(self) -> list[pafs.FileInfo]:
        """All files of a store's folder: it has names with slashes and no folders, and pyarrow's view of Google's shows
        none."""
        return [info for info in self._list(self.root, recursive=True) if info.type == pafs.FileType.File]

    def _list(self, root: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        return list(self.filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=recursive)))

    def _name(self, info: pafs.FileInfo) -> str:
        # Some filesystems answer with a slash in front that was not asked with.
        name: str = info.path.lstrip("/").removeprefix(self.root.lstrip("/") + "/")
        return name

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """
        with self.filesystem.open_input_stream(join(self.root, name)) as stream:
            data: bytes = stream.read()
        return data

    def write(self, name: str, data: bytes) -> None:
        """A small file: a reader sees the old content or the new, never a part of it.

        Raises:
            OSError: it cannot be written.
        """
        if self.is_local:
            write_atomic(self.path / name, data)
            return
        with self.filesystem.open_output_stream(join(self.root, name)) as stream:
            stream.write(data)

    def upload(self, source: Path, name: str) -> None:
        """Put a copy of a local file here, in pieces.

        Raises:
            OSError: it cannot be written.
        """
        target = join(self.root, name)
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as file, self.filesystem.open_output_stream(target) as stream:
            while piece := file.read(_PIECE):
                stream.write(piece)

    def download(self, name: str, target: Path) -> str:
        """Bring a file to a local path, in pieces; returns its SHA-256 (hex).

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read, or not be written there.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(join(self.root, name)) as stream, target.open("wb") as file:
            while piece := stream.read(_PIECE):
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """A file; nothing where there is none."""
        try:
            self.filesystem.delete_file(join(self.root, name))
        except FileNotFoundError:
            return

    def remove_folder(self, name: str) -> None:
        """A folder with all that is in it; nothing where there is none."""
        path = join(self.root, name)
        # Asked first: of a folder that is not there Google's store says no more than that something went wrong.
        if self.filesystem.get_file_info(path).type == pafs.FileType.NotFound:
            return
        try:
            self.filesystem.delete_dir(path)
        except FileNotFoundError:
            return


class WorkingCopy:
    """The small files of a folder on a store, as local files: pulled when work begins, pushed where they changed.

    Not for what is large or has an order of its own: checkpoints, and the file that commits the folder.

    Args:
        local: an existing folder, for this process alone.
        without: names of folders and files, at any depth, that neither come nor go.
    """

    def __init__(self, local: Path, store: Folder, *, without: tuple[str, ...] = ()) -> None:
        self.local, self.store, self.without = local, store, without
        self._known: dict[str, tuple[int, int]] = {}
        """Size and time of change of every local file that the store has."""

    def pull(self, *, folders: bool = True) -> None:
        """Bring what is not here, or was brought before and is another size by now.

        Args:
            folders: False leaves the folders there, and what is in them.

        Raises:
            PrimaError: the store cannot be reached.
        """
        with reaching(self.store.address, "cannot be read"):
            left = self.without if folders else tuple(self.store.folders())
            for name, size in self.store.files(without=left).items():
                path, known = self.local / name, self._known.get(name)
                here = path.exists() and (known is None or known[0] == size)
                if not here and name not in self.without:
                    self.fetch(name)

    def fetch(self, name: str) -> None:
        """One file; raises what the filesystem raises."""
        self.store.download(name, self.local / name)
        self._known[name] = _stamp(self.local / name)

    def push(self) -> None:
        """Bring every file there that has changed, or is new.

        Raises:
            PrimaError: the store cannot be written to.
        """
        with reaching(self.store.address, "cannot be written to"):
            for path in sorted(item for item in self.local.rglob("*") if item.is_file()):
                name = path.relative_to(self.local).as_posix()
                if set(self.without) & set(name.split("/")):
                    continue
                stamp = _stamp(path)  # before it is read: what is appended meanwhile goes with the next push
                if self._known.get(name) != stamp:
                    self.store.upload(path, name)
                    self._known[name] = stamp


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def reason(error: BaseException) -> str:
    """What a library says of a failed read or write, in one line."""
    if isinstance(error, OSError) and error.errno and error.strerror and not isinstance(error, pa.ArrowException):
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def reaching(address: str, what: str) -> Iterator[None]:
    """A failure of a filesystem inside becomes a `PrimaError` about ``address``: ``what`` and the reason.

    Raises:
        PrimaError: see above.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        mend = "Check the address and the credentials; `AWS_ENDPOINT_URL` names a store other than Amazon's."
        raise PrimaError(f"{what} ({reason(error)})", where=address, mend=mend if is_uri(address) else None) from None
