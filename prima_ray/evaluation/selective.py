"""Selective prediction: how much better answers are where a model is surer, and what is left unanswered for it.

Exams are answered in the order of their confidence, the largest probability. At coverage c the surest share c is
answered; the risk is the share of wrong ones among them. Exams of equal confidence cannot be told apart: each counts
with the mean error of them all, so the order of the rows means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prima_ray.evaluation.metrics import Labels, Probabilities

COVERAGES = (0.5, 0.7, 0.8, 0.9, 1.0)
Curve = NDArray[np.float64]


def risk_coverage(labels: Labels, probabilities: Probabilities) -> tuple[Curve, Curve]:
    """Coverage 1/N ... 1 and the risk there, (N,) each (El-Yaniv and Wiener 2010)."""
    confidence = probabilities.max(axis=1) if len(labels) else np.zeros(0)
    wrong = (probabilities.argmax(axis=1) != labels).astype(np.float64) if len(labels) else np.zeros(0)
    _, group, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    shared = np.bincount(group, weights=wrong, minlength=len(counts)) / np.maximum(counts, 1)
    answered = np.arange(1, len(labels) + 1)
    return answered / max(len(labels), 1), np.cumsum(np.repeat(shared, counts)) / answered


def selective_figures(
    labels: Labels, probabilities: Probabilities, coverages: Sequence[float] = COVERAGES
) -> dict[str, float]:
    """`aurc`, the mean risk over all coverages (Geifman and El-Yaniv 2017; lower is better), `excess_aurc`, that minus
    what the same errors would give in the best order (Geifman et al. 2019), and `accuracy_at_<coverage>`, of the surest
    ceil(coverage * N) exams. NaN of no exams.
    """
    count = len(labels)
    if not count:
        return dict.fromkeys(("aurc", "excess_aurc", *map(accuracy_name, coverages)), float("nan"))
    _, risk = risk_coverage(labels, probabilities)
    num_wrong = round(float(risk[-1]) * count)
    answered = np.arange(1, count + 1)
    best = np.maximum(answered - (count - num_wrong), 0) / answered
    places = [max(1, math.ceil(round(coverage * count, 9))) for coverage in coverages]
    return {
        "aurc": float(risk.mean()),
        "excess_aurc": float(risk.mean() - best.mean()),
        **{
            accuracy_name(coverage): float(1 - risk[place - 1])
            for coverage, place in zip(coverages, places, strict=True)
        },
    }


def accuracy_name(coverage: float) -> str:
    """The figure's name: `accuracy_at_0.9`."""
    return f"accuracy_at_{coverage:g}"
