"""Rows of a shard folder by number, with the columns of stored features beside them. No torch, no Ray: Ray's read
tasks import this module alone, and a fresh worker process reads its first row within a second.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prima_ray.base import PrimaError
from prima_ray.data.schema import Manifest, join, open_filesystem, read_manifest
from prima_ray.data.storage import reason

Rows = NDArray[np.int64]
CACHE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class StoredColumns:
    """Where features lie that are row-aligned with the shards: see `features.FeatureSet`."""

    path: str
    columns: tuple[str, ...]
    variants: int

    def folder(self, epoch: int) -> str:
        """Epoch e reads variant e modulo the number of variants."""
        return join(self.path, f"v{epoch % self.variants}")


class RowReader:
    """Reads any rows of a shard folder, and of features beside it, by row number; row groups are the unit of reading.

    Not safe for several threads at once.

    Args:
        columns: of the shards.
        features: stored columns to join to the shards'.
        cache_bytes: row groups kept in memory (the least recently used go first). A row group larger than the cache
            is read for each batch that needs it.
    """

    def __init__(
        self,
        shards: str,
        manifest: Manifest,
        *,
        columns: Sequence[str],
        features: StoredColumns | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._shards = shards
        self._columns = list(columns)
        self._features = features
        self._names = [file.path for file in manifest.files]
        self._starts = np.concatenate([[0], np.cumsum([file.rows for file in manifest.files], dtype=np.int64)])
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._footers: dict[str, tuple[pq.FileMetaData, NDArray[np.int64]]] = {}

    def read(self, rows: Rows, epochs: NDArray[np.int64] | int) -> pa.Table:
        """The rows in the order given, with the columns `epoch` and `padding`; a row of -1 is all null.

        Raises:
            PrimaError: a file cannot be read, naming it.
        """
        epochs = np.broadcast_to(np.asarray(epochs, dtype=np.int64), rows.shape)
        table = self._take(self._shards, self._columns, rows)
        if self._features is not None:
            stored = self._take_features(self._features, rows, epochs)
            for name in stored.column_names:
                table = table.append_column(name, stored[name])
        table = table.append_column("epoch", pa.array(epochs))
        return table.append_column("padding", pa.array(rows < 0))

    def _take_features(self, features: StoredColumns, rows: Rows, epochs: NDArray[np.int64]) -> pa.Table:
        columns = list(features.columns)
        variants = epochs % features.variants
        if len(set(variants.tolist())) == 1:
            return self._take(features.folder(int(variants[0])), columns, rows)
        order = np.argsort(variants, kind="stable")
        pieces = [
            self._take(features.folder(int(variant)), columns, rows[order[variants[order] == variant]])
            for variant in np.unique(variants)
        ]
        return pa.concat_tables(pieces).take(pa.array(np.argsort(order, kind="stable")))

    def _take(self, folder: str, columns: list[str], rows: Rows) -> pa.Table:
        wanted = np.unique(rows[rows >= 0])
        pieces: list[pa.Table] = []
        files = np.searchsorted(self._starts, wanted, side="right") - 1
        for file in np.unique(files):
            path = join(folder, self._names[file])
            inside = wanted[files == file] - self._starts[file]
            bounds = self._footer(path)[1]
            groups = np.searchsorted(bounds, inside, side="right") - 1
            for group in np.unique(groups):
                within = inside[groups == group] - bounds[group]
                pieces.append(self._group(path, int(group), columns).take(pa.array(within)))
        if not pieces:
            schema = self._footer(join(folder, self._names[0]))[0].schema.to_arrow_schema()
            pieces.append(pa.schema([schema.field(name) for name in columns]).empty_table())
        # A null index makes a null row: padding. Rows may repeat: one read may span several epochs.
        order = pa.array(np.searchsorted(wanted, rows), mask=rows < 0)
        return pa.concat_tables(pieces).take(order)

    def _footer(self, path: str) -> tuple[pq.FileMetaData, NDArray[np.int64]]:
        found = self._footers.get(path)
        if found is None:
            filesystem, inner = open_filesystem(path)
            try:
                footer = pq.read_metadata(inner, filesystem=filesystem)
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(path, error) from None
            counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            found = (footer, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))
            self._footers[path] = found
        return found

    def _group(self, path: str, group: int, columns: list[str]) -> pa.Table:
        key = (path, group)
        table = self._groups.get(key)
        if table is not None:
            self._groups.move_to_end(key)
            return table
        filesystem, inner = open_filesystem(path)
        try:
            with pq.ParquetFile(inner, filesystem=filesystem, metadata=self._footer(path)[0], pre_buffer=True) as file:
                table = file.read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None
        self._groups[key] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > self._cache_bytes and self._groups:
            _, dropped = self._groups.popitem(last=False)
            self._cached_bytes -= dropped.nbytes
        return table


def _unreadable(path: str, error: Exception) -> PrimaError:
    return PrimaError(
        f"cannot be read as Parquet ({reason(error)})",
        where=path,
        mend="The file is damaged: ingest the data set again.",
    )


@lru_cache(maxsize=2)
def _cached_reader(
    shards: str, content_hash: str, columns: tuple[str, ...], features: StoredColumns | None, cache_bytes: int
) -> RowReader:
    manifest = read_manifest(shards)
    if manifest.content_hash != content_hash:
        raise PrimaError("the shards were replaced while they were being read", where=shards, mend="Start again.")
    return RowReader(shards, manifest, columns=columns, features=features, cache_bytes=cache_bytes)


@dataclass(frozen=True)
class PlannedRead:
    """A read task: some consecutive steps' rows. Calling it gives their table.

    A process that runs several of these keeps the reader, its open footers and its cached row groups.
    """

    shards: str
    content_hash: str
    columns: tuple[str, ...]
    features: StoredColumns | None
    rows: Rows
    epochs: Rows
    cache_bytes: int = CACHE_BYTES

    def __call__(self) -> list[pa.Table]:
        reader = _cached_reader(self.shards, self.content_hash, self.columns, self.features, self.cache_bytes)
        return [reader.read(self.rows, self.epochs)]
