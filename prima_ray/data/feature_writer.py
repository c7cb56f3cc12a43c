"""Computes the features of a frozen tower once and stores them; see `features` for the folder's shape.

The tower itself comes in as a function, so that data never imports models. Work is cut by file and variant: an
interrupted run continues with the next file, ranks take files in turn, and the manifest, written last, is the commit.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs
from pydantic import Field, ValidationError
from torch import Tensor

from prima_ray.base import StrictConfig, canonical_json, hash_json
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.features import (
    FEATURES_MANIFEST,
    FEATURES_VERSION,
    FeatureManifest,
    FeatureSet,
    FeatureSpec,
    encode_column,
    feature_folder,
    feature_key,
    specs_of,
)
from prima_ray.data.reader import Rows
from prima_ray.data.schema import Manifest, ShardFile, hash_stream, join, open_filesystem, read_manifest
from prima_ray.data.stream import local_batches

Encode = Callable[[ImageTextBatch], Mapping[str, Tensor]]
"""A batch -> tensors by their field of `ImageTextBatch`, each (N, ...), on any device. Runs without gradients."""


class FeatureConfig(StrictConfig):
    """How features of frozen towers are stored."""

    variants: int = Field(default=1, ge=1)
    """Copies under different augmentation and attribute dropout; epoch e sees copy e modulo this number."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batch_size: int = Field(default=32, ge=1)


class _Marker(StrictConfig):
    """Beside a finished file: what the folder's manifest will say of it."""

    file: ShardFile
    specs: tuple[FeatureSpec, ...]


def compute_features(
    root: str,
    shards: str,
    collate: Collator,
    encode: Encode,
    *,
    tower: str,
    config: FeatureConfig,
    rows: Rows | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureSet:
    """The features of some rows under a frozen tower: found finished below ``root``, or computed and committed.

    Args:
        collate: makes the tower's inputs. Where nothing in it is random (no views, no attribute dropout, or not
            training) there is one variant, which training and evaluation share.
        encode: the tower, its gradients off and in evaluation mode.
        tower: a hash of the tower's weights and of all else that `encode` depends on.
        rows: None computes all rows; others have no features and cannot be streamed.
        rank, world_size, barrier: where several processes share the work, each calls this with its own rank; the
            barrier is called twice, whether or not there was work.
        progress: is told the exams done since the last call, and how many this rank has to do in all.

    Raises:
        PrimaError: the shards are damaged.
    """
    manifest = read_manifest(shards)
    random = collate.train and collate.random
    collate = replace(collate, variant=True) if random else replace(collate.for_evaluation(), variant=True)
    variants = config.variants if random else 1
    key = feature_key(
        manifest,
        tower=tower,
        views=collate.views.model_dump(mode="json") if collate.views else None,
        text=collate.text.model_dump(mode="json") if collate.text else None,
        **({"vector": collate.vector.to_dict()} if collate.vector else {}),
        seed=collate.seed if random else None,
        variants=variants,
        dtype=config.dtype,
        rows=None if rows is None else hash_json(np.sort(rows).tolist()),
    )
    path = feature_folder(root, key)
    filesystem, folder = open_filesystem(path)
    if not _exists(filesystem, join(folder, FEATURES_MANIFEST)):
        wanted = np.ones(manifest.num_exams, dtype=bool)
        if rows is not None:
            wanted = np.isin(np.arange(manifest.num_exams), rows)
        mine = [item for number, item in enumerate(_work(manifest, variants)) if number % world_size == rank]
        writer = _Writer(path, shards, manifest, collate, encode, config, wanted)
        writer.write_all(mine, progress)
    if barrier:
        barrier()
    if rank == 0 and not _exists(filesystem, join(folder, FEATURES_MANIFEST)):
        _commit(path, manifest, key, variants)
    if barrier:
        barrier()
    return FeatureSet.open(path, shards=manifest)


def _work(manifest: Manifest, variants: int) -> Iterator[tuple[int, int]]:
    for variant in range(variants):
        for file in range(len(manifest.files)):
            yield variant, file


def _exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type == pafs.FileType.File)


