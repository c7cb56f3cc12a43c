"""What a linear model reads off fixed features: a logistic regression, every fold predicted by the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_folds(labels: NDArray[np.int64], folds: NDArray[np.int64]) -> None:
    """See that `probe` can be had.

    Args:
        labels: (N,) class indices.
        folds: (N,).

    Raises:
        ValueError: fewer than two folds, or outside of one only one class.
    """
    if len(np.unique(folds)) < 2:
        raise ValueError("a probe needs two folds")
    for fold in np.unique(folds):
        if len(np.unique(labels[folds != fold])) < 2:
            raise ValueError(f"outside of fold {fold} there is only one class")


def probe(features: NDArray[np.float32], labels: NDArray[np.int64], folds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The predicted class of every exam, by a model that has not seen its fold.

    Args:
        features: (N, D).
        labels: (N,) class indices.
        folds: (N,); groups that must not be torn apart share a fold.

    Raises:
        ValueError: see `check_folds`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_folds(labels, folds)
    predicted = np.full(len(labels), -1)
    for fold in np.unique(folds):
        test = folds == fold
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5000))
        predicted[test] = model.fit(features[~test], labels[~test]).predict(features[test])
    return predicted


def probe_figures(predicted: NDArray[np.int64], labels: NDArray[np.int64], folds: NDArray[np.int64]) -> dict[str, Any]:
    """Balanced accuracy and macro F1 of each fold, their mean and standard deviation (ddof = 1).

    Both are over the classes that occur in the fold.
    """
    from sklearn.metrics import f1_score, recall_score

    figures: dict[str, Any] = {"num_exams": len(labels)}
    for name, score in (("balanced_accuracy", recall_score), ("macro_f1", f1_score)):
        values = [
            float(
                score(
                    labels[folds == fold],
                    predicted[folds == fold],
                    labels=np.unique(labels[folds == fold]),
                    average="macro",
                    zero_division=0,
                )
            )
            for fold in np.unique(folds)
        ]
        figures[name] = {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "folds": values,
        }
    return figures
