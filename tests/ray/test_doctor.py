"""`prima doctor` asks a cluster that is there, every node of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from prima_ray.training.cluster import node_ids, on_nodes, view
from tests.ray.conftest import LOGICAL_CPUS


def test_a_cluster_that_is_too_small_for_the_config(cluster: Any, tmp_path: Path) -> None:
    address = cluster.get_runtime_context().gcs_address
    config = {
        "out": str(tmp_path / "out"),
        "inputs": {"shards": str(tmp_path / "shards")},
        "image_tower": {"name": "resnet10t", "image_size": 32},
        "views": {"image_size": 32, "num_views": 1},
        "optimizer": {"lr": 1e-3},
        "num_workers": LOGICAL_CPUS,
        "context": {"kind": "ray", "address": address, "cpus_per_worker": 1},
    }
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(config))
    answer = subprocess.run(
        [sys.executable, "-m", "prima_ray.cli", "doctor", str(path), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert answer.returncode == 2, answer.stderr
    report = json.loads(answer.stdout)
    assert report["cluster"] == address
    by_check = {item["check"]: item for item in report["findings"]}
    assert by_check["cpu budget"]["what"] == (
        f"{LOGICAL_CPUS} workers of 1 CPUs leave 0 of the cluster's {LOGICAL_CPUS} CPUs to Ray Data, which needs at "
        "least 1: training would wait for ever"
    )
    node = address.rpartition(":")[0]
    missing = by_check["inputs on every node"]
    assert (missing["where"], missing["what"]) == (f"{node}: {tmp_path}/shards", "is not there on this node")
    # The node has written beside `out`, the driver has seen it, and nothing is left.
    assert by_check["writable"]["level"] == "ok"
    assert [item.name for item in tmp_path.iterdir()] == ["finetune.yaml"]
    # The node answers for itself.
    assert [item["where"] for item in report["findings"] if item["check"] == "versions"] == [node]


def test_a_node_that_fails_is_an_answer_too(cluster: Any) -> None:
    (node,) = node_ids()
    assert on_nodes({node: os.getpid})[node] != os.getpid()
    failed = on_nodes({node: _fail})[node]
    assert str(failed) == "gave no answer (ValueError: broken)"
    assert view().cpus == LOGICAL_CPUS


def _fail() -> None:
    raise ValueError("broken")
