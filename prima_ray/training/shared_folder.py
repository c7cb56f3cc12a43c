"""Whether every node of the cluster can use a folder: a run on the disk of one machine would fail in the middle.

The driver writes a file and a task on every other node must read it, and write one that the driver reads. That asks
the question itself, for disks, mounts and object stores (with their credentials) alike.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress

import pyarrow as pa

from prima_ray.base import PrimaError
from prima_ray.data.storage import Folder, reaching, reason

_log = logging.getLogger(__name__)
MARK = ".driver"
"""A file of the run directory, as long as a driver lives."""
UNSEEN = "what another machine wrote there is not seen; it is on a disk of one machine"
_ANSWER_S = 60.0
_APPEARS_S = 5.0
"""How long a mount may take to show a file that another machine wrote."""


def check_shared(address: str) -> None:
    """Refuse a folder that some node of the running cluster cannot use.

    Args:
        address: an absolute path or a URI; it is made where it is missing.

    Raises:
        PrimaError: naming the first node that cannot, and why; or this process cannot write there.
    """
    blind = nodes_without(address)
    if blind:
        raise not_shared(address, blind)


def not_shared(address: str, blind: Mapping[str, str]) -> PrimaError:
    """What is wrong with a folder that some nodes cannot use, as `nodes_without` found them."""
    node, why = next(iter(blind.items()))
    more = f" (and {len(blind) - 1} more)" if len(blind) > 1 else ""
    return PrimaError(
        f"the cluster's node {node}{more} cannot use this folder: {why}",
        where=address,
        mend="Name in `out` a folder that every node mounts at this path (NFS), or an object store (s3://...).",
    )


def nodes_without(address: str) -> dict[str, str]:
    """Node (its IP address) -> what is wrong, of the other nodes that have CPUs; empty where there are none.

    Raises:
        PrimaError: this process itself cannot write there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mine = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: str(node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != mine and node["Resources"].get("CPU", 0) > 0
    }
    if not others:
        return {}
    home, name = Folder.at(address), f".probe-{uuid.uuid4().hex}"
    with reaching(address, "this folder cannot be written to"):
        home.write(name, name.encode())
    try:
        asked = {
            node: ray.remote(_answer)
            .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(address, name, f"{name}-{node}")
            for node in others
        }
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
        found = {node: _verdict(home, task, f"{name}-{node}", task in ready) for node, task in asked.items()}
    finally:
        with suppress(OSError, pa.ArrowException):
            for left in (name, *(f"{name}-{node}" for node in others)):
                home.remove(left)
    return {others[node]: why for node, why in found.items() if why}


def leave_mark(address: str) -> str:
    """Write into a folder what a worker must see there before it trains; returns the mark.

    Raises:
        PrimaError: this process cannot write there.
    """
    mark = uuid.uuid4().hex
    with reaching(address, "this folder cannot be written to"):
        Folder.at(address).write(MARK, mark.encode())
    return mark


def sees_mark(address: str, mark: str) -> bool:
    """Asked by a worker: its node may have joined after `check_shared`, and hold an older copy of the folder."""
    home, deadline = Folder.at(address), time.monotonic() + _APPEARS_S
    while True:
        with suppress(OSError, pa.ArrowException):
            if home.read(MARK) == mark.encode():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _verdict(home: Folder, task: object, reply: str, is_ready: bool) -> str | None:
    import ray

    if not is_ready:
        # A node that is busy, or on its way out, is no proof of anything.
        _log.warning("%s: a node did not say within %.0f s whether it sees this folder", home.address, _ANSWER_S)
        return None
    try:
        why: str | None = ray.get(task)
    except ray.exceptions.RayError as error:
        _log.warning("%s: a node could not be asked whether it sees this folder (%s)", home.address, reason(error))
        return None
    if why is None and not _appears(home, reply):
        why = "what it writes there is not seen here"
    return why


def _answer(address: str, name: str, reply: str) -> str | None:
    """Runs on a node: what is wrong with the folder as seen from there, or None."""
    home = Folder.at(address)
    try:
        if not _appears(home, name):
            return UNSEEN
        home.write(reply, reply.encode())
    except (OSError, pa.ArrowException) as error:
        return reason(error)
    return None


def _appears(home: Folder, name: str) -> bool:
    deadline = time.monotonic() + _APPEARS_S
    while not home.exists(name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
