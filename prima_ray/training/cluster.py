"""Joining a Ray cluster, or starting one on this machine. No torch: ingest starts without waiting for it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from prima_ray.base import PrimaError
from prima_ray.training.config import RayContextConfig
from prima_ray.training.quiet import quiet_driver, quiet_worker, runtime_env

_log = logging.getLogger(__name__)
_ATTEMPTS = 3
_ANSWER_TIMEOUT_S = 90.0
"""For a task on every node: a worker of Ray's that has to be started first takes some ten seconds on a busy machine."""
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """One node of a cluster."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class ClusterView:
    """A cluster as it is now, or as it would be started here."""

    address: str | None
    """None: it would be started on this machine."""
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers of so many CPUs and GPUs fit: a worker lies on one node."""

        def on(node: Node) -> int:
            parts = [int(have / want + 1e-9) for have, want in ((node.cpus, cpus), (node.gpus, gpus)) if want]
            return min(parts)

        return sum(map(on, self.nodes))


_SHORT_WAY = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Our deployments never hold their loop up: the model is asked in a thread of its own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
}
"""Settings of Serve that take milliseconds off a request's way; read when it is imported, by every process."""


def connect(context: RayContextConfig, *, num_workers: int, loopback: bool = False) -> None:
    """Join the cluster that the config or RAY_ADDRESS names, else start one on this machine.

    Args:
        loopback: of one that is started here the ports are on loopback alone, and the workers give way to nobody: it
            serves.

    Raises:
        PrimaError: there is no cluster at the address.
    """
    quiet_driver()
    if loopback:
        # Ray's name for it is older than its use: without clusters, every process of it keeps to loopback. It is read
        # when Ray is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Ray's workers give way to whatever else runs (15). Somebody waits for these.
        os.environ.setdefault("RAY_worker_niceness", "0")
        for name, value in _SHORT_WAY.items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    address = named_address(context)
    with _own_sigterm():
        if address:
            _join(address)
        else:
            _start(planned_cpus(context, num_workers=num_workers))
    quiet_worker()


def named_address(context: RayContextConfig) -> str | None:
    """The cluster that a job of this context joins; None where one is started for it."""
    return context.address or os.environ.get("RAY_ADDRESS") or None


def planned_cpus(context: RayContextConfig, *, num_workers: int) -> int:
    """Logical CPUs of a cluster started here: the workers' share and as many for Ray Data's readers as there are."""
    cores = os.cpu_count() or 1
    return context.num_cpus or max(cores, round(num_workers * context.cpus_per_worker + cores))


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level=logging.WARNING, runtime_env=runtime_env())
    except ConnectionError as error:
        raise PrimaError(
            f"no Ray cluster answers ({str(error).splitlines()[0]})",
            where=address,
            mend="Check context.address and RAY_ADDRESS, or leave both out to start a cluster here.",
        ) from None
    except ray.exceptions.AuthenticationError as error:
        raise PrimaError(
            f"this cluster wants a token, or another one ({error.message.strip().rstrip('.')})",
            where=address,
            mend="Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token.",
        ) from None
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise PrimaError(
            f"this cluster runs other versions ({' '.join(str(error).split())})",
            where=address,
            mend="Use the same Python and Ray here and on every node; the container image does.",
        ) from None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's handler of SIGTERM exits with 15 and says nothing: whoever had one keeps it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before):
            signal.signal(signal.SIGTERM, before)


def _start(num_cpus: int) -> None:
    import ray

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


def disconnect() -> None:
    """Leave the cluster, and stop it if it is our own. When this returns, Ray has said all that it has to say."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def planned_view(context: RayContextConfig, *, num_workers: int, gpus: int) -> ClusterView:
    """The cluster that `connect` would start here."""
    cpus = float(planned_cpus(context, num_workers=num_workers))
    return ClusterView(None, (Node("this machine", cpus, float(gpus)),))


def view() -> ClusterView:
    """The cluster that this process has joined."""
    import ray

    nodes = tuple(
        Node(item["NodeManagerAddress"], item["Resources"].get("CPU", 0.0), item["Resources"].get("GPU", 0.0))
        for item in ray.nodes()
        if item["Alive"]
    )
    return ClusterView(ray.get_runtime_context().gcs_address, nodes)


def node_ids() -> dict[str, str]:
    """Ids of the living nodes, and their addresses."""
    import ray

    return {item["NodeID"]: item["NodeManagerAddress"] for item in ray.nodes() if item["Alive"]}


def on_nodes(calls: Mapping[str, Callable[[], T]]) -> dict[str, T | PrimaError]:
    """Call a function on a node each; what came back, or why nothing did.

    Args:
        calls: node id -> an importable function, or a `functools.partial` of one.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # No CPU is asked for: a cluster whose CPUs are all taken answers too.
    task = ray.remote(num_cpus=0, max_retries=0)(_call)
    pending: dict[str, Any] = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(call)
        for node, call in calls.items()
    }
    ready, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=_ANSWER_TIMEOUT_S)
    found: dict[str, T | PrimaError] = {}
    for node, reference in pending.items():
        if reference not in ready:
            found[node] = PrimaError(f"gave no answer within {_ANSWER_TIMEOUT_S:g} s")
            continue
        try:
            found[node] = ray.get(reference)
        except Exception as error:  # Ray wraps whatever a node's Python raises
            found[node] = PrimaError(f"gave no answer ({str(error).strip().splitlines()[-1].strip()})")
    return found


def _call(function: Callable[[], T]) -> T:
    return function()
