"""A folder of photos, and how an image id finds its file in it. Listed once; nothing is opened.

On a local disk links are looked at: a photo must lie in the folder that the config names, whatever a link says.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs as pafs

from prima_ray.base import PrimaError
from prima_ray.data.rejection import RecordRejected
from prima_ray.data.schema import open_filesystem

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
_OTHER_SUFFIXES = (".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".heic", ".dcm", ".dicom")
"""What an image id may end in without its being part of the stem: `1.5` ends in no suffix, `1.tif` does."""
_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class PhotoFile:
    """A file in the folder."""

    path: str
    """Relative to the folder, ``/`` between."""
    size: int
    modified_ns: int
    leaves: bool = False
    """A link to somewhere outside the folder."""

    @property
    def is_photo(self) -> bool:
        return self.path.lower().endswith(PHOTO_SUFFIXES)


class PhotoFolder:
    """The files of a folder by stem.

    Args:
        files: of the folder and its subfolders.
        closed: linked subfolders that were not entered, relative to the folder.
    """

    def __init__(self, files: Iterable[PhotoFile], closed: Collection[str] = ()) -> None:
        self._closed = frozenset(closed)
        self._by_stem: dict[str, list[PhotoFile]] = defaultdict(list)
        for file in files:
            self._by_stem[posixpath.splitext(file.path)[0]].append(file)

    @property
    def photos(self) -> Iterator[PhotoFile]:
        """Files that are photos by their names."""
        return (file for files in self._by_stem.values() for file in files if file.is_photo)

    def find(self, image_id: str) -> PhotoFile:
        """The file that an image id names: by its stem, whatever the extension; the exact name wins.

        Raises:
            RecordRejected: `path_outside`, `no_photo` or `ambiguous_photo`.
        """
        name = image_id.replace("\\", "/")
        if name.startswith("/") or _DRIVE.match(name) or ".." in name.split("/"):
            raise RecordRejected("path_outside", "the image id leaves the image folder")
        name = posixpath.normpath(name)
        found = list(self._by_stem.get(name, ()))
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in PHOTO_SUFFIXES + _OTHER_SUFFIXES:
            found += self._by_stem.get(stem, ())
        found = (
            [file for file in found if file.path == name]
            or [file for file in found if file.is_photo]
            # A file of another kind is better named as no photo than as not there.
            or found
        )
        if not found:
            if any(parent in self._closed for parent in _parents(name)):
                raise RecordRejected("path_outside", "a folder on the way is a link, which source.follow_links forbids")
            raise RecordRejected("no_photo", "no file of this name in the image folder")
        if len(found) > 1:
            names = ", ".join(sorted(file.path for file in found))
            raise RecordRejected("ambiguous_photo", f"several files of this name: {names}")
        if found[0].leaves:
            raise RecordRejected(
                "path_outside", "the file is a link that leaves the image folder, which source.follow_links forbids"
            )
        return found[0]


def _parents(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path


def list_photos(folder: str, *, follow_links: bool = False) -> PhotoFolder:
    """List a folder and its subfolders, on any filesystem. Names that start with a dot are left out.

    Args:
        follow_links: on a local disk, also enter linked folders and take files whose link leaves the folder.

    Raises:
        PrimaError: no such folder, or it cannot be listed.
    """
    filesystem, root = open_filesystem(folder)
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return _list_local(root, follow_links=follow_links)
        infos = filesystem.get_file_info(pafs.FileSelector(root.rstrip("/"), recursive=True))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "no such folder" if isinstance(error, FileNotFoundError) else "is a file, not a folder of photos"
        raise PrimaError(what, where=folder, mend="Check source.images.") from None
    except (OSError, pa.ArrowException) as error:
        raise PrimaError(f"cannot be listed ({' '.join(str(error).split())})", where=folder) from None
    # Some stores list with a leading slash what was asked for without one.
    start = len(root.strip("/")) + 1
    return PhotoFolder(
        PhotoFile(info.path.lstrip("/")[start:], info.size or 0, info.mtime_ns or 0)
        for info in infos
        if info.type == pafs.FileType.File and not info.base_name.startswith(".")
    )


def _list_local(root: str, *, follow_links: bool) -> PhotoFolder:
    real_root = os.path.realpath(root)
    files: list[PhotoFile] = []
    closed: list[str] = []
    entered = {real_root}
    waiting = [(root, "")]
    while waiting:
        folder, prefix = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                # Arrow's paths are UTF-8: a name that is not is shown escaped, and cannot be opened.
                relative = (prefix + entry.name).encode(errors="backslashreplace").decode()
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    if entry.is_symlink():
                        real = os.path.realpath(entry.path)
                        if not follow_links:
                            closed.append(relative)
                            continue
                        if real in entered:
                            continue
                        entered.add(real)
                    waiting.append((entry.path, f"{relative}/"))
                elif _is_regular(entry):
                    stat = entry.stat()
                    leaves = not follow_links and entry.is_symlink() and _leaves(entry.path, real_root)
                    files.append(PhotoFile(relative, stat.st_size, stat.st_mtime_ns, leaves))
    return PhotoFolder(files, closed)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself; like a link to nothing it is no photo, and costs the others nothing.
        return False


def _is_regular(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _leaves(path: str, real_root: str) -> bool:
    return not os.path.realpath(path).startswith(os.path.join(real_root, ""))
