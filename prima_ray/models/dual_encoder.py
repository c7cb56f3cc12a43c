"""The dual encoder of align: two towers, a projection head each, and a learnable temperature."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from prima_ray.base import StrictConfig
from prima_ray.data.batch import ImageTextBatch
from prima_ray.models.image_tower import ImageTower
from prima_ray.models.text_tower import TextTower


class ProjectionConfig(StrictConfig):
    """Heads into the shared space."""

    width: int = Field(default=512, gt=0)
    kind: Literal["linear", "mlp"] = "linear"
    """Linear heads did better than deep ones in LumbarCLIP."""


class TemperatureConfig(StrictConfig):
    """The learnable temperature of the image-text losses."""

    initial: float = Field(default=0.07, gt=0)
    minimum: float = Field(default=0.01, gt=0)
    maximum: float = Field(default=1.0, gt=0)
    learnable: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(f"initial {self.initial:g} is not between {self.minimum:g} and {self.maximum:g}")
        return self


class _Clamp(torch.autograd.Function):
    """A clamp out of which a gradient that points inwards still leads; torch's own gradient is zero outside."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, minimum: float, maximum: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = minimum, maximum
        return value.clamp(minimum, maximum)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (value,), (gradient,) = ctx.saved_tensors, gradients
        minimum, maximum = ctx.bounds
        outwards = ((value < minimum) & (gradient > 0)) | ((value > maximum) & (gradient < 0))
        return gradient.masked_fill(outwards, 0.0), None, None


def build_head(in_width: int, config: ProjectionConfig) -> nn.Module:
    """(..., in_width) -> (..., config.width)."""
    if config.kind == "linear":
        return nn.Linear(in_width, config.width)
    return nn.Sequential(nn.Linear(in_width, config.width), nn.GELU(), nn.Linear(config.width, config.width))


class ProjectionHeads(nn.Module):
    """One head a modality, for global features and tokens alike."""

    def __init__(self, config: ProjectionConfig, *, image_width: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.image_width, self.text_width = image_width, text_width
        self.image = build_head(image_width, config)
        self.text = build_head(text_width, config)


def image_features(tower: ImageTower | None, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
    """Global (N, V, C) and token (N, V, K, C) features: the batch's cached ones, else the tower's."""
    if batch.image_cls is not None and batch.image_seq is not None:
        return batch.image_cls, batch.image_seq
    if tower is None or batch.images is None:
        raise ValueError("the batch has neither images for a tower nor cached image features")
    num_exams, num_views = batch.images.shape[:2]
    cls, seq = tower(batch.images.flatten(0, 1))
    return cls.unflatten(0, (num_exams, num_views)), seq.unflatten(0, (num_exams, num_views))


def text_features(tower: TextTower | None, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
    """Global (N, T) and token (N, L, T) features: the batch's cached ones, else the tower's."""
    if batch.text_cls is not None and batch.text_seq is not None:
        return batch.text_cls, batch.text_seq
    if tower is None or batch.input_ids is None or batch.attention_mask is None:
        raise ValueError("the batch has neither tokens for a tower nor cached text features")
    cls, seq = tower(batch.input_ids, batch.attention_mask)
    return cls, seq


class DualEncoder(nn.Module):
    """A batch -> un-normalised projections of both modalities, exams first.

    A tower whose features are cached need not be there: None.
    """

    def __init__(
        self,
        image_tower: ImageTower | None,
        text_tower: TextTower | None,
        heads: ProjectionHeads,
        temperature: TemperatureConfig,
    ) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.heads = heads
        self.temperature_config = temperature
        # Shape (1,): DeepSpeed cannot partition a scalar.
        self.log_temperature = nn.Parameter(
            torch.tensor([math.log(temperature.initial)]), requires_grad=temperature.learnable
        )

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """See the class.

        Returns:
            image_cls (N, V, D), image_seq (N, V, K, D), text_cls (N, D), text_seq (N, L, D), temperature (1,).
        """
        image_cls, image_seq = image_features(self.image_tower, batch)
        text_cls, text_seq = text_features(self.text_tower, batch)
        bounds = self.temperature_config
        return {
            "image_cls": self.heads.image(image_cls),
            "image_seq": self.heads.image(image_seq),
            "text_cls": self.heads.text(text_cls),
            "text_seq": self.heads.text(text_seq),
            "temperature": _Clamp.apply(self.log_temperature.exp(), bounds.minimum, bounds.maximum),
        }


class FeatureEncoder(nn.Module):
    """Frozen towers as the fusion model's eyes: features of the backbones, or projected by the heads.

    With a classifier of photos beside them, what it says too.
    """

    def __init__(
        self,
        image_tower: ImageTower,
        text_tower: TextTower,
        heads: ProjectionHeads | None,
        photos: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.image_tower, self.text_tower, self.heads, self.photos = image_tower, text_tower, heads, photos
        self.requires_grad_(False)

    @property
    def image_width(self) -> int:
        return self.heads.config.width if self.heads else self.image_tower.width

    @property
    def text_width(self) -> int:
        return self.heads.config.width if self.heads else self.text_tower.width

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """image_cls (N, V, C), image_seq (N, V, K, C), text_cls (N, T), text_seq (N, L, T), photo_logits (N, C)."""
        return {**self.encode_images(batch), **self.encode_texts(batch)}

    def encode_images(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """image_cls (N, V, C), image_seq (N, V, K, C), and photo_logits (N, C) with a classifier."""
        cls, seq = image_features(self.image_tower, batch)
        if self.heads:
            cls, seq = self.heads.image(cls), self.heads.image(seq)
        said = {"photo_logits": self.photos(batch)["logits"]} if self.photos else {}
        return {"image_cls": cls, "image_seq": seq, **said}

    def encode_texts(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """text_cls (N, T), text_seq (N, L, T)."""
        cls, seq = text_features(self.text_tower, batch)
        if self.heads:
            cls, seq = self.heads.text(cls), self.heads.text(seq)
        return {"text_cls": cls, "text_seq": seq}
