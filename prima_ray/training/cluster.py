"""Joining a Ray cluster, or starting one on this machine. No torch: ingest starts without waiting for it."""

from __future__ import annotations

import logging
import os
import sys

from prima_ray.base import PrimaError
from prima_ray.training.config import RayContextConfig
from prima_ray.training.quiet import quiet_driver, quiet_worker, runtime_env

_log = logging.getLogger(__name__)
_ATTEMPTS = 3


def connect(context: RayContextConfig, *, num_workers: int) -> None:
    """Join the cluster that the config or RAY_ADDRESS names, else start one on this machine.

    Raises:
        PrimaError: there is no cluster at the address.
    """
    quiet_driver()
    import ray

    if ray.is_initialized():
        return
    address = context.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, logging_level=logging.WARNING, runtime_env=runtime_env())
        except ConnectionError as error:
            raise PrimaError(
                f"no Ray cluster answers ({str(error).splitlines()[0]})",
                where=address,
                mend="Check context.address and RAY_ADDRESS, or leave both out to start a cluster here.",
            ) from None
        quiet_worker()
        return
    # Logical CPUs: the workers' share and as many for Ray Data's readers as the machine has.
    cores = os.cpu_count() or 1
    num_cpus = context.num_cpus or max(cores, round(num_workers * context.cpus_per_worker + cores))
    # "local": without an address Ray would look for a cluster that somebody started on this machine.
    for attempt in range(_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level=logging.WARNING,
                runtime_env=runtime_env(),
            )
            break
        except Exception as error:
            # Ray gives its processes 30 s, a constant; a busy machine may need longer the first time.
            if "timed out during startup" not in str(error) or attempt == _ATTEMPTS - 1:
                raise
            _log.warning("Ray did not start within 30 s: trying again")
            ray.shutdown()
    quiet_worker()


def disconnect() -> None:
    """Leave the cluster, and stop it if it is our own. When this returns, Ray has said all that it has to say."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


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
