"""Which exam is seen when: the exam index, the three roles, and the order of an epoch.

The order is a function of (rows, global batch, seed, epoch) alone. Ranks cut contiguous slices out of each global
batch, so the worker count changes nothing but who reads which rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from prima_ray.base import PrimaError, hash_key
from prima_ray.data.reader import Rows
from prima_ray.data.schema import (
    FOLDS,
    MANIFEST,
    Manifest,
    ShardFile,
    hash_stream,
    join,
    open_filesystem,
    read_manifest,
)
from prima_ray.data.storage import reason

HASHED_BYTES = 32 * 1024**3
"""Shards up to this size are hashed whenever they are opened, which is a second a gigabyte; larger ones where asked."""
_LIGHT_COLUMNS = ["exam_id", "patient_id", "attributes", "label", "images.list.element.image_id"]


def verify_shards(shards: str, manifest: Manifest, *, sha256: bool | None = None) -> None:
    """Check that every file of a shard folder is there, whole and unchanged.

    Args:
        sha256: whether the parts are read and their hashes compared; None: where they hold no more than
            `HASHED_BYTES`. The small files beside them are always read, sizes always compared.

    Raises:
        PrimaError: naming the first file that is not what the manifest says.
    """
    filesystem, root = open_filesystem(shards)
    if sha256 is None:
        sha256 = sum(file.bytes for file in manifest.files) <= HASHED_BYTES
    verify_files(filesystem, root, manifest.side_files, where=shards, sha256=True)
    verify_files(filesystem, root, manifest.files, where=shards, sha256=sha256)


def verify_files(
    filesystem: pafs.FileSystem, root: str, files: tuple[ShardFile, ...], *, where: str, sha256: bool
) -> None:
    """See `verify_shards`; ``where`` is the folder as the user wrote it."""
    mend = "Restore the file from a copy, or write the folder again."
    paths = [join(root, file.path) for file in files]
    infos = filesystem.get_file_info(paths)
    for file, info in zip(files, infos, strict=True):
        name = join(where, file.path)
        if info.type != pafs.FileType.File:
            raise PrimaError("this file of the manifest is missing", where=name, mend=mend)
        if info.size != file.bytes:
            raise PrimaError(f"holds {info.size} bytes, the manifest says {file.bytes}", where=name, mend=mend)
    if not sha256:
        return
    with ThreadPoolExecutor(max_workers=4) as pool:
        for file, found in zip(files, pool.map(partial(hash_stream, filesystem), paths), strict=True):
            if found != file.sha256:
                raise PrimaError(
                    f"wrong checksum: sha256 {found[:12]}..., the manifest says {file.sha256[:12]}...",
                    where=join(where, file.path),
                    mend=mend,
                )


@dataclass(frozen=True)
class ExamIndex:
    """All exams of a shard folder, without their photos. Row numbers count through the manifest's files in order."""

    shards: str
    manifest: Manifest
    exam_ids: NDArray[np.object_]
    patient_ids: NDArray[np.object_]
    labels: Rows
    """Class index, -1 where there is no diagnosis."""
    patient_fold: Rows
    """Fold under the grouping by patient, -1 where the exam is in none."""
    lesion_fold: Rows
    file: Rows
    """Index of the row's file in the manifest."""
    row_in_file: Rows
    num_images: Rows
    attributes: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.exam_ids)

    @classmethod
    def read(cls, shards: str, *, sha256: bool | None = None) -> Self:
        """Read the light columns of a finished shard folder.

        Args:
            sha256: whether the hashes of the parts are compared, see `verify_shards`.

        Raises:
            PrimaError: no finished folder, another schema version, or a file that is not what the manifest says.
        """
        manifest = read_manifest(shards)
        verify_shards(shards, manifest, sha256=sha256)
        filesystem, root = open_filesystem(shards)
        tables = [_read_light(filesystem, root, file, where=shards) for file in manifest.files]
        if not tables:
            raise PrimaError("the shard folder holds no exams", where=shards)
        table = pa.concat_tables(tables)
        rows = np.array([file.rows for file in manifest.files])
        classes = {name: index for index, name in enumerate(manifest.data_set.class_names)}
        unknown = sorted({name for name in table["label"].to_pylist() if name is not None and name not in classes})
        if unknown:
            raise PrimaError(
                f"the parts hold the class {unknown[0]!r}, which the manifest does not know",
                where=join(shards, MANIFEST),
                mend="Restore the manifest from a copy, or ingest the data set again.",
            )
        labels = [-1 if name is None else classes[name] for name in table["label"].to_pylist()]
        folds = pq.read_table(join(root, FOLDS), filesystem=filesystem)
        fold_of = {exam: position for position, exam in enumerate(folds["exam_id"].to_pylist())}
        exam_ids = np.array(table["exam_id"].to_pylist(), dtype=object)
        position = np.array([fold_of.get(exam, -1) for exam in exam_ids], dtype=np.int64)
        return cls(
            shards=shards,
            manifest=manifest,
            exam_ids=exam_ids,
            patient_ids=np.array(table["patient_id"].to_pylist(), dtype=object),
            labels=np.array(labels, dtype=np.int64),
            patient_fold=_fold_column(folds, "patient", position),
            lesion_fold=_fold_column(folds, "lesion", position),
            file=np.repeat(np.arange(len(rows)), rows),
            row_in_file=np.concatenate([np.arange(count) for count in rows]),
            num_images=pc.list_value_length(table["images"]).to_numpy().astype(np.int64),
            attributes=table["attributes"],
        )

    def attribute_rows(self, rows: Rows | None = None) -> list[dict[str, str]]:
        """Canonical attribute values of some rows (None: all), one mapping an exam."""
        column = self.attributes if rows is None else self.attributes.take(pa.array(rows))
        return [dict(pairs) for pairs in column.to_pylist()]

    def label_names(self, rows: Rows) -> list[str | None]:
        """Class names of some rows, None where there is no diagnosis."""
        names = self.manifest.data_set.class_names
        return [names[label] if label >= 0 else None for label in self.labels[rows]]

    def folds(self, split: Literal["patient", "lesion"]) -> Rows:
        return self.patient_fold if split == "patient" else self.lesion_fold


