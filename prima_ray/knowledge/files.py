"""Files of literature: a file, a folder or a pattern on any filesystem -> files in a fixed order, and their bytes.

Listed once, nothing opened. What is read of a file is bounded, also where it is compressed.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from prima_ray.base import PrimaError
from prima_ray.data.rejection import RecordRejected
from prima_ray.data.schema import open_filesystem

_WILD = re.compile(r"[*?\[]")
_PACKED = (".gz", ".bz2", ".zst", ".lz4")
CHUNK = 1 << 18
_KINDS = (
    (b"%PDF-", "a PDF"),
    (b"\x1f\x8b", "gzip data whose name does not end in .gz"),
    (b"PK\x03\x04", "a ZIP archive, as Word and EPUB files are"),
    (b"\xd0\xcf\x11\xe0", "an old Office file"),
    (b"{\\rtf", "an RTF file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"PAR1", "a Parquet file"),
    (b"<?xml", "XML"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read."""

    path: str
    """As the user would write it."""
    name: str
    """Relative to the folder that the config names, ``/`` between."""
    filesystem: pafs.FileSystem
    inner: str
    """The path in the filesystem."""
    leaves: bool = False
    """A link to somewhere outside the folder."""

    @property
    def suffix(self) -> str:
        """In lower case, without what only says how the file is packed: ``.jsonl`` of ``a.JSONL.gz``."""
        stem, suffix = posixpath.splitext(self.name.lower())
        return posixpath.splitext(stem)[1] if suffix in _PACKED else suffix

    @property
    def stem(self) -> str:
        """The name without folders and suffixes."""
        base = posixpath.basename(self.name)
        base, suffix = posixpath.splitext(base)
        return posixpath.splitext(base)[0] if suffix.lower() in _PACKED else base

    @contextmanager
    def open(self) -> Iterator[Any]:
        """A stream of the bytes, unpacked where the name ends in .gz or its like.

        Raises:
            RecordRejected: it cannot be opened or, while it is open, not be read.
        """
        try:
            with self.filesystem.open_input_stream(self.inner) as stream:
                yield stream
        except (OSError, pa.ArrowException) as error:
            raise RecordRejected("unreadable_file", " ".join(str(error).split())) from None

    def read(self, max_bytes: int, *, key: str) -> bytes:
        """All bytes.

        Args:
            key: the bound's name in the config.

        Raises:
            RecordRejected: unreadable, empty, or more bytes than that.
        """
        parts, size = [], 0
        with self.open() as stream:
            while size <= max_bytes and (part := stream.read(CHUNK)):
                parts.append(part)
                size += len(part)
        if size > max_bytes:
            raise RecordRejected("too_large", f"more than {max_bytes} bytes, the bound in {key}")
        if not size:
            raise RecordRejected("empty_file", "the file is empty")
        return b"".join(parts)


def find_files(path: str, suffixes: Sequence[str], *, key: str = "path") -> list[SourceFile]:
    """The file that ``path`` names, or what lies in the folder and its subfolders, or what matches the pattern.

    Of a folder only files with one of the suffixes are taken; a file or a pattern says what is wanted by itself. Names
    that start with a dot are left out, linked folders are not entered.

    Args:
        suffixes: of the format: ``.xml``, say, which stands for ``.xml.gz`` as well.
        key: of the config, for the message.

    Returns:
        Files sorted by name.

    Raises:
        PrimaError: there is no such file or folder, or nothing in it.
    """
    filesystem, inner = open_filesystem(path)
    try:
        kind = filesystem.get_file_info(inner).type
        if kind == pafs.FileType.File:
            return [SourceFile(path, posixpath.basename(inner), filesystem, inner)]
        if kind == pafs.FileType.Directory:
            found = [file for file in _in_folder(path, filesystem, inner) if file.suffix in suffixes]
            if not found:
                raise PrimaError(f"the folder holds no {' or '.join(suffixes)} file", where=path, mend=f"Check {key}.")
            return found
        if _WILD.search(inner):
            found = _matching(path, filesystem, inner)
            if not found:
                raise PrimaError("no file matches the pattern", where=path, mend=f"Check {key}.")
            return found
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise PrimaError(f"cannot be listed ({' '.join(str(error).split())})", where=path) from None
    raise PrimaError("no such file or folder", where=path, mend=f"Check {key}.")


