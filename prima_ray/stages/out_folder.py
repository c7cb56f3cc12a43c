"""Where ingest writes: a local folder, or an address on an object store.

On a store the shards are written in place by whoever makes them, and a run's small files are kept in a local copy of
the folder: pulled when it is opened, pushed one by one, in the order in which they make the run finished.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as pafs

from prima_ray.base import PrimaError
from prima_ray.data.run_record import CONFIG, RECORD
from prima_ray.data.schema import MANIFEST
from prima_ray.data.storage import Folder, reaching


@dataclass(frozen=True)
class OutFolder:
    """An opened folder."""

    address: str
    """As the shards' writers open it."""
    local: Path
    """The folder itself, or the copy of its small files."""
    folder: Folder

    @property
    def is_remote(self) -> bool:
        return not self.folder.is_local

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self.folder.filesystem

    @property
    def root(self) -> str:
        """The folder's path on its filesystem."""
        return self.folder.root

    def push(self, *names: str) -> None:
        """Bring files of the local copy to where they belong; nothing to do for a local folder."""
        if self.is_remote:
            for name in names:
                self.folder.upload(self.local / name, name)

    def clean(self, *, keep: Collection[str], folder: str) -> None:
        """Drop ``folder``, temporary files, and every part that is not in ``keep``."""
        self.folder.remove_folder(folder)
        for name in self.folder.files(without=tuple(self.folder.folders())):
            if name.startswith(("part-", "_part-")) and name.endswith((".parquet", ".tmp")) and name not in keep:
                self.folder.remove(name)


@contextmanager
def open_out(out: str) -> Iterator[OutFolder]:
    """The folder that ``out`` names: a path, or a URI of any pyarrow filesystem.

    Raises:
        PrimaError: the address cannot be reached, or holds something that is no run.
    """
    folder = Folder.at(out)
    if folder.is_local:
        yield OutFolder(address=str(folder.path.resolve()), local=folder.path, folder=folder)
        return
    with tempfile.TemporaryDirectory(prefix="prima-ingest-") as aside:
        copy = OutFolder(address=out, local=Path(aside) / "run", folder=folder)
        with reaching(out, "`out` cannot be reached"):
            _pull(copy)
        yield copy


def _pull(copy: OutFolder) -> None:
    folders = copy.folder.folders()
    names = set(copy.folder.files(without=tuple(folders)))
    if (names or folders) and CONFIG not in names:
        raise PrimaError(
            "`out` exists and is no run directory (it has no config.yaml)",
            where=copy.address,
            mend="Choose another `out`.",
        )
    for name in sorted(names & {CONFIG, MANIFEST, RECORD}):
        copy.local.mkdir(exist_ok=True)
        copy.folder.download(name, copy.local / name)