@dataclass(frozen=True)
class _Writer:
    """Writes one file of one variant at a time."""

    path: str
    shards: str
    manifest: Manifest
    collate: Collator
    encode: Encode
    config: FeatureConfig
    wanted: NDArray[np.bool_]
    """Of every row: whether its features are computed."""

    def write_all(self, work: Sequence[tuple[int, int]], progress: Callable[[int, int], None] | None) -> None:
        """Write the (variant, file) that are not there already."""
        filesystem, folder = open_filesystem(self.path)
        left = [item for item in work if _read_marker(filesystem, folder, self._name(*item)) is None]
        total = sum(len(self._rows(file)) for _, file in left)

        def tell(count: int) -> None:
            if progress:
                progress(count, total)

        for variant, file in left:
            self._write(variant, file, tell)

    def _name(self, variant: int, file: int) -> str:
        return f"v{variant}/{self.manifest.files[file].path}"

    def _rows(self, file: int) -> Rows:
        """The file's rows whose features are wanted."""
        start = sum(item.rows for item in self.manifest.files[:file])
        return np.flatnonzero(self.wanted[start : start + self.manifest.files[file].rows]) + start

    def _write(self, variant: int, file: int, tell: Callable[[int], None]) -> None:
        filesystem, folder = open_filesystem(self.path)
        relative = self._name(variant, file)
        filesystem.create_dir(join(folder, f"v{variant}"), recursive=True)
        final = join(folder, relative)
        # Under a name of its own until it is whole: another process may be computing the same features.
        temporary = f"{final}.{uuid.uuid4().hex[:8]}"
        try:
            specs, rows = self._write_table(temporary, variant, file, tell)
            size = filesystem.get_file_info(temporary).size
            digest = hash_stream(filesystem, temporary)
            filesystem.move(temporary, final)
        except BaseException:
            if _exists(filesystem, temporary):
                filesystem.delete_file(temporary)
            raise
        marker = _Marker(file=ShardFile(path=relative, rows=rows, bytes=size, sha256=digest), specs=specs)
        _write_text(filesystem, f"{final}.json", canonical_json(marker.model_dump(mode="json")))

    def _write_table(
        self, path: str, variant: int, file: int, tell: Callable[[int], None]
    ) -> tuple[tuple[FeatureSpec, ...], int]:
        filesystem, _ = open_filesystem(self.path)
        source, root = open_filesystem(self.shards)
        footer = pq.read_metadata(join(root, self.manifest.files[file].path), filesystem=source)
        start = sum(item.rows for item in self.manifest.files[:file])
        wanted = self._rows(file)
        encoded = self._encoded(variant, wanted if len(wanted) else np.array([start]), tell)
        row, values = next(encoded)
        specs = specs_of({name: value[None] for name, value in values.items()}, self.config.dtype)
        schema = pa.schema([(spec.name, pa.binary()) for spec in specs])
        with pq.ParquetWriter(path, schema, filesystem=filesystem, compression="none", use_dictionary=False) as writer:
            position = start
            for group in range(footer.num_row_groups):
                columns: dict[str, list[Tensor | None]] = {spec.name: [] for spec in specs}
                for _ in range(footer.row_group(group).num_rows):
                    mine = position == row and self.wanted[row]
                    for name, column in columns.items():
                        column.append(values[name] if mine else None)
                    if mine:
                        row, values = next(encoded, (-1, {}))
                    position += 1
                arrays = [encode_column(columns[spec.name], spec) for spec in specs]
                writer.write_table(pa.table(arrays, schema=schema), row_group_size=max(1, len(arrays[0])))
        return specs, footer.num_rows

    def _encoded(
        self, variant: int, rows: Rows, tell: Callable[[int], None]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(row, unpadded values by name) for every row, in order."""
        size = self.config.batch_size
        padded = np.pad(rows, (0, -len(rows) % size), constant_values=-1).reshape(-1, size)
        batches = local_batches(self.shards, [(variant, padded)], self.collate)
        for batch, planned in zip(batches, padded, strict=True):
            encoded = {name: value.detach().cpu() for name, value in self.encode(batch).items()}
            if "text_seq" in encoded and batch.token_mask is not None:
                encoded["token_mask"] = batch.token_mask
            for position, row in enumerate(planned):
                if row >= 0:
                    yield (
                        int(row),
                        {name: _trim(name, value[position], batch, position) for name, value in encoded.items()},
                    )
            tell(int((planned >= 0).sum()))


def _trim(name: str, value: Tensor, batch: ImageTextBatch, position: int) -> Tensor:
    """Without the padding of its batch."""
    mask: Tensor | None = None
    if name in ("image_cls", "image_seq"):
        mask = batch.image_mask
    elif name in ("text_seq", "token_mask"):
        mask = batch.attention_mask
    return value if mask is None else value[mask[position].cpu()]


def _read_marker(filesystem: pafs.FileSystem, folder: str, relative: str) -> _Marker | None:
    """The marker of a finished file, None where the file is unfinished or not what the marker says."""
    path = join(folder, relative)
    if not _exists(filesystem, f"{path}.json"):
        return None
    with filesystem.open_input_stream(f"{path}.json") as stream:
        text = stream.read().decode()
    try:
        marker = _Marker.model_validate(json.loads(text))
    except (ValidationError, json.JSONDecodeError):
        return None
    info = filesystem.get_file_info(path)
    return marker if info.type == pafs.FileType.File and info.size == marker.file.bytes else None


def _commit(path: str, shards: Manifest, key: dict[str, Any], variants: int) -> None:
    filesystem, folder = open_filesystem(path)
    names = [f"v{variant}/{shards.files[file].path}" for variant, file in _work(shards, variants)]
    markers = [_read_marker(filesystem, folder, name) for name in names]
    found = [marker for marker in markers if marker is not None]
    if len(found) < len(names) or len({marker.specs for marker in found}) != 1:
        raise RuntimeError(f"{path}: {len(found)} of {len(names)} feature files are finished and alike")
    manifest = FeatureManifest(
        version=FEATURES_VERSION,
        key=key,
        variants=variants,
        specs=found[0].specs,
        files=tuple(marker.file for marker in found),
    )
    text = json.dumps(manifest.model_dump(mode="json"), indent=2)
    _write_text(filesystem, join(folder, FEATURES_MANIFEST), text)


def _write_text(filesystem: pafs.FileSystem, path: str, text: str) -> None:
    """Whole or not at all, on any filesystem."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}"
    with filesystem.open_output_stream(temporary) as stream:
        stream.write(text.encode())
    filesystem.move(temporary, path)
