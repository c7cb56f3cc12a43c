"""The figures of a classifier over a closed set of diagnoses, in numpy: the bootstrap asks for them by the thousand.

A set of figures is a function of labels (N,), probabilities (N, C) and weights (B, N), which gives every figure for
each of the B weightings at once: (B,). A weight is how often an exam was drawn; 0 leaves it out. The tests compare the
figures with scikit-learn's. To add one: a line in `headline_draws`, and its name in `HEADLINE`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]
Weights = NDArray[np.float64]
Draws = dict[str, NDArray[np.float64]]
Figures = Callable[[Labels, Probabilities, Weights], Draws]

HEADLINE = {
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
}
"""Name -> title of the figures that every table shows."""


def headline_draws(labels: Labels, probabilities: Probabilities, weights: Weights) -> Draws:
    """Macro F1, accuracy, balanced accuracy, macro one-vs-rest AUROC, (B,) each; NaN where there are no exams.

    Averages run over the classes that occur among the drawn exams: a subset without a class is not punished for it. The
    AUROC is NaN where only one class occurs.

    Args:
        labels: (N,) class indices, none negative.
        probabilities: (N, C).
        weights: (B, N), how often each exam counts.
    """
    counts = confusion_draws(labels, probabilities, weights)
    hits, support, predicted = np.diagonal(counts, axis1=1, axis2=2), counts.sum(axis=2), counts.sum(axis=1)
    present = support > 0
    return {
        "macro_f1": _mean(np.where(present, 2 * hits / np.maximum(support + predicted, 1), np.nan)),
        "accuracy": ratio(hits.sum(axis=1), support.sum(axis=1)),
        # The mean recall over the classes that occur.
        "balanced_accuracy": _mean(ratio(hits, support)),
        "auroc": _mean(_one_vs_rest(labels, probabilities, weights)),
    }


def headline(labels: Labels, probabilities: Probabilities) -> dict[str, float]:
    """The same for the exams as they are, each counted once."""
    return once(headline_draws, labels, probabilities)


def once(figures: Figures, labels: Labels, probabilities: Probabilities) -> dict[str, float]:
    """Any set of figures, each exam counted once."""
    found = figures(labels, probabilities, np.ones((1, len(labels))))
    return {name: float(values[0]) for name, values in found.items()}


def class_figures(class_names: Sequence[str]) -> Figures:
    """Precision, recall, F1 and AUROC of every class, named `<class>.<figure>`; see `per_class`."""

    def figures(labels: Labels, probabilities: Probabilities, weights: Weights) -> Draws:
        counts = confusion_draws(labels, probabilities, weights)
        areas = _one_vs_rest(labels, probabilities, weights)
        found: Draws = {}
        for index, name in enumerate(class_names):
            hits, support, predicted = counts[:, index, index], counts[:, index].sum(axis=1), counts[..., index].sum(1)
            found[f"{name}.precision"] = ratio(hits, predicted)
            found[f"{name}.recall"] = ratio(hits, support)
            found[f"{name}.f1"] = np.where(support > 0, ratio(2 * hits, support + predicted), np.nan)
            found[f"{name}.auroc"] = areas[:, index]
        return found

    return figures


def per_class(labels: Labels, probabilities: Probabilities, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1, AUROC and number of exams of every class.

    Recall, F1 and AUROC are NaN for a class that does not occur, precision for one that is never predicted.
    """
    found = once(class_figures(class_names), labels, probabilities)
    return [
        {
            "class": name,
            **{figure: found[f"{name}.{figure}"] for figure in ("precision", "recall", "f1", "auroc")},
            "num_exams": int((labels == index).sum()),
        }
        for index, name in enumerate(class_names)
    ]


def confusion(labels: Labels, probabilities: Probabilities) -> NDArray[np.int64]:
    """(C, C) counts: true class by row, predicted class by column."""
    counts: NDArray[np.int64] = confusion_draws(labels, probabilities, np.ones((1, len(labels))))[0].astype(np.int64)
    return counts


def confusion_draws(labels: Labels, probabilities: Probabilities, weights: Weights) -> NDArray[np.float64]:
    """(B, C, C): the same for every weighting."""
    num_classes = probabilities.shape[1]
    cells = labels * num_classes + probabilities.argmax(axis=1) if len(labels) else labels
    counts: NDArray[np.float64] = weights @ np.eye(num_classes**2)[cells]
    return counts.reshape(len(weights), num_classes, num_classes)


def area_under_roc(positive: NDArray[np.bool_], scores: NDArray[np.float64], weights: Weights) -> NDArray[np.float64]:
    """(B,) the share of (positive, negative) pairs whose scores are in the right order, ties counting one half (Mann
    and Whitney); NaN where there is no such pair.

    Args:
        positive: (N,).
        scores: (N,).
        weights: (B, N).
    """
    if not len(scores):
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    drawn, mine = weights[:, order], positive[order]
    ups = np.add.reduceat(drawn * mine, starts, axis=1)
    downs = np.add.reduceat(drawn * ~mine, starts, axis=1)
    below = np.cumsum(downs, axis=1) - downs
    return ratio((ups * (below + downs / 2)).sum(axis=1), ups.sum(axis=1) * downs.sum(axis=1))


def ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Element by element; NaN where the whole is zero."""
    found: NDArray[np.float64] = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
    return found


def _one_vs_rest(labels: Labels, probabilities: Probabilities, weights: Weights) -> NDArray[np.float64]:
    """(B, C) AUROC of every class against all others."""
    areas = [area_under_roc(labels == index, scores, weights) for index, scores in enumerate(probabilities.T)]
    return np.stack(areas, axis=1)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B,) of (B, C), over what is a number."""
    finite = np.isfinite(values)
    return ratio(np.where(finite, values, 0.0).sum(axis=1), finite.sum(axis=1).astype(np.float64))
