from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss

from prima_ray.evaluation.reliability import (
    brier,
    expected_calibration_error,
    nll,
    reliability,
    reliability_bins,
    set_figures,
)

LABELS = np.array([0, 1, 1, 2])
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.25, 0.25, 0.5]])


def test_figures_by_hand() -> None:
    assert nll(LABELS, PROBABILITIES) == pytest.approx(-(math.log(0.7 * 0.8 * 0.3 * 0.5)) / 4)
    # 0.3^2 + 0.2^2 + 0.1^2; 0.1^2 + 0.2^2 + 0.1^2; 0.5^2 + 0.7^2 + 0.2^2; 0.25^2 + 0.25^2 + 0.5^2
    assert brier(LABELS, PROBABILITIES) == pytest.approx((0.14 + 0.06 + 0.78 + 0.375) / 4)
    # Confidences 0.7 (right), 0.8 (right), 0.5 (wrong), 0.5 (right), in bins of a tenth; the last two match.
    assert expected_calibration_error(LABELS, PROBABILITIES, num_bins=10) == pytest.approx((0.3 + 0.2 + 0.0) / 4)


def test_the_loss_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), size=200)
    labels = rng.integers(0, 5, 200)
    assert nll(labels, probabilities) == pytest.approx(log_loss(labels, probabilities, labels=range(5)))


def test_of_no_exams_nothing_is_said_and_a_sure_mistake_stays_finite() -> None:
    nothing = reliability(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))
    assert all(math.isnan(value) for value in nothing.values())
    assert 700 < nll(np.array([1]), np.array([[1.0, 0.0]])) < 710


def test_what_sets_hold() -> None:
    sets = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=bool)
    found = set_figures(np.array([0, 1, 1, 0]), sets)
    assert (found["coverage"], found["mean_set_size"], found["single_share"]) == (0.75, 1.75, 0.5)
    assert found["coverage_by_class"][:2] == [1.0, 0.5]
    assert math.isnan(found["coverage_by_class"][2])
    assert found["set_size_by_class"][:2] == [2.0, 1.5]
    assert math.isnan(found["set_size_by_class"][2])


def test_a_diagram_holds_what_the_error_is_made_of() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(4), size=300)
    labels = rng.integers(0, 4, 300)
    bins = reliability_bins(labels, probabilities, num_bins=15)
    assert sum(item["num_exams"] for item in bins) == 300
    gap = sum(item["num_exams"] * abs(item["accuracy"] - item["confidence"]) for item in bins) / 300
    assert gap == pytest.approx(expected_calibration_error(labels, probabilities, num_bins=15))
    assert all(item["low"] < item["confidence"] <= item["high"] for item in bins)
    assert reliability_bins(labels[:0], probabilities[:0]) == []
