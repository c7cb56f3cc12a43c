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

import pyarrow as pa
from pyarrow import fs as pafs

from prima_ray.base import PrimaError, is_uri
from prima_ray.data.schema import MANIFEST, join, open_filesystem
from prima_ray.stages.rundir import CONFIG, RECORD


@dataclass(frozen=True)
class OutFolder:
    """An opened folder."""

    address: str
    """As the shards' writers open it."""
    local: Path
    """The folder itself, or the copy of its small files."""
    filesystem: pafs.FileSystem
    root: str
    """The folder's path on its filesystem."""

    @property
    def is_remote(self) -> bool:
        return not isinstance(self.filesystem, pafs.LocalFileSystem)

    def push(self, *names: str) -> None:
        """Bring files of the local copy to where they belong; nothing to do for a local folder."""
        if not self.is_remote:
            return
        for name in names:
            with self.filesystem.open_output_stream(join(self.root, name)) as stream:
                stream.write((self.local / name).read_bytes())

    def clean(self, *, keep: Collection[str], folder: str) -> None:
        """Drop ``folder``, temporary files, and every part that is not in ``keep``."""
        for info in self.filesystem.get_file_info(pafs.FileSelector(self.root)):
            name = info.base_name
            if name == folder:
                self.filesystem.delete_dir(info.path)
            elif name.startswith(("part-", "_part-")) and name.endswith((".parquet", ".tmp")) and name not in keep:
                self.filesystem.delete_file(info.path)


@contextmanager
def open_out(out: str) -> Iterator[OutFolder]:
    """The folder that ``out`` names: a path, or a URI of any pyarrow filesystem.

    Raises:
        PrimaError: the address cannot be reached, or holds something that is no run.
    """
    filesystem, root = open_filesystem(out)
    if isinstance(filesystem, pafs.LocalFileSystem):
        local = Path(root if is_uri(out) else out)
        yield OutFolder(address=str(local.resolve()), local=local, filesystem=filesystem, root=str(local))
        return
    root = root.rstrip("/")
    with tempfile.TemporaryDirectory(prefix="prima-ingest-") as folder:
        copy = OutFolder(address=out, local=Path(folder) / "run", filesystem=filesystem, root=root)
        try:
            _pull(copy)
        except (OSError, pa.ArrowException) as error:
            raise PrimaError(f"`out` cannot be reached ({' '.join(str(error).split())})", where=out) from None
        yield copy


def _pull(copy: OutFolder) -> None:
    selector = pafs.FileSelector(copy.root, allow_not_found=True)
    names = {info.base_name for info in copy.filesystem.get_file_info(selector)}
    if names and CONFIG not in names:
        raise PrimaError(
            "`out` exists and is no run directory (it has no config.yaml)",
            where=copy.address,
            mend="Choose another `out`.",
        )
    for name in sorted(names & {CONFIG, MANIFEST, RECORD}):
        copy.local.mkdir(exist_ok=True)
        with copy.filesystem.open_input_stream(join(copy.root, name)) as stream:
            (copy.local / name).write_bytes(stream.read())
