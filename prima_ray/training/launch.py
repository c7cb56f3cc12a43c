"""Start a training job in the context its config names, and bring its outcome back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prima_ray.base import PrimaError, read_json, write_json
from prima_ray.training.cluster import check_budget, connect
from prima_ray.training.config import RayContextConfig
from prima_ray.training.contexts import LocalContext, RayContext
from prima_ray.training.leaving import DOORBELL, GroupLeaves, is_plain
from prima_ray.training.loop import TrainingJob, train
from prima_ray.training.task import AgreedError

_MISTAKE = "mistake.json"


def launch(job: TrainingJob) -> None:
    """Run the job to its end. Returns when its checkpoints are complete.

    Raises:
        PrimaError: what a worker found wrong, as if it had happened here.
    """
    context = job.config.context
    (job.run / _MISTAKE).unlink(missing_ok=True)
    if isinstance(context, RayContextConfig):
        _launch_ray(job, context)
    else:
        worker = LocalContext(context.device)
        if job.config.engine.kind == "deepspeed":
            with _group_of_one(worker.device):
                train(job, worker)
        else:
            train(job, worker)


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
    # What an elastic run needs to start; it grows onto what is there.
    check_budget(context, num_workers=job.config.worker_range[0])
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
    trainer = Trainer(
        _ray_worker,
        train_loop_config={"job": job, "heeds_notices": not is_plain()},
        scaling_config=ScalingConfig(use_gpu=gpus > 0, resources_per_worker=resources, **elastic),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=job.run.name,
            storage_path=str(job.run.resolve() / "ray"),
            failure_config=FailureConfig(max_failures=context.max_failures),
            callbacks=callbacks(patience_s=context.leave_timeout_s),
        ),
    )
    try:
        with _interruptible():
            trainer.fit()
    except Exception as error:
        raise _mistake(job) or error from None
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
    if (job.run / _MISTAKE).exists():
        # The group was restarted after a mistake of the user's: trying again would end the same way.
        return
    context = RayContext(heeds_notices=config["heeds_notices"])
    try:
        finished = train(job, context)
        DOORBELL.answer()
        if not finished and not DOORBELL.rung:
            raise GroupLeaves
    except PrimaError as error:
        write_json(job.run / _MISTAKE, {"what": error.what, "where": error.where, "mend": error.mend})
        # Raising makes Ray tear the other workers down, print its own account, and start the group again. Where no
        # worker waits for this one, all of them can as well return.
        if context.world_size > 1 and not isinstance(error, AgreedError):
            raise


def _mistake(job: TrainingJob) -> PrimaError | None:
    path: Path = job.run / _MISTAKE
    if not path.exists():
        return None
    found = read_json(path)
    return PrimaError(found["what"], where=found["where"], mend=found["mend"])
