"""Cells in an order that their parents allow, as Ray tasks as resources permit, or one after the other in this process.

A finished cell is not run again; one that was killed goes on from its last checkpoint. What a cell says goes into
`<cell>.log` beside it. A cell that fails takes those that need it with it, and no other.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import shutil
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, StrictConfig, read_json, write_json
from prima_ray.data.run_record import RECORD, checkpoint_folders
from prima_ray.data.storage import Folder, reason
from prima_ray.stages.out_lock import InUseError
from prima_ray.studies.cells import Cell
from prima_ray.training.cluster import connect, view
from prima_ray.training.config import LoopConfig, RayContextConfig
from prima_ray.training.shared_folder import check_shared

_log = logging.getLogger(__name__)
_RETRIES = 2
"""Of a cell whose process died: killed for memory, or with its node."""
_HANDOVER_S = 60.0
_HOUR, _MINUTE = 3600, 60


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    seconds: float
    failure: str = ""
    """What went wrong, in a line or two; empty where nothing did."""
    mistake: bool = False
    """It is the user's to mend."""


@dataclass
class Progress:
    """What is done, and what is left."""

    cells: Mapping[str, Cell]
    slots: float = 1.0
    keep_checkpoints: bool = True
    done: dict[str, float] = field(default_factory=dict)
    """Key -> seconds, of cells that are finished, whenever that was."""
    fresh: int = 0
    """Cells that were finished in this sitting."""
    failed: dict[str, Outcome] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)

    def remaining_s(self) -> float | None:
        """Seconds until the end, from the mean of each stage so far; None before anything is known."""
        known: dict[str, list[float]] = defaultdict(list)
        for key, seconds in self.done.items():
            if seconds > 0:
                known[self.cells[key].stage].append(seconds)
        if not known:
            return None
        means = {stage: sum(values) / len(values) for stage, values in known.items()}
        usual = sum(means.values()) / len(means)
        left = [cell for key, cell in self.cells.items() if key not in self.done and key not in self.skipped]
        return sum(means.get(cell.stage, usual) for cell in left if cell.key not in self.failed) / self.slots

    def finish(self, cell: Cell, seconds: float) -> None:
        """A run is finished: nothing goes on from it any more."""
        self.done[cell.key] = seconds
        if not self.keep_checkpoints:
            _remove_checkpoints(cell)

    def say(self, line: str) -> None:
        """A line of progress."""
        left = self.remaining_s()
        rest = "" if left is None or len(self.done) == len(self.cells) else f", about {duration(left)} left"
        _log.info("study: %d of %d runs done%s; %s", len(self.done), len(self.cells), rest, line)


def duration(seconds: float) -> str:
    """`3 h 20 min`, `12 min`, `40 s`."""
    if seconds >= _HOUR:
        return f"{int(seconds // _HOUR)} h {int(seconds % _HOUR // _MINUTE)} min"
    return f"{int(seconds // _MINUTE)} min" if seconds >= _MINUTE else f"{seconds:.0f} s"


def run_cell(work: Callable[[Any], Any], config: StrictConfig, log: str, threads: int) -> Outcome:
    """Do the work of a cell to its end, wherever this is called."""
    import torch

    started = time.perf_counter()
    with open(log, "a", encoding="utf-8", buffering=1) as file, _logging_to(file), limited(torch, threads):
        try:
            _do(work, config)
        except PrimaError as error:
            print(f"prima: {error}", file=file)
            return Outcome(time.perf_counter() - started, str(error), mistake=True)
        except Exception as error:
            traceback.print_exc(file=file)
            lines = str(error).strip().splitlines() or [""]
            return Outcome(time.perf_counter() - started, f"{type(error).__name__}: {lines[-1]}")
    return Outcome(time.perf_counter() - started)


def _do(work: Callable[[Any], Any], config: StrictConfig) -> None:
    """Where a study was killed a moment ago, its runs may still be on their way out."""
    deadline = time.monotonic() + _HANDOVER_S
    while True:
        try:
            work(config)
            return
        except InUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


