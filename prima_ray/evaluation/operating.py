"""Operating points: a group of classes against the rest (malignant against benign), read at a fixed specificity.

The score of an exam is the sum of the group's probabilities; an exam is called positive where its score is above a
threshold. A threshold that is read off the scored exams themselves (`operating_figures`) flatters a little; one that
was set on other exams (`Threshold`) does not, and tells what specificity comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.evaluation.metrics import Draws, Figures, Labels, Probabilities, Weights, area_under_roc, ratio

SPECIFICITIES = (0.9, 0.95)


def positive_classes(data_set: DataSetConfig, named: Sequence[str] | None = None) -> tuple[int, ...]:
    """Indices of the classes that are called positive: those named, else those the data set declares malignant.

    Returns:
        none where nothing is declared, or everything is: there is no such question then.

    Raises:
        PrimaError: ``named`` holds a class that is not there, or leaves none on one side.
    """
    names = data_set.class_names
    if named is None:
        found = tuple(index for index, item in enumerate(data_set.classes) if item.malignant)
        return found if len(found) < len(names) else ()
    unknown = [name for name in named if name not in names]
    if unknown:
        raise PrimaError(f"positive: {data_set.name} has no class {unknown[0]!r}", mend=f"Classes: {', '.join(names)}.")
    found = tuple(index for index, name in enumerate(names) if name in named)
    if not 0 < len(found) < len(names):
        raise PrimaError("positive: names all classes, or none", mend=f"Name some of {', '.join(names)}.")
    return found


def score_of(probabilities: Probabilities, positive: Sequence[int]) -> NDArray[np.float64]:
    """(N,) the probability of the group."""
    found: NDArray[np.float64] = probabilities[:, list(positive)].sum(axis=1)
    return found


def sensitivity_name(specificity: float) -> str:
    """The figure's name: `sensitivity_at_0.95`."""
    return f"sensitivity_at_{specificity:g}"


def operating_figures(positive: Sequence[int], specificities: Sequence[float] = SPECIFICITIES) -> Figures:
    """AUROC of the group against the rest (`auroc`), and the largest sensitivity of any threshold on these exams whose
    specificity is at least each one given; NaN where a side has no exam.
    """

    def figures(labels: Labels, probabilities: Probabilities, weights: Weights) -> Draws:
        truth, scores = np.isin(labels, positive), score_of(probabilities, positive)
        found = {"auroc": area_under_roc(truth, scores, weights)}
        for specificity in specificities:
            found[sensitivity_name(specificity)] = _sensitivity(truth, scores, weights, specificity)
        return found

    return figures


def _sensitivity(
    truth: NDArray[np.bool_], scores: NDArray[np.float64], weights: Weights, specificity: float
) -> NDArray[np.float64]:
    positives, negatives = weights[:, truth], weights[:, ~truth]
    levels = _limits(scores[~truth], negatives, specificity)
    caught = (positives * (scores[truth] > levels[:, None])).sum(axis=1)
    missing = negatives.sum(axis=1) == 0
    return np.where(missing, np.nan, ratio(caught, positives.sum(axis=1)))


def _limits(scores: NDArray[np.float64], weights: Weights, specificity: float) -> NDArray[np.float64]:
    """(B,) the lowest threshold above which at most the allowed share of the negatives lies."""
    if not len(scores):
        return np.full(len(weights), np.nan)
    order = np.argsort(-scores, kind="stable")
    above = np.cumsum(weights[:, order], axis=1)
    # 0.1 of 30 is 3: floats must not ask for one exam less.
    allowed = np.floor(np.round((1 - specificity) * above[:, -1], 9))
    beyond = above > allowed[:, None]
    limit: NDArray[np.float64] = scores[order][beyond.argmax(axis=1)]
    return np.where(beyond.any(axis=1), limit, -np.inf)


@dataclass(frozen=True)
class Threshold:
    """A threshold that was set on some exams, for others."""

    specificity: float
    """That was asked for."""
    score: float
    """Above it an exam is called positive."""
    num_negatives: int
    """Exams it was set on."""


def set_threshold(
    labels: Labels, probabilities: Probabilities, positive: Sequence[int], specificity: float
) -> Threshold | None:
    """The lowest threshold that has the specificity on these exams; None where none of them is negative."""
    negative = ~np.isin(labels, positive)
    if not negative.any():
        return None
    scores = score_of(probabilities, positive)[negative]
    (score,) = _limits(scores, np.ones((1, len(scores))), specificity)
    return Threshold(specificity, float(score), int(negative.sum()))


def threshold_figures(positive: Sequence[int], threshold: float) -> Figures:
    """`sensitivity` and `specificity` of a threshold."""

    def figures(labels: Labels, probabilities: Probabilities, weights: Weights) -> Draws:
        truth, called = np.isin(labels, positive), score_of(probabilities, positive) > threshold
        return {
            "sensitivity": ratio(weights @ (truth & called), weights @ truth.astype(np.float64)),
            "specificity": ratio(weights @ (~truth & ~called), weights @ (~truth).astype(np.float64)),
        }

    return figures