def _read_light(filesystem: pafs.FileSystem, root: str, file: ShardFile, *, where: str) -> pa.Table:
    try:
        # ParquetFile, not read_table: only it reads one leaf of a list of structs and leaves the bytes alone.
        with pq.ParquetFile(join(root, file.path), filesystem=filesystem) as parquet:
            table = parquet.read(columns=_LIGHT_COLUMNS)
    except (pa.ArrowException, OSError) as error:
        raise PrimaError(f"cannot be read as Parquet ({reason(error)})", where=join(where, file.path)) from None
    if table.num_rows != file.rows:
        raise PrimaError(f"holds {table.num_rows} exams, the manifest says {file.rows}", where=join(where, file.path))
    return table


def _fold_column(folds: pa.Table, name: str, position: Rows) -> Rows:
    values = pc.fill_null(folds[name], -1).to_numpy().astype(np.int64)
    return np.where(position >= 0, np.append(values, -1)[position], -1)


# ---------------------------------------------------------------------------------------------------- roles


@dataclass(frozen=True)
class Roles:
    """Row numbers by what they are for. `test` is touched once; `val` decides everything that is chosen."""

    train: Rows
    val: Rows
    test: Rows


def split_roles(
    index: ExamIndex, *, fold: int | None, val_fold: int | None, split: Literal["patient", "lesion"]
) -> Roles:
    """The three roles of data.

    Args:
        fold: the test fold; None trains the final model on every fold.
        val_fold: default the one after `fold`. With ``fold=None`` there is no validation unless it is named here.
        split: which grouping the folds respect.

    Exams without a fold (no diagnosis) train: they can serve only where labels are not needed.

    Raises:
        PrimaError: no such fold, or both folds are the same.
    """
    count = index.manifest.num_folds
    for key, value in (("fold", fold), ("val_fold", val_fold)):
        if value is not None and not 0 <= value < count:
            raise PrimaError(
                f"{key}: there is no fold {value}", where=index.shards, mend=f"Folds are 0 to {count - 1}."
            )
    if fold is not None and val_fold is None:
        val_fold = (fold + 1) % count
    if fold is not None and fold == val_fold:
        raise PrimaError(
            f"val_fold: {val_fold} is the test fold as well",
            where=index.shards,
            mend="What is chosen on the test fold says nothing about new patients; choose another fold.",
        )
    folds = index.folds(split)
    test = np.flatnonzero(folds == fold) if fold is not None else np.empty(0, dtype=np.int64)
    val = np.flatnonzero(folds == val_fold) if val_fold is not None else np.empty(0, dtype=np.int64)
    held_out = np.zeros(len(index), dtype=bool)
    held_out[test] = held_out[val] = True
    return Roles(train=np.flatnonzero(~held_out), val=val, test=test)


