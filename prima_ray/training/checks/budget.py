"""CPUs, GPUs and room on the nodes against what the config asks for."""

from __future__ import annotations

from collections.abc import Iterator

from prima_ray.training.checks import Check, Finding, Subject
from prima_ray.training.cluster import ClusterView, named_address
from prima_ray.training.config import RayContextConfig

_ADD_NODES = "or add a node; set context.autoscales where the cluster adds them by itself."


def cpu_budget(subject: Subject) -> Iterator[Finding]:
    """Ray Data reads with the CPUs that the workers leave; with none it waits for ever, and so does training."""
    cluster, context = subject.cluster, subject.ray
    if cluster is None or context is None:
        return
    low, high = _workers(subject)
    short = _too_few_cpus(cluster, context, low)
    if short is None:
        yield Finding("ok", _sums(cluster.cpus, "CPUs", low, context.cpus_per_worker))
        if high > low and _too_few_cpus(cluster, context, high):
            yield _runs_with_fewer(cluster, context, "CPUs")
    elif context.autoscales:
        yield Finding("warning", f"{short}: the job waits until nodes have been added", cluster.address)
    elif named_address(context) is None:
        mend = "Lower num_workers or context.cpus_per_worker, or raise context.num_cpus."
        yield Finding("error", f"{short}: training would wait for ever", mend=mend)
    else:
        mend = f"Lower num_workers or context.cpus_per_worker, {_ADD_NODES}"
        yield Finding("error", f"{short}: training would wait for ever", mend=mend)


def _too_few_cpus(cluster: ClusterView, context: RayContextConfig, num_workers: int) -> str | None:
    wanted = num_workers * context.cpus_per_worker
    if cluster.cpus - wanted >= 1:
        return None
    left = max(cluster.cpus - wanted, 0)
    return (
        f"{num_workers} workers of {context.cpus_per_worker:g} CPUs leave {left:g} of the cluster's {cluster.cpus:g} "
        "CPUs to Ray Data, which needs at least 1"
    )


def gpu_budget(subject: Subject) -> Iterator[Finding]:
    """GPUs for all workers, and none that nobody asks for."""
    cluster, context, loop = subject.cluster, subject.ray, subject.loop
    if cluster is None or context is None or loop is None:
        return
    low, high = _workers(subject)
    each, have = context.gpus_per_worker, cluster.gpus
    if not each:
        if have:
            mend = "Set context.gpus_per_worker to 1, or ignore this if the GPUs are for others."
            yield Finding("warning", f"the cluster has {have:g} GPUs, and the config uses none", mend=mend)
        return
    if low * each <= have:
        yield Finding("ok", _sums(have, "GPUs", low, each))
        if high * each > have:
            yield _runs_with_fewer(cluster, context, "GPUs")
        return
    short = f"{low} workers of {each:g} GPUs want more than the cluster's {have:g}"
    if context.autoscales:
        yield Finding("warning", f"{short}: the job waits until nodes have been added", cluster.address)
        return
    yield Finding("error", short, mend=f"Lower num_workers or context.gpus_per_worker, {_ADD_NODES}")


def room(subject: Subject) -> Iterator[Finding]:
    """A worker lies on one node: enough in all may be too little on each."""
    cluster, context, loop = subject.cluster, subject.ray, subject.loop
    if cluster is None or context is None or loop is None:
        return
    low, _ = _workers(subject)
    each = context.cpus_per_worker, context.gpus_per_worker
    if cluster.room(*each) >= low or context.autoscales or _is_short(cluster, context, low):
        return
    asked = f"{each[0]:g} CPUs" + (f" and {each[1]:g} GPUs" if each[1] else "")
    nodes = ", ".join(f"{node.name} {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in cluster.nodes)
    yield Finding(
        "error",
        f"a worker of {asked} lies on one node, and there is room for {cluster.room(*each)} of {low} ({nodes})",
        mend="Lower context.cpus_per_worker or context.gpus_per_worker, or use larger nodes.",
    )


def _is_short(cluster: ClusterView, context: RayContextConfig, num_workers: int) -> bool:
    """Too little in all, which the other checks say."""
    return num_workers * context.cpus_per_worker > cluster.cpus or num_workers * context.gpus_per_worker > cluster.gpus


def _workers(subject: Subject) -> tuple[int, int]:
    return subject.loop.worker_range if subject.loop else (0, 0)


def _sums(have: float, what: str, num_workers: int, each: float) -> str:
    return f"{have:g} {what}, of which {num_workers} workers take {num_workers * each:g}"


def _runs_with_fewer(cluster: ClusterView, context: RayContextConfig, what: str) -> Finding:
    count = cluster.room(context.cpus_per_worker, context.gpus_per_worker)
    text = f"not enough {what} for the largest number of workers: the run starts with up to {count} and grows"
    return Finding("ok", text)


BUDGET: tuple[Check, ...] = (cpu_budget, gpu_budget, room)
