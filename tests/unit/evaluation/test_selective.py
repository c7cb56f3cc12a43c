from __future__ import annotations

import math

import numpy as np
import pytest

from prima_ray.evaluation.selective import risk_coverage, selective_figures


def test_a_curve_by_hand() -> None:
    """Confidences 0.9 right, 0.8 wrong, 0.7 right, 0.6 wrong."""
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    labels = np.zeros(4, dtype=np.int64)
    coverage, risk = risk_coverage(labels, probabilities)
    assert coverage == pytest.approx([0.25, 0.5, 0.75, 1])
    assert risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    found = selective_figures(labels, probabilities, (0.5, 0.6, 1.0))
    assert found["aurc"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
    # The best order answers both right ones first: risks 0, 0, 1/3, 1/2.
    assert found["excess_aurc"] == pytest.approx(found["aurc"] - (1 / 3 + 1 / 2) / 4)
    assert (found["accuracy_at_0.5"], found["accuracy_at_1"]) == (0.5, 0.5)
    assert found["accuracy_at_0.6"] == pytest.approx(2 / 3)


def test_written_out_in_a_loop_with_ties_in_any_order() -> None:
    rng = np.random.default_rng(0)
    probabilities = np.round(rng.dirichlet(np.ones(3), 200), 1)
    labels = rng.integers(0, 3, 200)
    confidence, wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != labels
    risks, before, errors = [], 0, 0.0
    for level in sorted(set(confidence), reverse=True):
        tied = confidence == level
        for number in range(1, tied.sum() + 1):
            # The expected number of errors among `number` of the tied exams, drawn at random.
            risks.append((errors + number * wrong[tied].mean()) / (before + number))
        before, errors = before + tied.sum(), errors + wrong[tied].sum()
    assert risk_coverage(labels, probabilities)[1] == pytest.approx(risks)
    shuffled = rng.permutation(200)
    found = selective_figures(labels, probabilities)
    assert selective_figures(labels[shuffled], probabilities[shuffled]) == pytest.approx(found)
    assert found["accuracy_at_1"] == pytest.approx(1 - wrong.mean())


def test_of_no_exams_nothing_is_said() -> None:
    found = selective_figures(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))
    assert all(math.isnan(value) for value in found.values())
    assert risk_coverage(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))[0].shape == (0,)
