"""CPUs, GPUs and nodes against the config, with the texts a user reads."""

from __future__ import annotations

from typing import Any

import pytest

from prima_ray.training.checks import Finding, Subject, refuse, run_checks
from prima_ray.training.checks.budget import BUDGET
from prima_ray.training.cluster import ClusterView, Node, planned_view
from prima_ray.training.config import LoopConfig, RayContextConfig
from prima_ray.training.facts import Facts

HERE = Facts(host="here", python="3.11.7")
ADD = "or add a node; set context.autoscales where the cluster adds them by itself."


def loop(num_workers: Any = 2, **context: Any) -> LoopConfig:
    return LoopConfig.model_validate(
        {
            "out": "runs/x",
            "num_workers": num_workers,
            "context": {"kind": "ray", "address": "10.0.0.1:6379", **context},
            "optimizer": {"lr": 1e-3},
            "selection": {"metric": "loss", "mode": "min"},
        }
    )


def cluster(*nodes: tuple[float, float]) -> ClusterView:
    return ClusterView("10.0.0.1:6379", tuple(Node(f"10.0.0.{i + 1}", *node) for i, node in enumerate(nodes)))


def found(config: LoopConfig, view: ClusterView) -> list[Finding]:
    return run_checks(BUDGET, Subject(here=HERE, config=config, cluster=view))


@pytest.mark.parametrize(
    ("config", "view", "level", "text"),
    [
        (
            loop(cpus_per_worker=1),
            cluster((2, 0)),
            "error",
            "2 workers of 1 CPUs leave 0 of the cluster's 2 CPUs to Ray Data, which needs at least 1: training would "
            f"wait for ever\n  Lower num_workers or context.cpus_per_worker, {ADD}",
        ),
        (
            loop(gpus_per_worker=1),
            cluster((8, 1)),
            "error",
            "2 workers of 1 GPUs want more than the cluster's 1\n"
            f"  Lower num_workers or context.gpus_per_worker, {ADD}",
        ),
        (
            loop(cpus_per_worker=3),
            cluster((4, 0), (2, 0), (2, 0)),
            "error",
            "a worker of 3 CPUs lies on one node, and there is room for 1 of 2 (10.0.0.1 4 CPUs, 0 GPUs, "
            "10.0.0.2 2 CPUs, 0 GPUs, 10.0.0.3 2 CPUs, 0 GPUs)\n"
            "  Lower context.cpus_per_worker or context.gpus_per_worker, or use larger nodes.",
        ),
        (
            loop(),
            cluster((2, 0), (8, 4)),
            "warning",
            "the cluster has 4 GPUs, and the config uses none\n"
            "  Set context.gpus_per_worker to 1, or ignore this if the GPUs are for others.",
        ),
        (
            loop(cpus_per_worker=1, autoscales=True),
            cluster((2, 0)),
            "warning",
            "10.0.0.1:6379: 2 workers of 1 CPUs leave 0 of the cluster's 2 CPUs to Ray Data, which needs at least 1: "
            "the job waits until nodes have been added",
        ),
        (
            loop([1, 4], gpus_per_worker=1, autoscales=True),
            cluster((8, 0)),
            "warning",
            "10.0.0.1:6379: 1 workers of 1 GPUs want more than the cluster's 0: the job waits until "
            "nodes have been added",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_its_sums(config: LoopConfig, view: ClusterView, level: str, text: str) -> None:
    assert [str(item.as_error()) for item in found(config, view) if item.level != "ok"] == [text]
    assert [item.level for item in found(config, view) if item.level != "ok"] == [level]


def test_what_fits_is_said_too() -> None:
    texts = [(item.level, item.check, item.what) for item in found(loop(gpus_per_worker=1), cluster((4, 2), (4, 0)))]
    assert texts == [
        ("ok", "cpu budget", "8 CPUs, of which 2 workers take 1"),
        ("ok", "gpu budget", "2 GPUs, of which 2 workers take 2"),
    ]


def test_an_elastic_run_needs_room_for_its_least_number_of_workers() -> None:
    items = found(loop([1, 4], cpus_per_worker=1), cluster((3, 0)))
    assert [(item.level, item.what) for item in items] == [
        ("ok", "3 CPUs, of which 1 workers take 1"),
        ("ok", "not enough CPUs for the largest number of workers: the run starts with up to 3 and grows"),
    ]


def test_a_cluster_of_ones_own_is_computed_as_it_would_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    enough = RayContextConfig(cpus_per_worker=1)
    assert planned_view(enough, num_workers=4, gpus=1).nodes == (Node("this machine", 6.0, 1.0),)
    config = loop(2, address=None, num_cpus=2, cpus_per_worker=1)
    assert isinstance(config.context, RayContextConfig)
    (item,) = [
        item for item in found(config, planned_view(config.context, num_workers=2, gpus=0)) if item.level != "ok"
    ]
    assert item.mend == "Lower num_workers or context.cpus_per_worker, or raise context.num_cpus."


def test_the_first_error_is_raised_and_warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Exception, match="second") as caught:
        refuse([Finding("warning", "first", "here", "Mend it."), Finding("error", "second"), Finding("error", "third")])
    assert str(caught.value) == "second"
    assert caplog.messages == ["warning: here: first\n  Mend it."]