# ---------------------------------------------------------------------------------------------------- order


def num_steps(num_rows: int, global_batch: int) -> int:
    """Steps of one epoch; the last may be ragged."""
    return -(-num_rows // global_batch)


def plan_epoch(
    rows: Rows,
    *,
    global_batch: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    window_rows: int | None = None,
    files: Rows | None = None,
) -> Rows:
    """The global batches of one epoch, (num_steps, global_batch) row numbers, -1 = padding at the ragged end.

    Args:
        rows: distinct row numbers.
        shuffle: False keeps the order of ``rows``.
        window_rows: None permutes all rows, which reads a part of every row group for each batch: right while the
            data fit in memory. A number permutes the files, then shuffles within windows of that many rows, so that
            a batch reads only the few files of its window.
        files: the file of every row (`ExamIndex.file`), needed for windows.

    Rows of one batch are in storage order: their order means nothing to training, and a rank that takes a contiguous
    slice then reads few row groups that another rank reads as well.
    """
    rows = np.asarray(rows, dtype=np.int64)
    steps = num_steps(len(rows), global_batch)
    if shuffle:
        rng = np.random.Generator(np.random.PCG64(hash_key(seed, epoch, "order")))
        rows = np.sort(rows)
        order = rng.permutation(rows) if window_rows is None else _windowed(rows, rng, window_rows, files)
    else:
        order = rows
    flat = np.full(steps * global_batch, -1, dtype=np.int64)
    flat[: len(order)] = order
    plan: Rows = flat.reshape(steps, global_batch)
    if shuffle:
        # Padding sorts last as the largest unsigned number.
        plan = np.sort(plan.view(np.uint64), axis=1).view(np.int64)
    return plan


def _windowed(rows: Rows, rng: np.random.Generator, window_rows: int, files: Rows | None) -> Rows:
    if files is None:
        raise ValueError("window_rows needs the files of the rows")
    file_of = np.asarray(files)[rows]
    rank_of_file = rng.permutation(int(file_of.max()) + 1) if len(rows) else file_of
    order = rows[np.argsort(rank_of_file[file_of], kind="stable")]
    for start in range(0, len(order), window_rows):
        order[start : start + window_rows] = rng.permutation(order[start : start + window_rows])
    return order


def rank_rows(plan: Rows, *, rank: int, world_size: int) -> Rows:
    """This rank's contiguous slice of every global batch: (num_steps, ceil(global_batch / world_size)), -1 padding.

    Slices of all ranks, side by side, are the plan with padding at the end; every rank has every step.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    local = -(-plan.shape[1] // world_size)
    padded = np.pad(plan, ((0, 0), (0, local * world_size - plan.shape[1])), constant_values=-1)
    return padded[:, rank * local : (rank + 1) * local]


def plan_steps(
    rows: Rows,
    *,
    global_batch: int,
    seed: int,
    total_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    window_rows: int | None = None,
    files: Rows | None = None,
) -> Iterator[tuple[int, Rows]]:
    """A rank's part of a whole training: (epoch, rows of its steps) for each epoch from ``start_step`` on.

    The steps after ``start_step`` are the same whether or not the ones before it ran in this process: resuming is
    starting further on.
    """
    per_epoch = num_steps(len(rows), global_batch)
    if per_epoch == 0:
        raise PrimaError(
            "there are no exams to train on", mend="Check `fold`, `val_fold` and the shards' class counts."
        )
    step = start_step
    while step < total_steps:
        epoch, first = divmod(step, per_epoch)
        plan = plan_epoch(
            rows, global_batch=global_batch, seed=seed, epoch=epoch, window_rows=window_rows, files=files
        )[first : first + total_steps - step]
        yield epoch, rank_rows(plan, rank=rank, world_size=world_size)
        step += len(plan)
