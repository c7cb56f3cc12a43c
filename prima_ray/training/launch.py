"""Start a training job in the context its config names, and bring its outcome back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, read_json, write_json
from prima_ray.training.config import RayContextConfig
from prima_ray.training.contexts import LocalContext, RayContext
from prima_ray.training.loop import TrainingJob, train
from prima_ray.training.quiet import quiet_worker, runtime_env

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
        _single_process_group(job)
        train(job, LocalContext(context.device))


def _single_process_group(job: TrainingJob) -> None:
    """DeepSpeed wants a process group, even of one."""
    import torch.distributed as dist

    if job.config.engine.kind != "deepspeed" or dist.is_initialized():
        return
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")


def _launch_ray(job: TrainingJob, context: RayContextConfig) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    connect(context, num_workers=job.config.worker_range[1])
    check_budget(context, num_workers=job.config.worker_range[1])
    gpus = context.gpus_per_worker
    resources = {"CPU": context.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    low, high = job.config.worker_range
    elastic: dict[str, Any] = (
        {"num_workers": high}
        if low == high
        else {"num_workers": (low, high), "elastic_resize_monitor_interval_s": context.resize_interval_s}
    )
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(use_gpu=gpus > 0, resources_per_worker=resources, **elastic),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=job.run.name,
            storage_path=str(job.run.resolve() / "ray"),
            failure_config=FailureConfig(max_failures=context.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _mistake(job) or error from None
    mistake = _mistake(job)
    if mistake:
        raise mistake


def _ray_worker(config: dict[str, Any]) -> None:
    job: TrainingJob = config["job"]
    if (job.run / _MISTAKE).exists():
        # The group was restarted after a mistake of the user's: trying again would end the same way.
        return
    try:
        train(job, RayContext())
    except PrimaError as error:
        write_json(job.run / _MISTAKE, {"what": error.what, "where": error.where, "mend": error.mend})
        raise


def _mistake(job: TrainingJob) -> PrimaError | None:
    path: Path = job.run / _MISTAKE
    if not path.exists():
        return None
    found = read_json(path)
    return PrimaError(found["what"], where=found["where"], mend=found["mend"])


def connect(context: RayContextConfig, *, num_workers: int) -> None:
    """Join the cluster that the config or RAY_ADDRESS names, else start one on this machine."""
    import logging

    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    address = context.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING, runtime_env=runtime_env())
        return
    # Logical CPUs: the workers' share and as many for Ray Data's readers as the machine has.
    cores = os.cpu_count() or 1
    num_cpus = context.num_cpus or max(cores, round(num_workers * context.cpus_per_worker + cores))
    ray.init(num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING, runtime_env=runtime_env())
    quiet_worker()


def check_budget(context: RayContextConfig, *, num_workers: int) -> None:
    """Refuse a job that would wait for ever: Ray Data reads with the CPUs that the workers leave.

    Raises:
        PrimaError: no CPU, or too few GPUs, would be left.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    wanted = num_workers * context.cpus_per_worker
    if cpus - wanted < 1:
        raise PrimaError(
            f"{num_workers} workers of {context.cpus_per_worker:g} CPUs leave {max(cpus - wanted, 0):g} of the "
            f"cluster's {cpus:g} CPUs to Ray Data, which needs at least 1: training would wait for ever",
            mend="Lower num_workers or context.cpus_per_worker, or add a node.",
        )
    if num_workers * context.gpus_per_worker > gpus:
        raise PrimaError(
            f"{num_workers} workers of {context.gpus_per_worker:g} GPUs want more than the cluster's {gpus:g}",
            mend="Lower num_workers or context.gpus_per_worker, or add a node.",
        )
