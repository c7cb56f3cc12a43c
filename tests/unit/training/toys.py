"""Two small tasks over the toy shards: one whose exams do not meet in the loss, and one whose exams do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.description import DataSetConfig
from prima_ray.data.plan import ExamIndex
from prima_ray.data.reader import Rows
from prima_ray.data.views import ViewConfig
from prima_ray.losses import image_consistency_loss
from prima_ray.training.classification import ClassificationLossConfig, ClassificationTask
from prima_ray.training.config import TrainingConfig
from prima_ray.training.contexts import StreamSpec, WorkerContext
from prima_ray.training.gather import Gather
from prima_ray.training.loop import TrainingJob
from prima_ray.training.task import seeded_init

SIZE = 8
VIEWS = ViewConfig(image_size=SIZE, max_photos=1)


class Net(nn.Module):
    """Matrices, biases and a temperature; NaN gradients for `poison`, where the loss itself stays finite."""

    def __init__(self, width: int, *, poison: str | None = None, top: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 * SIZE * SIZE, 6), nn.Linear(6, width)
        self.top = top or nn.Identity()
        self.log_temperature = nn.Parameter(torch.zeros(1))
        self.poison = poison

    def forward(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        assert batch.images is not None
        features = self.last(torch.tanh(self.first(batch.images.flatten(2))))
        if self.poison in batch.exam_ids:
            features = features + (features * 0).sqrt()
        return {"features": self.top(features), "temperature": self.log_temperature.exp()}


@dataclass(frozen=True)
class Classify(ClassificationTask):
    kind: ClassVar[str] = "classify"

    data_set: DataSetConfig
    losses: ClassificationLossConfig = field(default_factory=ClassificationLossConfig)
    class_weights: tuple[float, ...] = (1.2, 0.9, 0.8)
    poison_loss: str | None = None
    poison_gradient: str | None = None
    script: list[float] = field(default_factory=list)
    """Values of the validation figure `scripted`, one a validation."""
    top: nn.Module | None = None

    def prepare(self, context: WorkerContext) -> Self:
        return self

    def build(self) -> nn.Module:
        with seeded_init(0, "toy"):
            return Net(3, poison=self.poison_gradient, top=self.top)

    def stream(self, *, train: bool) -> StreamSpec:
        return StreamSpec(Collator(data_set=self.data_set, seed=5, train=train, views=VIEWS))

    def loss(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: object, total_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.logits(outputs)
        loss, _ = super().loss({"logits": logits}, batch, gather=gather, total_weight=total_weight)
        if self.poison_loss in batch.exam_ids:
            loss = loss * float("nan")
        return loss, {"double_loss": 2 * loss}

    def observe(self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: object) -> dict[str, Tensor]:
        return super().observe({"logits": self.logits(outputs)}, batch, gather=gather)

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        scripted = {"scripted": self.script.pop(0)} if self.script else {}
        return {**super().metrics(observed), **scripted}

    def logits(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["features"].mean(dim=1) / outputs["temperature"][:1]


@dataclass(frozen=True)
class Contrast:
    kind: ClassVar[str] = "contrast"
    interacts: ClassVar[bool] = True
    batch_level: ClassVar[tuple[str, ...]] = ("temperature",)

    data_set: DataSetConfig

    def prepare(self, context: WorkerContext) -> Self:
        return self

    def build(self) -> nn.Module:
        with seeded_init(0, "toy"):
            return Net(4)

    def stream(self, *, train: bool) -> StreamSpec:
        # Augmented views in validation too, so that there are two of them.
        return StreamSpec(Collator(data_set=self.data_set, seed=5, train=True, views=VIEWS))

    def batch_weight(self, batch: ImageTextBatch) -> Tensor:
        raise TypeError

    def condense(self, outputs: Mapping[str, Tensor], batch: ImageTextBatch) -> dict[str, Tensor]:
        return dict(outputs)

    def loss(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: Gather | None, total_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        view_a, view_b = outputs["features"].unbind(dim=1)
        loss = image_consistency_loss(
            view_a, view_b, temperature=outputs["temperature"], weights=batch.weights, gather=gather
        )
        return loss, {"image": loss}

    def observe(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: Gather | None
    ) -> dict[str, Tensor]:
        loss, _ = self.loss(outputs, batch, gather=gather, total_weight=torch.zeros(()))
        return {"loss": loss.expand(len(batch))}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        return {"loss": float(observed["loss"].double().mean())}


def make_config(**keys: Any) -> TrainingConfig:
    """Five exams a step, so that 13 exams end raggedly: 3 steps an epoch."""
    defaults: dict[str, Any] = {
        "out": "unused",
        "epochs": 3,
        "global_batch": 5,
        "optimizer": {"lr": 0.05, "weight_decay": 0.1, "clip_norm": 0.1},
        "selection": {"metric": "loss", "mode": "min"},
    }
    return TrainingConfig.model_validate({**defaults, **keys})


def make_job(run: Path, shards: str, task: Any = None, *, validate: bool = True, **keys: Any) -> TrainingJob:
    """The 13 first labelled exams train, the others validate."""
    index = ExamIndex.read(shards)
    labelled: Rows = np.flatnonzero(index.labels >= 0)
    run.mkdir(parents=True, exist_ok=True)
    return TrainingJob(
        config=make_config(**keys),
        task=task or Classify(index.manifest.data_set),
        run=run,
        shards=shards,
        train_rows=labelled[:13],
        val_rows=labelled[13:] if validate else labelled[:0],
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(run: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_lines(run / "steps.jsonl")]
