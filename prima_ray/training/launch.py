"""Start a training job in the context its config names, and bring its outcome back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prima_ray.base import PrimaError, read_json, write_json
from prima_ray.training.cluster import check_budget, connect
from prima_ray.training.config import RayContextConfig
from prima_ray.training.contexts import LocalContext, RayContext
from prima_ray.training.loop import TrainingJob, train

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
