"""The controller's side of elastic runs, without a cluster. tests/ray/test_elastic.py has one."""

from __future__ import annotations

import logging
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from ray.train.v2._internal.exceptions import UserExceptionWithTraceback  # noqa: E402
from ray.train.v2._internal.execution.context import TrainRunContext  # noqa: E402
from ray.train.v2._internal.execution.failure_handling import FailureDecision  # noqa: E402
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy  # noqa: E402
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.v2.api.exceptions import WorkerGroupError  # noqa: E402

from prima_ray.training import elastic_ray  # noqa: E402
from prima_ray.training.elastic_ray import FreshNodesPolicy, LeavingIsNoFailure, SaveBeforeLeaving  # noqa: E402
from prima_ray.training.leaving import PLAIN, GroupLeaves, ask_to_leave, has_left  # noqa: E402


def failure(error: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", {1: UserExceptionWithTraceback(error, "a traceback")})


def test_leaving_in_time_is_no_failure_and_all_else_is():
    policy = LeavingIsNoFailure(FailureConfig(max_failures=1))
    decisions = [policy.make_decision(failure(GroupLeaves())) for _ in range(5)]
    assert decisions == [FailureDecision.RETRY] * 5
    decisions = [policy.make_decision(failure(RuntimeError())) for _ in range(2)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RAISE]


def test_nodes_that_are_drained_are_not_counted(monkeypatch: pytest.MonkeyPatch):
    reserved = {"stays": {"CPU": 2.0}, "goes": {"CPU": 2.0}}
    recounts: list[int] = []
    monkeypatch.setattr(ElasticScalingPolicy, "_get_reserved_resources", lambda self: reserved)
    monkeypatch.setattr(FreshNodesPolicy, "_recount", lambda self: recounts.append(1))
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: {"goes": 0})
    policy = FreshNodesPolicy(ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2}))
    found = policy._get_reserved_resources()
    assert found == {"stays": {"CPU": 2.0}}
    assert policy._count_possible_workers(found) == 1
    assert recounts == [1], "the count was fresh"


def test_a_controller_asks_in_the_name_of_its_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FreshNodesPolicy, "_send_resource_request", lambda self: None)
    names = []
    for name in ("align", "align", "fuse"):
        policy = FreshNodesPolicy(ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2}))
        context = TrainRunContext(
            run_config=RunConfig(name=name, storage_path="/shared/runs"), train_loop_config=None,
            scaling_config=policy.scaling_config, backend_config=None, dataset_config=None,
        )  # fmt: skip
        policy.after_controller_start(context)
        names.append(policy._requester_id)
    assert names == ["train-/shared/runs/align"] * 2 + ["train-/shared/runs/fuse"]


class Status:
    def __init__(self, *, errors: Any = None, finished: bool = False) -> None:
        self.errors, self.finished = errors or {}, finished


class Group:
    """Two workers that leave when they have been asked a few times whether they have."""

    def __init__(self, status: Status | None, *, leaves_after: int = 2) -> None:
        self._status, self._leaves_after = status, leaves_after
        self.calls: list[Any] = []

    def has_started(self) -> bool:
        return True

    def get_latest_poll_status(self) -> Status | None:
        return self._status

    def execute_async(self, function: Any) -> list[Any]:
        self.calls.append(function)
        return [function is ask_to_leave or self.calls.count(has_left) > self._leaves_after] * 2


def end(group: Group, *, patience_s: float = 30.0) -> list[Any]:
    callback = SaveBeforeLeaving(patience_s=patience_s)
    callback.after_worker_group_start(group)
    with callback.on_worker_group_shutdown():
        pass
    return group.calls


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda values, timeout=None: values)


def test_a_healthy_group_is_asked_to_leave_and_waited_for(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        calls = end(Group(Status()))
    assert calls == [ask_to_leave, has_left, has_left, has_left]
    assert "the workers saved and left within" in caplog.text


@pytest.mark.parametrize("status", [Status(errors={0: RuntimeError()}), Status(finished=True)])
def test_a_group_that_failed_or_finished_is_not_asked(status: Status):
    assert end(Group(status)) == []


def test_a_group_that_does_not_answer_is_given_up(caplog: pytest.LogCaptureFixture):
    end(Group(Status(), leaves_after=10**9), patience_s=0.3)
    assert "the workers did not save within 0.3 s: what came after the last checkpoint is replayed" in caplog.text


def test_a_worker_that_dies_meanwhile_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def dead(*_: Any, **__: Any) -> None:
        raise ray.exceptions.RayActorError

    monkeypatch.setattr(ray, "get", dead)
    end(Group(Status()))
    assert "the workers could not save before they left (RayActorError)" in caplog.text


def test_ray_train_can_be_left_as_it_is(monkeypatch: pytest.MonkeyPatch):
    assert len(elastic_ray.callbacks(patience_s=1)) == 1
    monkeypatch.setenv(PLAIN, "1")
    assert elastic_ray.callbacks(patience_s=1) == []
