from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.data.batch import ImageTextBatch
from prima_ray.training.classification import (
    class_weights,
    classification_loss,
    classification_metrics,
    exam_weights,
    observe_classification,
)

CLASSES = ("A", "B", "C")


def batch(labels: list[int], weights: list[float] | None = None) -> ImageTextBatch:
    return ImageTextBatch(
        exam_ids=tuple(str(number) for number in range(len(labels))),
        weights=torch.tensor(weights or [1.0] * len(labels)),
        labels=torch.tensor(labels),
    )


def test_balanced_weights_give_every_class_the_same_sum_and_the_mean_one():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, -1])
    weights = class_weights(labels, CLASSES, "balanced")
    assert weights == pytest.approx((7 / 12, 7 / 6, 7 / 3))
    assert class_weights(labels, CLASSES, "none") == pytest.approx((1.0, 1.0, 1.0))
    root = class_weights(labels, CLASSES, "sqrt")
    assert root[2] / root[0] == pytest.approx(2.0)
    assert sum(root[label] for label in labels[:-1]) == pytest.approx(7.0)


def test_a_class_without_training_exams_is_a_mistake():
    with pytest.raises(PrimaError, match="no training exam is labelled B, C"):
        class_weights(np.array([0, -1]), CLASSES, "balanced")


def test_the_loss_of_members_is_the_mean_of_theirs():
    weights = (1.0, 2.0, 0.5)
    said = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    whole = batch([0, 1, -1, 2])
    total = exam_weights(whole, weights).sum()

    def value(logits):
        return classification_loss(logits, whole, weights=weights, label_smoothing=0.1, total_weight=total)

    assert float(value(said)) == pytest.approx(float(value(said[:, 0]) + value(said[:, 1])) / 2, rel=1e-6)


def test_losses_of_micro_batches_add_up_to_the_weighted_mean():
    weights = (1.0, 2.0, 0.5)
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    whole = batch([0, 1, 2, -1, 1], [1, 1, 1, 1, 0])
    total = exam_weights(whole, weights).sum()
    value = classification_loss(logits, whole, weights=weights, label_smoothing=0.0, total_weight=total)
    log_probs = logits.double().log_softmax(1)
    expected = -(log_probs[0, 0] + 2 * log_probs[1, 1] + 0.5 * log_probs[2, 2]) / 3.5
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    pieces = [
        classification_loss(logits[start : start + 2], piece, weights=weights, label_smoothing=0.0, total_weight=total)
        for start, piece in zip((0, 2, 4), whole.split(2), strict=True)
    ]
    assert float(sum(pieces)) == pytest.approx(float(expected), rel=1e-6)


def test_a_batch_of_padding_is_zero_and_has_a_gradient_of_zero():
    logits = torch.randn(2, 3, requires_grad=True)
    empty = batch([0, -1], [0, 1])
    value = classification_loss(logits, empty, weights=(1, 1, 1), label_smoothing=0.1, total_weight=torch.zeros(()))
    value.backward()
    assert float(value) == 0.0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_metrics_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    observed = observe_classification({"logits": probabilities.log()}, batch([0, 1, 1, -1]))
    found = classification_metrics(observed, weights=(1.0, 3.0, 1.0))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    losses = [-math.log(0.7), -math.log(0.3), -math.log(0.8)]
    assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found["weighted_loss"] == pytest.approx((losses[0] + 3 * losses[1] + 3 * losses[2]) / 7, rel=1e-5)