def _in_folder(path: str, filesystem: pafs.FileSystem, inner: str) -> list[SourceFile]:
    head, mark, query = path.partition("?") if "://" in path else (path, "", "")
    names = _local_names(inner) if isinstance(filesystem, pafs.LocalFileSystem) else _names(filesystem, inner)
    return [
        SourceFile(
            path=posixpath.join(head, name) + mark + query,
            name=name,
            filesystem=filesystem,
            inner=posixpath.join(inner, name),
            leaves=leaves,
        )
        for name, leaves in sorted(names)
    ]


def _names(filesystem: pafs.FileSystem, folder: str) -> Iterator[tuple[str, bool]]:
    # Some stores list with a leading slash what was asked for without one.
    start = len(folder.strip("/")) + 1
    for info in filesystem.get_file_info(pafs.FileSelector(folder.rstrip("/"), recursive=True)):
        name = info.path.lstrip("/")[start:]
        if info.type == pafs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name, False


def _local_names(folder: str) -> Iterator[tuple[str, bool]]:
    inside = os.path.join(os.path.realpath(folder), "")
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            full = Path(root, name)
            if name.startswith(".") or not full.is_file():
                continue
            # Arrow's paths are UTF-8: a name that is not is shown escaped, and cannot be opened.
            relative = os.path.relpath(full, folder).encode(errors="backslashreplace").decode()
            yield relative, full.is_symlink() and not os.path.realpath(full).startswith(inside)


def _matching(path: str, filesystem: pafs.FileSystem, inner: str) -> list[SourceFile]:
    parts = inner.split("/")
    first = next(index for index, part in enumerate(parts) if _WILD.search(part))
    folder = "/".join(parts[:first]) or ("/" if inner.startswith("/") else ".")
    if filesystem.get_file_info(folder).type != pafs.FileType.Directory:
        return []
    # The folder as the user writes it: the pattern is as long there as in the filesystem.
    pattern = "/".join(parts[first:])
    head, _, query = path.partition(pattern)
    matches = _pattern(parts[first:])
    shown = (head or "./") + query
    return [file for file in _in_folder(shown, filesystem, folder) if matches.fullmatch(file.name)]


def _pattern(parts: Sequence[str]) -> re.Pattern[str]:
    """`*` and `?` stay within a folder, `**` is any number of folders."""
    text = ""
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == "**":
            text += ".*" if last else "(?:[^/]+/)*"
        else:
            text += _within_folder(part) + ("" if last else "/")
    return re.compile(text)


def _within_folder(part: str) -> str:
    text, rest = "", part
    while rest:
        if rest[0] == "*":
            text, rest = text + "[^/]*", rest[1:].lstrip("*")
        elif rest[0] == "?":
            text, rest = text + "[^/]", rest[1:]
        elif rest[0] == "[" and (end := rest.find("]", 2)) > 0:
            inside = rest[1:end].replace("\\", "\\\\")
            text += f"[^/{inside[1:]}]" if inside[0] == "!" else f"[{inside}]"
            rest = rest[end + 1 :]
        else:
            text, rest = text + re.escape(rest[0]), rest[1:]
    return text


def other_kind(head: bytes, *, but: Sequence[str] = ()) -> str | None:
    """What a file that begins like this is, where it is plainly no text; None where it may be.

    Args:
        but: kinds that are wanted.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:16].lower()
    # Signatures are compared in lower case; only text ones have letters whose case varies.
    return next((kind for mark, kind in _KINDS if kind not in but and start.startswith(mark.lower())), None)


def decode(data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark.

    Raises:
        RecordRejected: another encoding, or no text at all.
    """
    if data.startswith(_UTF16):
        raise RecordRejected("encoding", "UTF-16 text; save it as UTF-8: iconv -f utf-16 -t utf-8")
    if b"\0" in data:
        raise RecordRejected("not_text", "the file holds NUL bytes: it is not text, or UTF-16; text must be UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordRejected(
            "encoding",
            f"not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start}); "
            "save it as UTF-8: iconv -f latin1 -t utf-8, say",
        ) from None