@contextlib.contextmanager
def limited(torch: Any, threads: int) -> Iterator[None]:
    """So many threads of torch: cells beside each other would else take every core, each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _logging_to(file: Any) -> Iterator[None]:
    ours = logging.getLogger("prima_ray")
    handler, propagate, level = logging.StreamHandler(file), ours.propagate, ours.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    ours.addHandler(handler)
    ours.propagate = False
    ours.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            yield
    finally:
        ours.removeHandler(handler)
        ours.propagate = propagate
        ours.setLevel(level)


def run_cells(
    cells: Mapping[str, Cell],
    context: Any,
    *,
    cpus_per_cell: float = 1.0,
    gpus_per_cell: float = 0.0,
    keep_checkpoints: bool = True,
) -> Progress:
    """Run what is not finished; returns when nothing more can be.

    Args:
        keep_checkpoints: False takes them away from every finished run.

    Raises:
        PrimaError: some node cannot use the folder of the cells.
    """
    progress = Progress(cells, keep_checkpoints=keep_checkpoints)
    for cell in cells.values():
        if (cell.folder / RECORD).exists():
            progress.finish(cell, recorded_seconds(cell))
    waiting = [cell for key, cell in cells.items() if key not in progress.done]
    if not waiting:
        return progress
    next(iter(cells.values())).folder.parent.mkdir(parents=True, exist_ok=True)
    if progress.done:
        _log.info("study: %d of %d runs are finished already", len(progress.done), len(cells))
    threads = max(1, int(cpus_per_cell))
    if isinstance(context, RayContextConfig):
        _with_ray(waiting, progress, context, cpus=cpus_per_cell, gpus=gpus_per_cell, threads=threads)
    else:
        _one_by_one(waiting, progress, threads)
    return progress


def _one_by_one(waiting: list[Cell], progress: Progress, threads: int) -> None:
    ready = _Ready(waiting, progress)
    while (cell := ready.pop()) is not None:
        progress.say(f"{cell.title} ...")
        ready.ended(cell, run_cell(cell.work, cell.config, str(log_of(cell)), threads))


def _with_ray(
    waiting: list[Cell], progress: Progress, context: RayContextConfig, *, cpus: float, gpus: float, threads: int
) -> None:
    connect(context, num_workers=max((_own_workers(cell) for cell in waiting), default=0))
    check_shared(str(waiting[0].folder.parent))
    import ray

    total = view()
    progress.slots = max(1.0, total.cpus / cpus if not gpus else min(total.cpus / cpus, total.gpus / gpus))
    # A process a cell: what one leaves behind (memory, threads, settings) does not reach the next.
    task = ray.remote(max_calls=1, max_retries=_RETRIES)(run_cell)
    ready = _Ready(waiting, progress)
    running: dict[Any, Cell] = {}
    while True:
        while sum(_share(cell, cpus) for cell in running.values()) < total.cpus - 1e-9:
            cell = ready.pop()
            if cell is None:
                break
            mine = {"num_cpus": 0} if _claims_its_own(cell) else {"num_cpus": cpus, "num_gpus": gpus}
            running[task.options(**mine).remote(cell.work, cell.config, str(log_of(cell)), threads)] = cell
            progress.say(f"{cell.title} ...")
        if not running:
            return
        (finished, *_), _ = ray.wait(list(running), num_returns=1)
        cell = running.pop(finished)
        try:
            outcome = ray.get(finished)
        except ray.exceptions.RayError as error:
            outcome = Outcome(0.0, str(error).strip().splitlines()[0])
        ready.ended(cell, outcome)


def _claims_its_own(cell: Cell) -> bool:
    """A run with a Ray context claims what it needs, workers or Ray Data's actors. What it held itself it would wait
    for, without end where nothing else is free.
    """
    return isinstance(getattr(cell.config, "context", None), RayContextConfig)


def _own_workers(cell: Cell) -> int:
    """Workers of Ray Train that a run brings."""
    config = cell.config
    return config.worker_range[1] if isinstance(config, LoopConfig) and _claims_its_own(cell) else 0


def _share(cell: Cell, cpus: float) -> float:
    """CPUs that a cell keeps busy; what Ray Data does for one is counted as one cell's."""
    if isinstance(cell.config, LoopConfig) and isinstance(cell.config.context, RayContextConfig):
        return cell.config.worker_range[1] * cell.config.context.cpus_per_worker
    return cpus


class _Ready:
    """Cells whose parents are finished, the earliest in the plan first."""

    def __init__(self, waiting: list[Cell], progress: Progress) -> None:
        self._progress = progress
        self._children: dict[str, list[Cell]] = defaultdict(list)
        self._open: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []
        for cell in waiting:
            missing = [key for key in cell.parents if key not in progress.done]
            self._open[cell.key] = len(missing)
            for key in missing:
                self._children[key].append(cell)
            if not missing:
                heapq.heappush(self._heap, (cell.place, cell.key))

    def pop(self) -> Cell | None:
        """The next one; None where none is ready."""
        return self._progress.cells[heapq.heappop(self._heap)[1]] if self._heap else None

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """A cell has ended: its children are ready, or will not be."""
        if outcome.failure:
            self._progress.failed[cell.key] = outcome
            self._skip(cell.key)
            _log.warning("study: %s failed: %s\n  %s", cell.title, outcome.failure, log_of(cell))
            return
        seconds = recorded_seconds(cell) + outcome.seconds
        write_json(_times_of(cell), {"seconds": round(seconds, 1)})
        self._progress.finish(cell, seconds)
        self._progress.fresh += 1
        self._progress.say(f"{cell.title} took {duration(outcome.seconds)}")
        for child in self._children[cell.key]:
            self._open[child.key] -= 1
            if not self._open[child.key]:
                heapq.heappush(self._heap, (child.place, child.key))

    def _skip(self, key: str) -> None:
        for child in self._children[key]:
            if child.key not in self._progress.skipped:
                self._progress.skipped.add(child.key)
                self._skip(child.key)


def _remove_checkpoints(cell: Cell) -> None:
    """Room is all that it is about: where they cannot be removed, the study goes on."""
    run = Folder.at(cell.folder)
    try:
        for home in checkpoint_folders(run):
            if home.path.exists():
                shutil.rmtree(home.path)
    except OSError as error:
        _log.warning("study: the checkpoints of %s could not be removed (%s)", run.address, reason(error))


def log_of(cell: Cell) -> Path:
    """What a cell said."""
    return cell.folder.with_name(f"{cell.folder.name}.log")


def recorded_seconds(cell: Cell) -> float:
    """How long a cell took; 0 where it was not recorded."""
    with contextlib.suppress(PrimaError, TypeError, KeyError, ValueError):
        return float(read_json(_times_of(cell))["seconds"])
    return 0.0


def _times_of(cell: Cell) -> Path:
    return cell.folder.with_name(f"{cell.folder.name}.time.json")
