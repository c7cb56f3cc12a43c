"""Align: shards -> image and text towers whose features meet, by four losses (method, stage 2)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from prima_ray.base import InputPath, StrictConfig, write_json
from prima_ray.data.attribute_vectors import SoftTargetConfig, SoftTargetEncoder, choose_label_temperature
from prima_ray.data.description import DataSetConfig
from prima_ray.data.feature_writer import FeatureConfig
from prima_ray.data.fetched import local_copy
from prima_ray.data.metadata import MetadataTextConfig
from prima_ray.data.run_record import CONFIG as RUN_CONFIG
from prima_ray.data.run_record import read_record
from prima_ray.data.schema import join
from prima_ray.data.views import ViewConfig
from prima_ray.inference.bundle import Bundle, save_bundle
from prima_ray.knowledge.priors import PriorsConfig
from prima_ray.losses import AlignLossConfig
from prima_ray.models.dual_encoder import DualEncoder, ProjectionConfig, TemperatureConfig
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.models.text_tower import TextTowerConfig
from prima_ray.stages.priors import described_with_priors, parent_state, record_choice
from prima_ray.stages.training import Plan, Trained, check_pixels, check_view_size, feature_root, run_training
from prima_ray.training.config import OptimizerConfig, SelectionConfig, TrainingConfig
from prima_ray.training.task import seeded_init
from prima_ray.training.tasks.align import AlignTask

_log = logging.getLogger(__name__)


class AlignInputs(StrictConfig):
    """Parents."""

    shards: InputPath
    text_encoder: InputPath | None = None
    """A refined encoder in place of `text_tower.name`: a run of refine, or a transformers folder."""
    corpus: InputPath | None = None
    """A risk corpus, whose accepted entries decide what the text says and what the soft targets weigh (`priors`)."""


class AlignConfig(TrainingConfig):
    """See the module."""

    inputs: AlignInputs
    views: ViewConfig = ViewConfig()
    text: MetadataTextConfig = MetadataTextConfig()
    priors: PriorsConfig = PriorsConfig()
    """How the corpus decides; only with `inputs.corpus`."""
    image_tower: ImageTowerConfig
    text_tower: TextTowerConfig = TextTowerConfig()
    projection: ProjectionConfig = ProjectionConfig()
    temperature: TemperatureConfig = TemperatureConfig()
    losses: AlignLossConfig = AlignLossConfig()
    soft_targets: SoftTargetConfig = SoftTargetConfig()
    features: FeatureConfig = FeatureConfig()
    """How the frozen text tower's features are stored."""
    cache_features: bool = True
    """False computes them anew for every batch."""
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(lr=3e-5))
    selection: SelectionConfig = SelectionConfig(metric="loss", mode="min")

    @model_validator(mode="after")
    def _check_align(self) -> Self:
        check_view_size(self.views, self.image_tower.image_size)
        if self.views.num_views != 2:
            raise ValueError("views.num_views: align contrasts two views of an exam")
        if self.inputs.corpus is None and self.priors != PriorsConfig():
            raise ValueError("priors: they are of a corpus, give inputs.corpus")
        if self.inputs.text_encoder and (self.text_tower.path or self.text_tower.config):
            other = "path" if self.text_tower.path else "config"
            raise ValueError(f"inputs.text_encoder and text_tower.{other} both say which encoder: give one of them")
        return self


def run(config: AlignConfig) -> Path | str:
    """Train the dual encoder; returns the run directory.

    Raises:
        PrimaError: a mistake in the config or its inputs.
    """
    # A folder that the tower names is a parent like any other: it may be of an unvetted run.
    encoder = config.inputs.text_encoder or config.text_tower.folder
    named = {"text_encoder": encoder, "corpus": config.inputs.corpus}
    parents = {role: path for role, path in named.items() if path}
    if config.inputs.text_encoder:
        _encoder_folder(config.inputs.text_encoder)
    if config.inputs.corpus:
        read_record(config.inputs.corpus, stage="corpus")
    config.text_tower.check_architecture()
    check_pixels(config.views, tower=config.image_tower)
    return run_training(
        config,
        stage="align",
        shards=config.inputs.shards,
        inputs=parents,
        make_task=lambda plan: make_task(config, plan),
        save=lambda trained: _save(config, trained),
        labelled=False,
        parents=lambda plan: parent_state(plan.run.path),
    )


def make_task(config: AlignConfig, plan: Plan) -> AlignTask:
    """The task, with soft targets fitted on the training rows."""
    data_set = described_with_priors(
        plan.index.manifest.data_set, config.inputs.corpus, config.priors, run=plan.run.path
    )
    encoder, label_temperature = _fit_soft_targets(config, plan, data_set)
    record_choice(plan.run.path, data_set, config.text, encoder)
    text_tower = config.text_tower
    if config.inputs.text_encoder:
        text_tower = text_tower.model_copy(update={"path": _encoder_folder(config.inputs.text_encoder)})
    return AlignTask(
        seed=config.seed,
        shards=config.inputs.shards,
        data_set=data_set,
        views=config.views,
        text=config.text,
        image_tower=config.image_tower,
        text_tower=text_tower,
        projection=config.projection,
        temperature=config.temperature,
        losses=config.losses,
        soft_targets=encoder,
        label_temperature=label_temperature,
        feature_root=feature_root(config),
        feature_config=config.features,
        cache_text=config.cache_features,
        feature_note=str(plan.run.path.resolve() / "text_features.json"),
    )


def _encoder_folder(path: str) -> str:
    """The transformers folder of a run of refine; any other folder as it is."""
    if not (local_copy(path) / RUN_CONFIG).exists():
        return path
    read_record(path, stage="refine")
    return join(path, "model")


def _fit_soft_targets(
    config: AlignConfig, plan: Plan, data_set: DataSetConfig
) -> tuple[SoftTargetEncoder | None, float]:
    if not config.losses.soft_semantic.weight:
        return None, 1.0
    index, rows = plan.index, plan.roles.train
    attributes = index.attribute_rows(rows)
    encoder = SoftTargetEncoder.fit(attributes, data_set, config.soft_targets)
    labels = index.label_names(rows) if config.soft_targets.uses_labels else None
    temperature = config.soft_targets.temperature or choose_label_temperature(
        encoder.encode(attributes, labels), batch_size=config.global_batch, seed=config.seed
    )
    _log.info("align: tau_label is %.4g over %d soft-target dimensions", temperature, encoder.width)
    write_json(plan.run.path / "soft_targets.json", {"temperature": temperature, "encoder": encoder.to_dict()})
    return encoder, temperature


def _save(config: AlignConfig, trained: Trained) -> Mapping[str, Any]:
    model, task = trained.model, trained.task
    if not isinstance(model, DualEncoder) or not isinstance(task, AlignTask) or model.image_tower is None:
        raise TypeError(f"align trains a DualEncoder, not a {type(model).__name__}")
    text_tower = model.text_tower
    if text_tower is None:
        with seeded_init(task.seed, "text tower"):
            text_tower = task.text_tower.build()
    bundle = Bundle.of(
        kind="align",
        data_set=task.data_set,
        text=config.text,
        views=config.views,
        features="projected",
        components={"image_tower": model.image_tower, "text_tower": text_tower, "heads": model.heads},
    )
    save_bundle(trained.plan.run.path / "model", bundle)
    return {"temperature": float(model.log_temperature.detach().exp())}
