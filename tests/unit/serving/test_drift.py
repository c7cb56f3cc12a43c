"""Drift of those who ask against those of training."""

from __future__ import annotations

import pytest

from prima_ray.inference.reference import Reference, Variable
from prima_ray.serving.drift import DriftMonitor

REFERENCE = Reference(
    num_train=10, num_val=10, variables={"attribute:itch": Variable(shares={"true": 0.5, "false": 0.5})}
)


def test_the_same_patients_do_not_drift_and_others_do() -> None:
    monitor = DriftMonitor(REFERENCE, window=200, least=100)
    for _ in range(49):
        monitor.add({"attribute:itch": "true"})
        monitor.add({"attribute:itch": "false"})
    assert monitor.distances() == {}
    monitor.add({"attribute:itch": "true"})
    monitor.add({"attribute:itch": "false"})
    assert monitor.distances() == {"attribute:itch": pytest.approx(0.0, abs=1e-9)}
    for _ in range(200):
        monitor.add({"attribute:itch": "true"})
    assert monitor.distances()["attribute:itch"] > 1


def test_a_model_without_a_reference_says_nothing() -> None:
    monitor = DriftMonitor(None, least=0)
    monitor.add({"prediction": "A"})
    assert monitor.distances() == {}
