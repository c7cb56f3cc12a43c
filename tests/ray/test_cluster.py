"""What the processes of a cluster are told when they start."""

from __future__ import annotations

import os
from typing import Any

import pytest


def test_a_worker_knows_its_cluster_also_beside_another_one(cluster: Any) -> None:
    @cluster.remote
    def address() -> str | None:
        return os.environ.get("RAY_ADDRESS")

    assert cluster.get(address.remote()) == cluster.get_runtime_context().gcs_address


def test_what_a_worker_prints_reaches_stderr_alone(cluster: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The last line on stdout is a command's answer."""

    @cluster.remote
    def say() -> bool:
        print("said by a worker", flush=True)  # noqa: T201
        return True

    assert cluster.get(say.remote())
    assert "said by a worker" not in capfd.readouterr().out
