"""Several Ray nodes on this machine, to add, remove and drain as a cloud would (`ray.cluster_utils.Cluster`).

For experiments with elastic training: the training itself is a process of its own that joins by RAY_ADDRESS, so what it
meets is what it would meet anywhere. The head runs the driver and no worker: a cloud does not take it away either.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prima_ray.base import PrimaError

_log = logging.getLogger(__name__)
QUICK_HEALTH_CHECKS: Mapping[str, int] = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}
"""A lost node is given up after some 5 s instead of Ray's 20. On a real cluster: `RAY_<name>` in the environment
of the head's `ray start`."""
_ATTEMPTS = 3
_STORE_BYTES = 200 * 2**20


class LocalNodes:
    """A running cluster: a head and nodes that carry one worker each. Nodes are known by their number of arrival."""

    def __init__(self, cluster: Any, *, cpus_per_node: float) -> None:
        self._cluster, self._cpus = cluster, cpus_per_node
        self._nodes: dict[int, Any] = {}
        self._arrived = 0

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is to be."""
        return str(self._cluster.address)

    @property
    def alive(self) -> list[int]:
        """Numbers of the nodes that are there, oldest first; drained ones count until they are removed."""
        return sorted(self._nodes)

    def number_of(self, node_id: str) -> int | None:
        """The number of a node by Ray's id."""
        return next((number for number, node in self._nodes.items() if node.node_id == node_id), None)

    def add(self) -> int:
        """One more node; returns its number when the cluster knows it."""
        node = self._cluster.add_node(num_cpus=self._cpus, object_store_memory=_STORE_BYTES)
        self._nodes[self._arrived] = node
        self._arrived += 1
        return self._arrived - 1

    def remove(self, number: int, *, graceful: bool = False) -> None:
        """Take a node away: its processes are killed, and nobody is told. ``graceful`` lets it say goodbye."""
        self._cluster.remove_node(self._nodes.pop(number), allow_graceful=graceful)

    def drain(self, number: int, *, deadline_s: float) -> None:
        """Announce that a node will be taken away, as a cloud does with spot machines.

        Raises:
            PrimaError: the cluster does not accept it.
        """
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated import autoscaler_pb2

        accepted, why = GcsClient(address=self.address).drain_node(
            self._nodes[number].node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "prima elastic",
            int((time.time() + deadline_s) * 1000),
        )
        if not accepted:
            raise PrimaError(f"the cluster does not let node {number} be drained ({why})", where=self.address)


@contextmanager
def local_nodes(
    *, count: int, cpus_per_node: float, system_config: Mapping[str, Any] | None = None
) -> Iterator[LocalNodes]:
    """A head with one logical CPU and ``count`` nodes, until the block ends.

    Args:
        cpus_per_node: logical CPUs; what the workers leave is Ray Data's.
        system_config: of Ray's core, such as `health_check_period_ms`.
    """
    # The utility notes its address where every Ray process of this user would look for a cluster to join.
    with tempfile.TemporaryDirectory(prefix="prima-", ignore_cleanup_errors=True) as folder, _environment(folder):
        cluster = _start_head(system_config or {})
        try:
            nodes = LocalNodes(cluster, cpus_per_node=cpus_per_node)
            for _ in range(count):
                nodes.add()
            yield nodes
        finally:
            cluster.shutdown()


def _start_head(system_config: Mapping[str, Any]) -> Any:
    from ray.cluster_utils import Cluster

    for attempt in range(_ATTEMPTS):
        try:
            return Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 1,
                    "object_store_memory": _STORE_BYTES,
                    "include_dashboard": False,
                    # Nothing is to scale but what the experiment does.
                    "no_monitor": True,
                    "_system_config": dict(system_config),
                },
            )
        except Exception as error:
            # Ray gives its processes 30 s, a constant; a busy machine may need longer the first time.
            if "timed out during startup" not in str(error) or attempt == _ATTEMPTS - 1:
                raise
            _log.warning("Ray did not start within 30 s: trying again")
    raise AssertionError("the last attempt raises")


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    ours = {"RAY_TMPDIR": folder}
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
