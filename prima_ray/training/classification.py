"""What finetune and fuse share: cross-entropy on the labels with class weights, and the validation figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.data.batch import ImageTextBatch


class ClassificationLossConfig(StrictConfig):
    """Cross-entropy over the closed set of diagnoses."""

    class_weights: Literal["none", "balanced", "sqrt"] = "balanced"
    """Weight of an exam by its class's count n in the training rows: 1, 1/n, 1/sqrt(n); scaled to mean 1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


def class_weights(
    labels: NDArray[np.int64], class_names: Sequence[str], kind: Literal["none", "balanced", "sqrt"]
) -> tuple[float, ...]:
    """One weight a class, whose mean over the labelled training exams is 1.

    Args:
        labels: (N,) class indices of the training rows; -1 (no label) is left out.

    Raises:
        PrimaError: a class has no training exam, so nothing could learn it.
    """
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names)).astype(np.float64)
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise PrimaError(
            f"no training exam is labelled {', '.join(empty)}",
            mend="Choose another fold, gather more exams, or leave the class out of the data set.",
        )
    power = {"none": 0.0, "balanced": 1.0, "sqrt": 0.5}[kind]
    weights = counts**-power
    return tuple((weights / (weights * counts).sum() * counts.sum()).tolist())


def exam_weights(batch: ImageTextBatch, weights: Sequence[float]) -> Tensor:
    """(N,) float32: the class weight of each exam, 0 for padding and for exams without a label."""
    table = torch.tensor(weights, device=batch.labels.device)
    return torch.where(batch.labels >= 0, table[batch.labels.clamp(min=0)], 0.0) * batch.weights


def classification_loss(
    logits: Tensor, batch: ImageTextBatch, *, weights: Sequence[float], label_smoothing: float, total_weight: Tensor
) -> Tensor:
    """Sum over the exams of weight times cross-entropy, divided by ``total_weight``; the mean of it over members.

    Args:
        logits: (N, C), or (N, M, C) of M members of an ensemble.
        total_weight: () the mean over ranks of the summed `exam_weights` of the whole batch.
    """
    members = logits.float().reshape(len(logits), -1, logits.shape[-1])
    labels = batch.labels.clamp(min=0).repeat_interleave(members.shape[1])
    losses = F.cross_entropy(members.flatten(0, 1), labels, reduction="none", label_smoothing=label_smoothing)
    losses = losses.view(members.shape[:2]).mean(dim=1)
    # A batch of padding alone has the weight 0 and the loss 0, not their quotient.
    return (losses * exam_weights(batch, weights)).sum() / total_weight.clamp(min=torch.finfo(torch.float32).tiny)


def observe_classification(outputs: Mapping[str, Tensor], batch: ImageTextBatch) -> dict[str, Tensor]:
    """(N, C) float32 log-probabilities and (N,) labels of one validation batch."""
    return {"log_probs": F.log_softmax(outputs["logits"].float(), dim=-1), "labels": batch.labels}


CLASSIFICATION_METRICS = ("loss", "weighted_loss", "accuracy", "balanced_accuracy", "macro_f1")
"""What `classification_metrics` reports."""


def classification_metrics(observed: Mapping[str, Tensor], *, weights: Sequence[float]) -> dict[str, float]:
    """Validation figures over the labelled exams: accuracy, balanced accuracy, macro F1, log-losses."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    labels = observed["labels"]
    known = labels >= 0
    labels, log_probs = labels[known], observed["log_probs"][known]
    losses = -log_probs.gather(1, labels[:, None])[:, 0]
    scale = torch.tensor(weights)[labels]
    truth, predicted = labels.numpy(), log_probs.argmax(dim=1).numpy()
    return {
        "loss": float(losses.mean()),
        "weighted_loss": float((losses * scale).sum() / scale.sum()),
        "accuracy": float(accuracy_score(truth, predicted)),
        "balanced_accuracy": float(balanced_accuracy_score(truth, predicted)),
        # Over the classes that occur, so that a small fold without one of them is not punished for it.
        "macro_f1": float(f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0)),
    }


class ClassificationTask:
    """The half of a `Task` that finetune and fuse share; a mixin over `losses` and `class_weights`."""

    interacts: ClassVar[bool] = False
    batch_level: ClassVar[tuple[str, ...]] = ()
    losses: ClassificationLossConfig
    class_weights: tuple[float, ...]
    metric_names: ClassVar[tuple[str, ...]] = CLASSIFICATION_METRICS

    def batch_weight(self, batch: ImageTextBatch) -> Tensor:
        """See `Task`."""
        return exam_weights(batch, self.class_weights).sum()

    def condense(self, outputs: Mapping[str, Tensor], batch: ImageTextBatch) -> dict[str, Tensor]:
        """See `Task`."""
        del batch
        return dict(outputs)

    def loss(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: object, total_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`."""
        del gather
        loss = classification_loss(
            # Of an ensemble what each member says.
            outputs.get("own", outputs["logits"]),
            batch,
            weights=self.class_weights,
            label_smoothing=self.losses.label_smoothing,
            total_weight=total_weight,
        )
        return loss, {}

    def observe(self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: object) -> dict[str, Tensor]:
        """See `Task`."""
        del gather
        return observe_classification(outputs, batch)

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Task`."""
        return classification_metrics(observed, weights=self.class_weights)
