"""Start a training job in the context its config names, and bring its outcome back."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from prima_ray.base import PrimaError, json_text
from prima_ray.data.storage import Folder, reaching
from prima_ray.training.checks.before_workers import check_before_workers
from prima_ray.training.cluster import connect, view
from prima_ray.training.config import RayContextConfig
from prima_ray.training.contexts import LocalContext, RayContext
from prima_ray.training.leaving import DOORBELL, GroupLeaves, is_plain
from prima_ray.training.loop import TrainingJob, train
from prima_ray.training.shared_folder import MARK, UNSEEN, check_shared, leave_mark, not_shared, sees_mark
from prima_ray.training.task import AgreedError

_MISTAKE = "mistake.json"


def launch(job: TrainingJob) -> None:
    """Run the job to its end. Returns when its checkpoints are complete.

    Raises:
        PrimaError: what a worker found wrong, as if it had happened here.
    """
    context = job.config.context
    with reaching(job.address, "the run's folder cannot be written to"):
        Folder.at(job.address).remove(_MISTAKE)
    if isinstance(context, RayContextConfig):
        _launch_ray(job, context)
    else:
        worker = LocalContext(context.device)
        alone = _group_of_one(worker.device) if job.config.engine.kind == "deepspeed" else nullcontext()
        with alone, _scratch(job) as mine:
            train(mine, worker)


@contextmanager
def _group_of_one(device: torch.device) -> Iterator[None]:
    """DeepSpeed wants a process group and a launcher's variables, even for one process.

    The variables go again, for a Ray cluster that a later stage starts would hand them to its workers. The group
    stays: DeepSpeed keeps groups derived from it for as long as the process lives.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _launch_ray(job: TrainingJob, context: RayContextConfig) -> None:
    connect(context, num_workers=job.config.worker_range[1])
    check_before_workers(job.config, view())
    check_shared(job.address)
    mark = leave_mark(job.address)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from prima_ray.training.elastic_ray import Trainer, callbacks

    gpus = context.gpus_per_worker
    resources = {"CPU": context.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    low, high = job.config.worker_range
    elastic: dict[str, Any] = (
        {"num_workers": high}
        if low == high
        else {"num_workers": (low, high), "elastic_resize_monitor_interval_s": context.resize_interval_s}
    )
    storage = Folder.at(job.address).folder("ray")
    trainer = Trainer(
        _ray_worker,
        train_loop_config={"job": job, "mark": mark, "heeds_notices": not is_plain()},
        scaling_config=ScalingConfig(use_gpu=gpus > 0, resources_per_worker=resources, **elastic),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=job.run.name,
            storage_path=storage.root,
            storage_filesystem=None if storage.is_local else storage.filesystem,
            failure_config=FailureConfig(max_failures=context.max_failures),
            callbacks=callbacks(patience_s=context.leave_timeout_s),
        ),
    )
    try:
        with _interruptible():
            trainer.fit()
    except Exception as error:
        raise _mistake(job) or error from None
    finally:
        with suppress(OSError, pa.ArrowException):
            Folder.at(job.address).remove(MARK)
    mistake = _mistake(job)
    if mistake:
        raise mistake


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt again: Ray Train stops the workers, then exits the process with 0, as if done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _ray_worker(config: dict[str, Any]) -> None:
    job: TrainingJob = config["job"]
    home = Folder.at(job.address)
    if home.exists(_MISTAKE):
        # The group was restarted after a mistake of the user's: trying again would end the same way.
        return
    context = RayContext(heeds_notices=config["heeds_notices"])
    sees = sees_mark(job.address, config["mark"])
    blind = context.gather_objects([] if sees else [context.name.partition(":")[0]])
    if blind and not sees:
        if len(blind) == context.world_size:
            raise not_shared(job.address, dict.fromkeys(blind, UNSEEN))
        # Those that see the folder tell: what is written here would not be found.
        return
    try:
        if blind:
            told = not_shared(job.address, dict.fromkeys(blind, UNSEEN))
            raise AgreedError(told.what, where=told.where, mend=told.mend)
        with _scratch(job) as mine:
            finished = train(mine, context)
        DOORBELL.answer()
        if not finished and not DOORBELL.rung:
            raise GroupLeaves
    except PrimaError as error:
        try:
            home.write(_MISTAKE, json_text({"what": error.what, "where": error.where, "mend": error.mend}).encode())
        except OSError:
            # On a full disk even that may fail; then it is Ray's to tell.
            raise error from None
        # Raising makes Ray tear the other workers down, print its own account, and start the group again. Where no
        # worker waits for this one, all of them can as well return.
        if context.world_size > 1 and not isinstance(error, AgreedError):
            raise


@contextmanager
def _scratch(job: TrainingJob) -> Iterator[TrainingJob]:
    """The job with a folder of this worker's own for its small files, where the run is on an object store."""
    if job.store is None:
        yield job
        return
    with tempfile.TemporaryDirectory(prefix="prima-worker-") as folder:
        yield replace(job, run=Path(folder))


def _mistake(job: TrainingJob) -> PrimaError | None:
    try:
        found = json.loads(Folder.at(job.address).read(_MISTAKE))
    except FileNotFoundError:
        return None
    return PrimaError(found["what"], where=found["where"], mend=found["mend"])
