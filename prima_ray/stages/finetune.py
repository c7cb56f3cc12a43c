"""Finetune: align's image tower -> a classifier of photos (method, end of stage 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from prima_ray.base import InputPath, StrictConfig
from prima_ray.data.run_record import read_record
from prima_ray.data.views import ViewConfig
from prima_ray.inference.bundle import Bundle, component_folder, save_bundle
from prima_ray.inference.calibration import CalibrationConfig, fit_calibration
from prima_ray.inference.familiarity import FamiliarityConfig
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.models.lora import LoraConfig, Trainable
from prima_ray.stages.answers import complete
from prima_ray.stages.training import (
    Plan,
    Trained,
    check_pixels,
    check_view_size,
    driver_context,
    predict_held_out,
    run_training,
)
from prima_ray.training.classification import ClassificationLossConfig, class_weights
from prima_ray.training.config import OptimizerConfig, SelectionConfig, TrainingConfig
from prima_ray.training.tasks.finetune import FinetuneTask


class FinetuneInputs(StrictConfig):
    """Parents."""

    shards: InputPath
    align: InputPath | None = None
    """The run whose image tower is fine-tuned; without it, `image_tower` is trained from its own weights."""


class FinetuneConfig(TrainingConfig):
    """See the module."""

    inputs: FinetuneInputs
    views: ViewConfig = ViewConfig(num_views=1)
    image_tower: ImageTowerConfig | None = None
    """Only without `inputs.align`."""
    trainable: Trainable = "full"
    lora: LoraConfig = LoraConfig()
    losses: ClassificationLossConfig = ClassificationLossConfig()
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(lr=3e-5))
    selection: SelectionConfig = SelectionConfig(metric="balanced_accuracy", mode="max")
    calibration: CalibrationConfig = CalibrationConfig()
    familiarity: FamiliarityConfig = FamiliarityConfig()

    @model_validator(mode="after")
    def _check_finetune(self) -> Self:
        if (self.inputs.align is None) == (self.image_tower is None):
            raise ValueError("give inputs.align or image_tower, and not both")
        if self.image_tower:
            check_view_size(self.views, self.image_tower.image_size)
        return self


def run(config: FinetuneConfig) -> Path | str:
    """Train the classifier; returns the run directory.

    Raises:
        PrimaError: a mistake in the config or its inputs.
    """
    parents = {"align": config.inputs.align} if config.inputs.align else {}
    for path in parents.values():
        read_record(path, stage="align")
    check_pixels(config.views, tower=config.image_tower, parents=parents.values())
    return run_training(
        config,
        stage="finetune",
        shards=config.inputs.shards,
        inputs=parents,
        make_task=lambda plan: make_task(config, plan),
        save=lambda trained: _save(config, trained),
        labelled=True,
    )


def make_task(config: FinetuneConfig, plan: Plan) -> FinetuneTask:
    """The task, with class weights from the training rows."""
    data_set = plan.index.manifest.data_set
    tower: str | ImageTowerConfig | None = config.image_tower
    if tower is None and config.inputs.align is not None:
        tower = component_folder(config.inputs.align, "image_tower")
    if tower is None:
        raise TypeError("the config's validator asks for a tower")
    return FinetuneTask(
        seed=config.seed,
        data_set=data_set,
        views=config.views,
        tower=tower,
        trainable=config.trainable,
        lora=config.lora,
        losses=config.losses,
        class_weights=class_weights(
            plan.index.labels[plan.roles.train], data_set.class_names, config.losses.class_weights
        ),
    )


def _save(config: FinetuneConfig, trained: Trained) -> dict[str, Any]:
    data_set = trained.plan.index.manifest.data_set
    held_out = predict_held_out(
        trained,
        config,
        lambda scores, labels: fit_calibration(scores, labels, data_set.class_names, config.calibration),
    )
    bundle = Bundle.of(
        kind="finetune",
        data_set=data_set,
        text=None,
        views=config.views,
        features="backbone",
        components={"classifier": trained.model},
        calibration=held_out.calibration,
    )
    device = str(driver_context(config).device)
    bundle, familiarity = complete(bundle, trained, held_out, config.familiarity, device=device)
    save_bundle(trained.plan.run.path / "model", bundle)
    return {**held_out.figures, "familiarity": familiarity}
