"""Whether probabilities can be believed: the figures of calibration and of prediction sets, in numpy.

To add one: a line in `reliability`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_ray.evaluation.metrics import Labels, Probabilities

ECE_BINS = 15


def nll(labels: Labels, probabilities: Probabilities) -> float:
    """Mean negative log-likelihood, in nats; NaN where there are no exams.

    Args:
        labels: (N,) class indices, none negative.
        probabilities: (N, C).
    """
    if not len(labels):
        return float("nan")
    mine = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(mine, np.finfo(np.float64).tiny)).mean())


def brier(labels: Labels, probabilities: Probabilities) -> float:
    """Brier's score (1950), 0 to 2: the mean over exams of the squared distance to the one-hot truth, over all
    classes."""
    if not len(labels):
        return float("nan")
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def expected_calibration_error(labels: Labels, probabilities: Probabilities, *, num_bins: int = ECE_BINS) -> float:
    """ECE (Naeini et al. 2015; Guo et al. 2017): |accuracy - mean confidence| of equal-width bins of the confidence, by
    size.

    Biased upwards where bins hold few exams: compare it between models on the same exams, not with zero.
    """
    if not len(labels):
        return float("nan")
    place, confidence, right = _binned(labels, probabilities, num_bins)
    gaps = np.bincount(place, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def reliability_bins(labels: Labels, probabilities: Probabilities, *, num_bins: int = 10) -> list[dict[str, Any]]:
    """What a reliability diagram shows: of the bins that hold exams `low`, `high`, `num_exams`, the mean `confidence`
    and the `accuracy`."""
    if not len(labels):
        return []
    place, confidence, right = _binned(labels, probabilities, num_bins)
    return [
        {
            "low": index / num_bins,
            "high": (index + 1) / num_bins,
            "num_exams": int((place == index).sum()),
            "confidence": float(confidence[place == index].mean()),
            "accuracy": float(right[place == index].mean()),
        }
        for index in np.unique(place).tolist()
    ]


def _binned(
    labels: Labels, probabilities: Probabilities, num_bins: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """(N,) each: the bin of an exam's confidence, the confidence, and whether the answer is right."""
    confidence = probabilities.max(axis=1)
    # A confidence on an edge belongs to the lower bin, 1.0 to the last.
    place = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    return place, confidence, probabilities.argmax(axis=1) == labels


def reliability(labels: Labels, probabilities: Probabilities) -> dict[str, float]:
    """NLL, ECE and Brier score."""
    return {
        "nll": nll(labels, probabilities),
        "ece": expected_calibration_error(labels, probabilities),
        "brier": brier(labels, probabilities),
    }


def set_figures(labels: Labels, sets: NDArray[np.bool_]) -> dict[str, Any]:
    """How often prediction sets hold the truth, and how large they are.

    Args:
        labels: (N,) class indices.
        sets: (N, C), true for the classes in an exam's set.

    Returns:
        `coverage`, `mean_set_size`, `single_share` (sets of one class), `coverage_by_class`,
        `set_size_by_class`, (C,) each, NaN for a class that does not occur.
    """
    count, num_classes = sets.shape
    if not count:
        missing = float("nan")
        return {
            "coverage": missing,
            "mean_set_size": missing,
            "single_share": missing,
            "coverage_by_class": [missing] * num_classes,
            "set_size_by_class": [missing] * num_classes,
        }
    held = sets[np.arange(count), labels]
    sizes = sets.sum(axis=1)

    def by_class(values: NDArray[Any]) -> list[float]:
        groups = [values[labels == index] for index in range(num_classes)]
        return [float(group.mean()) if len(group) else float("nan") for group in groups]

    return {
        "coverage": float(held.mean()),
        "mean_set_size": float(sizes.mean()),
        "single_share": float((sizes == 1).mean()),
        "coverage_by_class": by_class(held),
        "set_size_by_class": by_class(sizes),
    }
