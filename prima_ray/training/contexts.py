"""Where a worker runs: Ray Train, or this process. The loop sees `WorkerContext` and never Ray.

To add a context: a class with these members, a config with its own `kind`, one branch in `launch.launch`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from prima_ray.base import PrimaError
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.features import FeatureSet
from prima_ray.data.reader import Rows
from prima_ray.data.stream import Collate, local_batches, ray_batches
from prima_ray.training.leaving import DOORBELL, Notice, PreemptionDiary
from prima_ray.training.quiet import process_started, quiet_worker

Steps = Iterable[tuple[int, Rows]]
"""(epoch, this rank's rows (steps, local batch)), as `plan_steps` gives them."""


@dataclass(frozen=True)
class StreamSpec:
    """How planned rows become batches."""

    collate: Collate
    features: FeatureSet | None = None
    """Cached features that are read beside, or instead of, pixels and text."""


class ProgressBar(Protocol):
    """Counts optimizer steps, or exams, for a person."""

    def update(self, count: int = 1, *, loss: float | None = None) -> None: ...


class WorkerContext(Protocol):
    """One worker among `world_size`."""

    rank: int
    world_size: int
    device: torch.device
    name: str
    """Where it runs, for the log: NODE:PID."""
    timeline: Mapping[str, float]
    """What happened before training was entered -> when, in seconds since the epoch."""

    def batches(self, shards: str, steps: Steps, spec: StreamSpec) -> Generator[ImageTextBatch]:
        """This rank's batches, one a step, in order. Closing it early frees what reads ahead."""
        ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell the driver the figures of a validation. Collective under Ray."""
        ...

    def gather_objects(self, values: list[str]) -> list[str]:
        """All ranks' values in rank order. Collective."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def notice(self) -> Notice:
        """What this rank has heard of its group's end; cheap, asked at every step."""
        ...

    def heeded(self) -> None:
        """A checkpoint was taken because of a notice."""
        ...

    def progress(
        self, *, total: int, description: str, initial: int = 0, unit: str = "step"
    ) -> AbstractContextManager[ProgressBar]:
        """A progress bar on rank 0, nothing elsewhere."""
        ...


class LocalContext:
    """One worker: this process."""

    rank = 0
    world_size = 1

    def __init__(self, device: str = "auto") -> None:
        self.device = pick_device(device)
        self.name = f"local:{os.getpid()}"
        self.timeline: Mapping[str, float] = {}

    def batches(self, shards: str, steps: Steps, spec: StreamSpec) -> Generator[ImageTextBatch]:
        yield from local_batches(shards, steps, spec.collate, features=spec.features)

    def report(self, metrics: Mapping[str, float]) -> None:
        del metrics  # steps.jsonl and TensorBoard have them already

    def gather_objects(self, values: list[str]) -> list[str]:
        return values

    def barrier(self) -> None:
        return

    def notice(self) -> Notice:
        return Notice.NONE

    def heeded(self) -> None:
        return

    @contextmanager
    def progress(self, *, total: int, description: str, initial: int = 0, unit: str = "step") -> Iterator[ProgressBar]:
        from tqdm import tqdm

        with tqdm(total=total, initial=initial, desc=description, unit=unit, file=sys.stderr, mininterval=1.0) as bar:
            yield _TqdmBar(bar)


class RayContext:
    """One Ray Train worker. Made inside the worker, after Ray has set up the process group."""

    def __init__(self, *, heeds_notices: bool = True) -> None:
        import ray.train
        import ray.train.torch

        # Ray Train has set up logging of its own by now.
        quiet_worker()
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("prima_ray").setLevel(logging.INFO)
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.timeline: Mapping[str, float] = {"process": process_started(), "context": time.time()}
        self._heeds_notices, self._diary = heeds_notices, PreemptionDiary()
        self.name = f"{ray.get_runtime_context().get_node_id()}:{os.getpid()}"
        if ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0) < 1:
            _share_cores(context.get_local_world_size())

    def batches(self, shards: str, steps: Steps, spec: StreamSpec) -> Generator[ImageTextBatch]:
        yield from ray_batches(shards, steps, spec.collate, features=spec.features)

    def report(self, metrics: Mapping[str, float]) -> None:
        import ray.train

        ray.train.report(dict(metrics))

    def gather_objects(self, values: list[str]) -> list[str]:
        if self.world_size == 1:
            return values
        lists: list[list[str]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def notice(self) -> Notice:
        if DOORBELL.rung:
            return Notice.LEAVE
        found = _preemption() if self._heeds_notices else None
        return self._diary.read(found[0], deadline=found[1], now=time.time()) if found else Notice.NONE

    def heeded(self) -> None:
        found = _preemption()
        if found:
            self._diary.saved(found[0])

    @contextmanager
    def progress(self, *, total: int, description: str, initial: int = 0, unit: str = "step") -> Iterator[ProgressBar]:
        yield _LineBar(total, initial, description, unit) if self.rank == 0 else _NoBar()


def _preemption() -> tuple[object, float | None] | None:
    """A notice that a node of this group will be taken away: its key, and the deadline in seconds since the epoch.

    What `ray.train.get_preemption_info` tells, without its barrier: the loop agrees by a reduction that it does anyway.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return tuple(info.preempted_node_ids), info.deadline_ms / 1000 if info.deadline_ms else None


class _TqdmBar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        if loss is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update(count)


class _LineBar:
    """A worker's stderr reaches the driver line by line: a line now and then instead of a bar."""

    def __init__(self, total: int, initial: int, description: str, unit: str, *, every_s: float = 10.0) -> None:
        self._total, self._done, self._every_s = total, initial, every_s
        self._label = f"{description}: {unit}"
        self._initial, self._started = initial, time.monotonic()
        self._last = float("-inf")

    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < self._every_s and self._done < self._total:
            return
        self._last = now
        shown = "" if loss is None else f", loss {loss:.4f}"
        took = now - self._started
        # The first line says that it goes on; there is no rate to speak of yet.
        left = f", {took * (self._total - self._done) / (self._done - self._initial):.0f} s left" if took > 1 else ""
        # Not print: Ray Train repeats what is printed in its log, which comes to the same terminal.
        sys.stderr.write(f"{self._label} {self._done}/{self._total}{shown}{left}\n")
        sys.stderr.flush()


class _NoBar:
    def update(self, count: int = 1, *, loss: float | None = None) -> None:
        del count, loss


@contextmanager
def counting(context: WorkerContext, description: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told (exams done now, exams in all); its bar appears with the first of them."""
    with ExitStack() as stack:
        bar: ProgressBar | None = None

        def done(count: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(context.progress(total=total, description=description, unit="exam"))
            bar.update(count)

        yield done


def _share_cores(num_neighbours: int) -> None:
    """Give torch this worker's part of the machine's cores.

    Ray sets one thread for a worker that is accounted less than two CPUs. Here a fraction of a CPU only says that the
    readers shall find some: one worker on two cores trained at half its speed.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // num_neighbours))


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: a GPU where there is one, else the CPU.

    Raises:
        PrimaError: a GPU is named that is not there.
    """
    if name != "auto":
        device = torch.device(name)
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise PrimaError(
                f"context.device is {name}, but torch finds {f'{count} GPUs' if count else 'no GPU'} here",
                mend="Set it to auto or cpu.",
            )
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
