"""The figures of a classifier over a closed set of diagnoses; scikit-learn does the arithmetic.

To add one: a line in `headline`, and its name in `HEADLINE`.
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

    Averages run over the classes that occur among ``labels``: a subset without a class is not punished for it.

    Args:
        labels: (N,) class indices, none negative.
        probabilities: (N, C).
    """
    from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score

    if not len(labels):
        return dict.fromkeys(HEADLINE, float("nan"))
    predicted = probabilities.argmax(axis=1)
    present = np.unique(labels)
    areas = [
        float(roc_auc_score(labels == index, probabilities[:, index]))
        for index in present
        if 0 < int((labels == index).sum()) < len(labels)
    ]
    return {
        "macro_f1": float(f1_score(labels, predicted, labels=present, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(labels, predicted)),
        # The mean recall over the classes that occur.
        "balanced_accuracy": float(recall_score(labels, predicted, labels=present, average="macro", zero_division=0)),
        "auroc": float(np.mean(areas)) if areas else float("nan"),
    }


def per_class(labels: Labels, probabilities: Probabilities, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1, AUROC and number of exams of every class; NaN where the class does not occur."""
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    predicted = probabilities.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(len(class_names)), zero_division=np.nan
    )
    rows = []
    for index, name in enumerate(class_names):
        both = 0 < int(support[index]) < len(labels)
        area = float(roc_auc_score(labels == index, probabilities[:, index])) if both else float("nan")
        rows.append(
            {
                "class": name,
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "auroc": area,
                "num_exams": int(support[index]),
            }
        )
    return rows


def confusion(labels: Labels, probabilities: Probabilities, num_classes: int) -> NDArray[np.int64]:
    """(C, C) counts: true class by row, predicted class by column."""
    from sklearn.metrics import confusion_matrix

    counts: NDArray[np.int64] = confusion_matrix(
        labels, probabilities.argmax(axis=1), labels=np.arange(num_classes)
    ).astype(np.int64)
    return counts
