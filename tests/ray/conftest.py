"""One cluster for all tests in this folder: a start costs ten seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from prima_ray.training.cluster import connect
from prima_ray.training.config import RayContextConfig

LOGICAL_CPUS = 6


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """The ray module, connected. Logical CPUs to spare: with fewer, Ray Data would starve beside the trainers."""
    ray = pytest.importorskip("ray")
    started = not ray.is_initialized()
    if started:
        connect(RayContextConfig(num_cpus=LOGICAL_CPUS), num_workers=2)
    yield ray
    if started:
        ray.shutdown()
