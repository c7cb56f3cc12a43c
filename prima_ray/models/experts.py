"""Experts: what each modality says by itself, pooled with the fusion model.

A log-linear pool (Genest & Zidek 1986, "Combining probability distributions"; a product of experts, Hinton 2002): log p
= sum_k w_k log p_k / sum_k w_k + const. Every expert learns from a loss of its own, so none leans on another that knows
the training rows by heart: fine-tuned on a few hundred exams, a photo classifier does.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from prima_ray.base import StrictConfig
from prima_ray.data.batch import ImageTextBatch


class ExpertsConfig(StrictConfig):
    """Weights of the pool; 0 leaves an expert out."""

    fusion: float = Field(default=1.0, gt=0)
    photos: float = Field(default=1.0, ge=0)
    """The classifier of `inputs.photos`."""
    attributes: float = Field(default=1.0, ge=0)
    """A logistic regression of the attributes' vector, fitted on the training rows with the loss's class weights."""
    inverse_penalty: float = Field(default=1.0, gt=0)
    """C of that regression."""
    block_dropout: float | None = Field(default=None, ge=0, le=1)
    """Share of that regression's weight on the training rows without the blocks of attributes that go missing together;
    `null`: the text's `block_dropout`."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.photos or self.attributes):
            raise ValueError("photos and attributes are both 0: there is nothing to pool (set experts to null)")
        return self


class AttributeExpert(nn.Module):
    """The attributes' vector (N, A) -> logits (N, C), linear and frozen."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, num_classes)
        self.requires_grad_(False)

    @classmethod
    def fit(
        cls,
        vectors: NDArray[np.float32],
        labels: NDArray[np.int64],
        weights: NDArray[np.float64],
        *,
        num_classes: int,
        inverse_penalty: float,
    ) -> Self:
        """Multinomial logistic regression with a quadratic penalty.

        Args:
            vectors: (N, A).
            labels: (N,) class indices; every class occurs.
            weights: (N,) of the exams.
        """
        from sklearn.linear_model import LogisticRegression

        fitted: Any = LogisticRegression(C=inverse_penalty, max_iter=5000)
        fitted.fit(vectors.astype(np.float64), labels, sample_weight=weights)
        matrix, bias = fitted.coef_, fitted.intercept_
        if num_classes == 2:
            # Of two classes it keeps one row: the log-odds of the second.
            matrix, bias = np.concatenate([-matrix, matrix]) / 2, np.concatenate([-bias, bias]) / 2
        expert = cls(vectors.shape[1], num_classes)
        with torch.no_grad():
            expert.layer.weight.copy_(torch.from_numpy(matrix))
            expert.layer.bias.copy_(torch.from_numpy(bias))
        return expert

    def forward(self, vectors: Tensor) -> Tensor:
        """See the class."""
        found: Tensor = self.layer(vectors)
        return found


class Pool(nn.Module):
    """A fusion model among experts, which are asked once it has learned: in training it answers alone.

    In a batch: `photo_logits` and `attributes` of the experts that have a weight.
    """

    def __init__(self, config: ExpertsConfig, fusion: nn.Module, attributes: AttributeExpert | None) -> None:
        super().__init__()
        if bool(config.attributes) != (attributes is not None):
            raise ValueError("an expert of the attributes needs a weight, and a weight an expert")
        self.config, self.fusion, self.attributes = config, fusion, attributes

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """`logits` (N, C), log-probabilities of the pool up to a constant; in training what the fusion model gives."""
        said: dict[str, Tensor] = self.fusion(batch)
        if self.training:
            return said
        answer = said["logits"]
        with torch.autocast(answer.device.type, enabled=False):
            parts = [(self.config.fusion, answer.float())]
            if self.config.photos:
                parts.append((self.config.photos, _given(batch.photo_logits, "photo_logits")))
            if self.attributes is not None:
                parts.append((self.config.attributes, self.attributes(_given(batch.attributes, "attributes"))))
            pooled = torch.stack([weight * part.log_softmax(dim=-1) for weight, part in parts]).sum(dim=0)
        return {"logits": pooled / sum(weight for weight, _ in parts)}


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the pool reads {name}, which the batch lacks")
    return value.float()
