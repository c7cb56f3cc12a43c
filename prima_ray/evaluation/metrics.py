"""The figures of a classifier over a closed set of diagnoses, in numpy: the bootstrap asks for them by the thousand.

The tests compare them with scikit-learn's. To add one: a line in `headline`, and its name in `HEADLINE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]

HEADLINE = {
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
}
"""Name -> title of the figures that every table shows."""


def headline(labels: Labels, probabilities: Probabilities) -> dict[str, float]:
    """Macro F1, accuracy, balanced accuracy, macro one-vs-rest AUROC; NaN where there are no exams.

    Averages run over the classes that occur among ``labels``: a subset without a class is not punished for it. The
    AUROC is NaN where only one class occurs.

    Args:
        labels: (N,) class indices, none negative.
        probabilities: (N, C).
    """
    if not len(labels):
        return dict.fromkeys(HEADLINE, float("nan"))
    counts = confusion(labels, probabilities)
    hits, support, predicted = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
    present = support > 0
    return {
        "macro_f1": float(np.mean((2 * hits / np.maximum(support + predicted, 1))[present])),
        "accuracy": float(hits.sum() / len(labels)),
        # The mean recall over the classes that occur.
        "balanced_accuracy": float(np.mean(hits[present] / support[present])),
        "auroc": _mean(_one_vs_rest(labels, probabilities)),
    }


def per_class(labels: Labels, probabilities: Probabilities, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1, AUROC and number of exams of every class.

    Recall, F1 and AUROC are NaN for a class that does not occur, precision for one that is never predicted.
    """
    counts = confusion(labels, probabilities)
    areas = _one_vs_rest(labels, probabilities)
    rows = []
    for index, name in enumerate(class_names):
        hits, support, predicted = int(counts[index, index]), int(counts[index].sum()), int(counts[:, index].sum())
        rows.append(
            {
                "class": name,
                "precision": hits / predicted if predicted else float("nan"),
                "recall": hits / support if support else float("nan"),
                "f1": 2 * hits / (support + predicted) if support else float("nan"),
                "auroc": float(areas[index]),
                "num_exams": support,
            }
        )
    return rows


def confusion(labels: Labels, probabilities: Probabilities) -> NDArray[np.int64]:
    """(C, C) counts: true class by row, predicted class by column."""
    num_classes = probabilities.shape[1]
    cells = labels * num_classes + probabilities.argmax(axis=1)
    counts: NDArray[np.int64] = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    return counts


def _one_vs_rest(labels: Labels, probabilities: Probabilities) -> NDArray[np.float64]:
    """(C,) AUROC of every class against all others; NaN where there is no such pair."""
    areas = np.full(probabilities.shape[1], np.nan)
    for index in range(probabilities.shape[1]):
        mine = labels == index
        num_mine, num_others = int(mine.sum()), int(len(labels) - mine.sum())
        if num_mine and num_others:
            # Mann and Whitney: the share of (mine, other) pairs in the right order, ties counting one half.
            wins = _ranks(probabilities[:, index])[mine].sum() - num_mine * (num_mine + 1) / 2
            areas[index] = wins / (num_mine * num_others)
    return areas


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
