"""Shards -> `ImageTextBatch`, in an order fixed by (seed, epoch): a local path without Ray, and Ray Data.

Both paths read the same planned rows and run the same collator, so their batches are equal bit for bit. Blocks carry
*encoded* photos; decoding happens in the collate step, in the consumer's threads.

    index = ExamIndex.read(shards)
    roles = split_roles(index, fold=0, val_fold=None, split="patient")
    steps = plan_steps(roles.train, global_batch=64, seed=1, total_steps=500, rank=rank, world_size=world_size)
    for batch in ray_batches(shards, steps, collate, world_size=world_size): ...
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa

from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.features import FeatureSet
from prima_ray.data.plan import ExamIndex, Roles, plan_epoch, plan_steps, rank_rows, split_roles, verify_shards
from prima_ray.data.reader import CACHE_BYTES, PlannedRead, RowReader, Rows
from prima_ray.data.schema import Manifest, read_manifest

__all__ = [
    "Collate",
    "Collator",
    "ExamIndex",
    "Roles",
    "local_batches",
    "plan_epoch",
    "plan_steps",
    "rank_rows",
    "ray_batches",
    "split_roles",
    "verify_shards",
]

T = TypeVar("T")
Steps = Iterable[tuple[int, Rows]]
"""(epoch, (num_steps, local_batch) row numbers, -1 = padding) one after the other: see `plan_steps`."""
TASK_BYTES = 16 * 1024 * 1024
"""Encoded bytes that one read task of Ray Data fetches, roughly."""
TASK_ROWS = 2048
TASKS_PER_EXECUTION = 1000


class Collate(Protocol):
    """Rows -> a batch, in whatever thread calls it; picklable. `Collator` for exams, `MaskingCollator` for texts."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The shard columns that a batch is made of."""
        ...

    def __call__(self, table: pa.Table) -> ImageTextBatch:
        """A table of `columns`, `epoch` and `padding` (see `RowReader.read`) -> the batch of its rows."""
        ...


def local_batches(
    shards: str,
    steps: Steps,
    collate: Collate,
    *,
    features: FeatureSet | None = None,
    prefetch: int = 4,
    num_threads: int = 2,
    cache_bytes: int = CACHE_BYTES,
) -> Iterator[ImageTextBatch]:
    """The planned batches, read by pyarrow and made ahead of their use in threads. No Ray.

    Args:
        prefetch: batches in the making at a time; 0 makes each when it is asked for.
        cache_bytes: see `RowReader`.

    Raises:
        PrimaError: a file cannot be read or a photo not decoded, naming it.
    """
    reader = RowReader(
        shards,
        read_manifest(shards),
        columns=collate.columns,
        features=features.stored if features else None,
        cache_bytes=cache_bytes,
    )
    reading = threading.Lock()

    def make(planned: tuple[int, Rows]) -> ImageTextBatch:
        epoch, rows = planned
        with reading:
            table = reader.read(rows, epoch)
        return collate(table)

    planned = ((epoch, rows) for epoch, plan in steps for rows in plan)
    yield from _ahead(planned, make, prefetch=prefetch, num_threads=num_threads)


def ray_batches(
    shards: str,
    steps: Steps,
    collate: Collate,
    *,
    features: FeatureSet | None = None,
    prefetch: int = 4,
    num_threads: int = 2,
    num_fetchers: int = 1,
    store_bytes: int = 256 * 1024 * 1024,
) -> Iterator[ImageTextBatch]:
    """The very same batches through Ray Data: in a driver, or in a Ray Train worker with the steps of its rank.

    The whole plan is one streaming execution, so an epoch's start costs nothing (a plan of more than
    `TASKS_PER_EXECUTION` read tasks, about two million exams, is several). Read tasks fetch encoded bytes and ask for
    no CPU; see `ray_source.planned_dataset` for why that cannot starve. Stopping early shuts the execution down.

    Args:
        prefetch: batches in the making at a time, in ``num_threads`` threads of this process.
        num_fetchers: read tasks at a time: more hides more latency of far storage.
        store_bytes: object store memory that this stream may hold.

    Raises:
        PrimaError: a file cannot be read or a photo not decoded, naming it.
    """
    from prima_ray.data.ray_source import iterate_tables, planned_dataset

    manifest = read_manifest(shards)
    row_bytes = _row_bytes(manifest, collate, features)
    reads = _planned_reads(
        shards, manifest, steps, collate, features, row_bytes=row_bytes, first_steps=max(1, prefetch)
    )

    def tables() -> Generator[pa.Table]:
        while chosen := list(islice(reads, TASKS_PER_EXECUTION)):
            dataset = planned_dataset(
                [read for _, read in chosen], row_bytes=row_bytes, num_fetchers=num_fetchers, store_bytes=store_bytes
            )
            yield from iterate_tables(dataset, batch_size=chosen[0][0])

    with closing(tables()) as source:
        yield from _ahead(source, collate, prefetch=prefetch, num_threads=num_threads)


def _planned_reads(
    shards: str,
    manifest: Manifest,
    steps: Steps,
    collate: Collate,
    features: FeatureSet | None,
    *,
    row_bytes: int,
    first_steps: int,
) -> Iterator[tuple[int, PlannedRead]]:
    """Cut the plan into read tasks of consecutive steps: (local batch, task)."""
    content_hash, stored = manifest.content_hash, features.stored if features else None
    most = max(1, min(TASK_ROWS, TASK_BYTES // row_bytes))
    limit = 0
    rows: list[Rows] = []
    epochs: list[Rows] = []

    def task() -> tuple[int, PlannedRead]:
        read = PlannedRead(shards, content_hash, collate.columns, stored, np.concatenate(rows), np.concatenate(epochs))
        return len(rows[0]), read

    for epoch, plan in steps:
        for step in plan:
            # The first task is small, for the first batch waits for it; then they double up to their full size.
            limit = limit or first_steps * len(step)
            rows.append(step)
            epochs.append(np.full(len(step), epoch, dtype=np.int64))
            if (len(rows) + 1) * len(step) > limit:
                yield task()
                rows, epochs, limit = [], [], min(2 * limit, max(most, len(step)))
    if rows:
        yield task()


def _row_bytes(manifest: Manifest, collate: Collate, features: FeatureSet | None) -> int:
    """Mean encoded bytes of a planned row."""
    files = list(manifest.files) if "images" in collate.columns else []
    total = sum(file.bytes for file in files)
    if features is not None:
        total += sum(file.bytes for file in features.manifest.files) // features.manifest.variants
    return 256 + total // max(1, manifest.num_exams)


def _ahead(
    source: Iterable[T], make: Callable[[T], ImageTextBatch], *, prefetch: int, num_threads: int
) -> Iterator[ImageTextBatch]:
    """``make`` of every item, in order, up to ``prefetch`` at a time in threads."""
    if prefetch == 0:
        yield from map(make, source)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="prima-collate")
    waiting: deque[Future[ImageTextBatch]] = deque()
    try:
        for item in source:
            waiting.append(pool.submit(make, item))
            if len(waiting) >= prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # The consumer may stop early: what has not begun is dropped, what has begun ends within a batch's time.
        pool.shutdown(wait=True, cancel_futures=True)
