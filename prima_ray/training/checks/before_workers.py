"""The checks that a job makes of itself before it claims workers: quick, of this machine and of the cluster's sums."""

from __future__ import annotations

from prima_ray.training.checks import Check, Subject, refuse, run_checks
from prima_ray.training.checks.budget import BUDGET
from prima_ray.training.checks.machine import compiler, extension_builds, torchvision_build, versions
from prima_ray.training.checks.storage import disk_space, kept_after_the_job
from prima_ray.training.cluster import ClusterView
from prima_ray.training.config import LoopConfig
from prima_ray.training.engine_build import prepare_environment
from prima_ray.training.facts import observe, probe_folder

BEFORE_WORKERS: tuple[Check, ...] = (
    kept_after_the_job,
    *BUDGET,
    versions,
    torchvision_build,
    compiler,
    extension_builds,
    disk_space,
)


def check_before_workers(config: LoopConfig, cluster: ClusterView) -> None:
    """Refuse a job that cannot run, or would wait for ever, on the cluster it has joined; log what else is noticed.

    Raises:
        PrimaError: what is wrong, and how to mend it.
    """
    prepare_environment()
    refuse(
        run_checks(
            BEFORE_WORKERS, Subject(here=observe([probe_folder(config.out).address]), config=config, cluster=cluster)
        )
    )
