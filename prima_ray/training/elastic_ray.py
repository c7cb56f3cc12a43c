"""What Ray Train lacks where nodes come and go, by its developers' hooks (Ray 2.60). Imported by driver and controller.

- A group that Ray Train itself ends, for one of another size, saves first (`SaveBeforeLeaving`): nothing is replayed.
- A group that leaves before its node is taken away is no failure (`LeavingIsNoFailure`). Ray Train would wait for the
  node's end, and start again with what was saved when the notice came.
- Ray Train counts the nodes of up to 20 s ago, and those that are being drained. After a loss it asks for more workers
  than there is room for, and waits a minute for them. `FreshNodesPolicy` looks again, and leaves drained nodes out.
- A driver that is killed leaves its nodes reserved for three minutes. `FreshNodesPolicy` asks in the run's own name.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from prima_ray.training.leaving import GroupLeaves, ask_to_leave, has_left, is_plain

_log = logging.getLogger(__name__)
_POLL_S = 0.1

_SETTINGS: Mapping[str, str] = {
    # How often the controller looks at its workers: a dead one is noticed so much later.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # How often it asks whether nodes are being drained.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
_ELASTIC_SETTINGS: Mapping[str, str] = {
    # How long a group waits for its resources before they are counted anew. They were there a moment ago, so what is
    # not granted at once was on a node that is lost.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6",
}


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A trainer whose controller sees the nodes as they are, and hears early of those that go."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if not is_plain():
            elastic = self.scaling_config.elasticity_enabled
            for name, value in {**_SETTINGS, **(_ELASTIC_SETTINGS if elastic else {})}.items():
                # A variable that the user has set stays.
                os.environ.setdefault(name, value)
            arguments["failure_policy"] = LeavingIsNoFailure(self.run_config.failure_config)
            if elastic:
                arguments["scaling_policy"] = FreshNodesPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


def callbacks(*, patience_s: float) -> list[Any]:
    """For `RunConfig`."""
    return [] if is_plain() else [SaveBeforeLeaving(patience_s=patience_s)]


class FreshNodesPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Counts nodes that are there now and will stay, and takes a dead controller's place."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask for nodes in the run's name. Ray Train asks in a new one at each start, and what a controller has that
        died with its driver stays taken for three minutes; under one name the next one has it at once. Two cannot be
        alive: they would work in one folder, which is locked.
        """
        run = train_run_context.run_config
        super().after_controller_start(SimpleNamespace(run_id=f"{run.storage_path}/{run.name}"))

    def _get_reserved_resources(self) -> Any:
        since: float = time.monotonic() - self._latest_reserved_resources_query_time
        if since >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
            self._recount()
        reserved = super()._get_reserved_resources()
        if reserved is None:
            return None
        draining = ray._private.state.state.get_draining_nodes()
        return {node: found for node, found in reserved.items() if node not in draining}

    def _recount(self) -> None:
        """The coordinator's view is up to 20 s old; asked so, it looks at the cluster first."""
        try:
            ray.get(self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, True), timeout=5)
        except Exception as error:  # the base class asks again and reports
            _log.debug("no fresh count of nodes: %s", error)


class LeavingIsNoFailure(DefaultFailurePolicy):  # type: ignore[misc]
    """A group that left in time, because a node will be taken away, is started again whatever `max_failures` says."""

    def make_decision(self, training_failed_error: Any) -> Any:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if any(isinstance(getattr(failure, "_base_exc", failure), GroupLeaves) for failure in failures):
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error=training_failed_error)


class SaveBeforeLeaving(WorkerGroupCallback):  # type: ignore[misc]
    """Lets a whole group finish its step and save before it is ended."""

    def __init__(self, *, patience_s: float) -> None:
        self._patience_s = patience_s
        self._group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    @contextmanager
    def on_worker_group_shutdown(self) -> Iterator[None]:
        # Before every other callback: Ray's own takes the process group down.
        group, self._group = self._group, None
        if group is not None and group.has_started():
            status = group.get_latest_poll_status()
            if status is None or not (status.errors or status.finished):
                _let_save(group, self._patience_s)
        yield


def _let_save(group: Any, patience_s: float) -> None:
    started = time.monotonic()
    try:
        ray.get(group.execute_async(ask_to_leave), timeout=patience_s)
        while time.monotonic() - started < patience_s:
            if all(ray.get(group.execute_async(has_left), timeout=patience_s)):
                _log.info("the workers saved and left within %.1f s", time.monotonic() - started)
                return
            time.sleep(_POLL_S)
        _log.warning(
            "the workers did not save within %g s: what came after the last checkpoint is replayed", patience_s
        )
    except Exception as error:
        # A worker that died just now, or a node that was faster than its deadline: the last checkpoint it is.
        _log.warning("the workers could not save before they left (%s)", type(error).__name__)
