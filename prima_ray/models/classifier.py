"""The photo classifier of finetune: the image tower and a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.dual_encoder import image_features
from prima_ray.models.image_tower import ImageTower


class ImageClassifier(nn.Module):
    """A batch -> logits (N, C), the mean over the exam's real views."""

    def __init__(self, image_tower: ImageTower, num_classes: int) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.head = nn.Linear(image_tower.width, num_classes)

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """See the class."""
        cls, _ = image_features(self.image_tower, batch)
        return {"logits": mean_over_views(self.head(cls), batch.image_mask)}


def mean_over_views(values: Tensor, mask: Tensor | None) -> Tensor:
    """(N, V, ...) -> (N, ...): the mean over the views where ``mask`` (N, V) is true; None: over all."""
    if mask is None:
        return values.mean(dim=1)
    weights = mask.to(values.dtype).reshape(*mask.shape, *[1] * (values.ndim - 2))
    return (values * weights).sum(dim=1) / torch.clamp(weights.sum(dim=1), min=1.0)
