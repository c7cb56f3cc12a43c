from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from prima_ray.evaluation.metrics import HEADLINE, confusion, headline, per_class


def one_hot(predicted: list[int], num_classes: int = 3) -> np.ndarray:
    return np.eye(num_classes)[predicted]


def draw(seed: int, *, num_exams: int = 60, num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_exams)
    probabilities = rng.dirichlet(np.ones(num_classes), num_exams).round(2)  # rounded, so that there are ties
    return labels, probabilities


def test_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    found = headline(labels, one_hot([0, 0, 1, 1, 2, 2]))
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found["macro_f1"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (2 + 2) + 2 * 1 / (1 + 2)) / 3)
    # Hard answers have the AUROC (sensitivity + specificity) / 2.
    assert found["auroc"] == pytest.approx(((2 / 3 + 1) / 2 + (1 / 2 + 3 / 4) / 2 + (1 + 4 / 5) / 2) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_as_scikit_learn_has_it(seed: int) -> None:
    labels, probabilities = draw(seed)
    predicted = probabilities.argmax(axis=1)
    areas = [sk.roc_auc_score(labels == index, probabilities[:, index]) for index in range(4)]
    assert headline(labels, probabilities) == pytest.approx(
        {
            "macro_f1": sk.f1_score(labels, predicted, average="macro"),
            "accuracy": sk.accuracy_score(labels, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
            "auroc": np.mean(areas),
        }
    )
    assert confusion(labels, probabilities).tolist() == sk.confusion_matrix(labels, predicted).tolist()
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, predicted)
    for index, row in enumerate(per_class(labels, probabilities, "abcd")):
        assert row == pytest.approx(
            {
                "class": "abcd"[index],
                "precision": precision[index],
                "recall": recall[index],
                "f1": f1[index],
                "auroc": areas[index],
                "num_exams": support[index],
            }
        )


def test_a_class_that_does_not_occur_is_left_out_of_the_averages() -> None:
    labels = np.array([0, 0, 1, 1])
    probabilities = one_hot([0, 2, 1, 1])
    found = headline(labels, probabilities)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    row = per_class(labels, probabilities, "abc")[2]
    assert row["num_exams"] == 0
    assert row["precision"] == 0
    assert all(math.isnan(row[key]) for key in ("recall", "f1", "auroc"))


def test_one_class_alone_has_no_auroc_and_no_exams_have_no_figure() -> None:
    alone = headline(np.array([1, 1]), one_hot([1, 0]))
    assert alone["accuracy"] == 0.5
    assert math.isnan(alone["auroc"])
    none = headline(np.empty(0, dtype=np.int64), np.empty((0, 3)))
    assert list(none) == list(HEADLINE)
    assert all(math.isnan(value) for value in none.values())
    assert confusion(np.empty(0, dtype=np.int64), np.empty((0, 3))).tolist() == [[0] * 3] * 3


def test_equal_probabilities_everywhere_are_worth_one_half() -> None:
    found = headline(np.array([0, 1, 2, 2]), np.full((4, 3), 1 / 3))
    assert found["auroc"] == 0.5
