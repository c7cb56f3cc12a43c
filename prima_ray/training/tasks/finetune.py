"""Finetune: cross-entropy on the labels, from photos alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from prima_ray.base import PrimaError
from prima_ray.data.collate import Collator
from prima_ray.data.description import DataSetConfig
from prima_ray.data.views import ViewConfig
from prima_ray.models.classifier import ImageClassifier
from prima_ray.models.image_tower import ImageTower, ImageTowerConfig
from prima_ray.models.lora import LoraConfig, Trainable
from prima_ray.models.store import load_component
from prima_ray.training.classification import ClassificationLossConfig, ClassificationTask
from prima_ray.training.contexts import StreamSpec, WorkerContext
from prima_ray.training.task import seeded_init


@dataclass(frozen=True)
class FinetuneTask(ClassificationTask):
    """See the module."""

    kind: ClassVar[str] = "finetune"

    seed: int
    data_set: DataSetConfig
    views: ViewConfig
    tower: str | ImageTowerConfig
    """A folder of `save_component`, or an untrained tower."""
    trainable: Trainable
    lora: LoraConfig
    losses: ClassificationLossConfig
    class_weights: tuple[float, ...]

    def prepare(self, context: WorkerContext) -> Self:
        del context
        return self

    def build(self) -> nn.Module:
        with seeded_init(self.seed, "image tower"):
            tower = self.tower.build() if isinstance(self.tower, ImageTowerConfig) else load_component(self.tower)
            if not isinstance(tower, ImageTower):
                raise PrimaError("holds no image tower", where=str(self.tower))
            tower.set_trainable(self.trainable, self.lora)
        with seeded_init(self.seed, "head"):
            return ImageClassifier(tower, len(self.data_set.classes)).train()

    def stream(self, *, train: bool) -> StreamSpec:
        return StreamSpec(Collator(data_set=self.data_set, seed=self.seed, train=train, views=self.views))
