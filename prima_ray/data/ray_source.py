"""The plan of a stream as a Ray Data source. Imports Ray; `stream.ray_batches` imports this module when called."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset, Datasource, ExecutionResources, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prima_ray.base import PrimaError
from prima_ray.data.reader import PlannedRead


class PlannedSource(Datasource):  # type: ignore[misc]  # Ray's classes are untyped here
    """One read task a `PlannedRead`, in order."""

    def __init__(self, reads: Sequence[PlannedRead], *, row_bytes: int) -> None:
        super().__init__()
        self._tasks = [
            ReadTask(
                read,
                BlockMetadata(
                    num_rows=len(read.rows), size_bytes=len(read.rows) * row_bytes, input_files=None, exec_stats=None
                ),
            )
            for read in reads
        ]

    def get_name(self) -> str:
        return "PlannedShards"

    def estimate_inmemory_data_size(self) -> int:
        return sum(task.metadata.size_bytes for task in self._tasks)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        del parallelism, per_task_row_limit, data_context  # the plan is already cut into tasks
        return self._tasks


class PacedExecution(ExecutionCallback):  # type: ignore[misc]
    """Keeps an execution's control loop from spinning while its consumer is behind.

    The loop waits in `ray.wait` for the output of read tasks. Once the stream holds what it may hold, that output is
    ready but not taken, `ray.wait` returns at once, and the loop turns for nothing (Ray 2.60). It runs in the
    consumer's process: on two cores it took one of them, and the interpreter's lock with it, and a training step took
    twice as long. A step that waited for something is not held up, so neither is a consumer that is ahead.
    """

    SPINNING_S = 0.01
    PAUSE_S = 0.05

    def __init__(self) -> None:
        self._started = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        del executor
        if time.monotonic() - self._started < self.SPINNING_S:
            time.sleep(self.PAUSE_S)
        self._started = time.monotonic()


def planned_dataset(reads: Sequence[PlannedRead], *, row_bytes: int, num_fetchers: int, store_bytes: int) -> Dataset:
    """A lazy dataset of the planned rows, in their order.

    How resources are budgeted (Ray 2.60): a dataset that a Train worker makes for itself registers with the
    autoscaling coordinator like any other; what the trainer holds is taken off first, and the CPUs that are left are
    split among all executions by floor division. Two ranks with a training and a validation stream on a machine with
    three CPUs to spare get 3 // 4 = 0 each, and read tasks of one CPU never start: the deadlock. Therefore:

    - read tasks ask for no CPU. They wait for storage and copy encoded bytes; decoding, the work, happens in the
      consumer. Nothing has to be spare for them to start, whatever the trainer took.
    - ``num_fetchers`` bounds how many run at a time in place of CPUs, and ``store_bytes`` how much of the object
      store one stream may hold, so streams of many ranks cannot over-subscribe a node.
    - they run beside their consumer (softly), so bytes cross the network once.
    """
    source = PlannedSource(reads, row_bytes=row_bytes)
    dataset = ray.data.read_datasource(
        source, num_cpus=0, concurrency=num_fetchers, override_num_blocks=max(1, len(reads))
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=store_bytes)
    context.scheduling_strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, PacedExecution]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return dataset


def iterate_tables(dataset: Dataset, *, batch_size: int) -> Iterator[pa.Table]:
    """Tables of ``batch_size`` rows. Closing the iterator stops the execution.

    Raises:
        PrimaError: the one that a read task raised, without Ray's wrapping.
    """
    tables = iter(dataset.iter_batches(batch_size=batch_size, batch_format="pyarrow", prefetch_batches=2))
    try:
        yield from tables
    except Exception as error:
        found = _prima_error(error)
        if found is None:
            raise
        raise found from None
    finally:
        # Not left to garbage collection: an abandoned execution holds its part of the object store.
        tables.close()


def _prima_error(error: BaseException | None) -> PrimaError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, PrimaError):
            return error
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
