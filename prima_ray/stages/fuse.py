"""Fuse: frozen towers -> the diagnosis from photos and attributes (method, stage 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.data.attribute_vectors import Numbers, SoftTargetEncoder
from prima_ray.data.description import DataSetConfig
from prima_ray.data.feature_writer import FeatureConfig
from prima_ray.data.fetched import local_copy
from prima_ray.data.metadata import MetadataTextConfig, expand_names
from prima_ray.data.run_record import read_record
from prima_ray.data.schema import read_manifest
from prima_ray.data.views import ViewConfig
from prima_ray.evaluation.baselines import mask_blocks
from prima_ray.inference.bundle import Bundle, component_folder, read_bundle_config, save_bundle
from prima_ray.inference.calibration import Calibration, CalibrationConfig, Labels, Matrix, fit_calibration
from prima_ray.inference.familiarity import FamiliarityConfig
from prima_ray.inference.predictor import Predictor
from prima_ray.models.experts import AttributeExpert, ExpertsConfig, Pool
from prima_ray.models.fusion import FusionConfig
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.models.store import load_component
from prima_ray.models.text_tower import TextTowerConfig
from prima_ray.stages.answers import complete, corpus_of, drawn_rows, read_evidence
from prima_ray.stages.priors import inherited_description
from prima_ray.stages.scarce import ask_with_less, with_scarcity
from prima_ray.stages.training import (
    Plan,
    Trained,
    check_pixels,
    check_view_size,
    driver_context,
    feature_root,
    predict_held_out,
    run_training,
)
from prima_ray.training.classification import ClassificationLossConfig, class_weights
from prima_ray.training.config import OptimizerConfig, SelectionConfig, TrainingConfig
from prima_ray.training.tasks.fuse import FuseTask, TowerSources


class FuseInputs(StrictConfig):
    """Parents."""

    shards: InputPath
    align: InputPath | None = None
    """Gives the text tower, the heads, and the image tower unless `finetune` does."""
    finetune: InputPath | None = None
    """Gives the image tower."""
    photos: InputPath | None = None
    """A run of finetune whose classifier speaks too, see `experts`."""
    corpus: InputPath | None = None
    """Whose entries answers show as evidence; `null`: the one that `align` read."""


class VectorConfig(StrictConfig):
    """The attributes that the text speaks of: one-hot, and numbers as `numbers` says; a missing value is all zeros."""

    numbers: Numbers = "standard"
    """(value - mean) / standard deviation of the training rows, with a 1 beside it where it is known; or `bins`."""
    bins: int = Field(default=8, ge=2)
    """Quantile bins of a number, from the training rows."""


class FuseConfig(TrainingConfig):
    """See the module."""

    inputs: FuseInputs
    views: ViewConfig = ViewConfig(num_views="all")
    """All photos of an exam in training too: a fusion model that never saw two reads the second one badly."""
    text: MetadataTextConfig = MetadataTextConfig()
    vector: VectorConfig | None = None
    """The attributes as a vector beside the text; `null`: the text alone, as in the method."""
    image_tower: ImageTowerConfig | None = None
    """An untrained image tower, where no input gives one."""
    text_tower: TextTowerConfig | None = None
    """An unaligned text tower, where no input gives one."""
    features: Literal["backbone", "projected"] = "backbone"
    """Projected features pass align's heads, which fine-tuning moves the image tower away from."""
    feature_store: FeatureConfig = FeatureConfig()
    fusion: FusionConfig
    members: Annotated[int, Field(ge=1, le=32)] | None = None
    """So many fusion models from different random weights, trained side by side, whose probabilities are averaged.
    `null`: one. Of a model by name or path each is a copy."""
    experts: ExpertsConfig | None = None
    """What each modality says by itself, pooled with the fusion model; `null`: it answers alone, as in the method."""
    losses: ClassificationLossConfig = ClassificationLossConfig()
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(lr=1e-5, weight_decay=3e-2))
    selection: SelectionConfig = SelectionConfig(metric="balanced_accuracy", mode="max")
    calibration: CalibrationConfig = CalibrationConfig()
    familiarity: FamiliarityConfig = FamiliarityConfig()

    @model_validator(mode="after")
    def _check_fuse(self) -> Self:
        has_image = self.inputs.align is not None or self.inputs.finetune is not None
        if has_image == (self.image_tower is not None):
            raise ValueError("the image tower: give inputs.finetune, inputs.align, or image_tower for an untrained one")
        if (self.inputs.align is not None) == (self.text_tower is not None):
            raise ValueError("the text tower: give inputs.align, or text_tower for an unaligned one")
        if self.fusion.kind == "mlp" and self.fusion.reads == "attributes" and self.vector is None:
            raise ValueError("fusion.reads is attributes: give `vector`, by which they become one")
        speaks = self.experts is not None and self.experts.photos > 0
        if speaks != (self.inputs.photos is not None):
            raise ValueError("experts.photos is the weight of the classifier of inputs.photos: give both or neither")
        if self.experts and self.experts.attributes and self.vector is None:
            raise ValueError("experts.attributes reads the attributes' vector: give `vector`, or set it to 0")
        if self.features == "projected" and self.inputs.align is None:
            raise ValueError("features: projected needs the heads of inputs.align")
        if self.image_tower:
            check_view_size(self.views, self.image_tower.image_size)
        return self


def run(config: FuseConfig) -> Path | str:
    """Train the fusion model; returns the run directory.

    Raises:
        PrimaError: a mistake in the config or its inputs.
    """
    named = {"align": config.inputs.align, "finetune": config.inputs.finetune, "photos": config.inputs.photos}
    parents = {role: path for role, path in named.items() if path}
    for role, path in parents.items():
        read_record(path, stage="finetune" if role == "photos" else role)
    if config.text_tower:
        config.text_tower.check_architecture()
    if config.fusion.kind == "qwen3":
        config.fusion.check_architecture()
    check_pixels(config.views, tower=config.image_tower, parents=parents.values())
    if config.inputs.photos:
        _check_photos(config, config.inputs.photos)
    # Found damaged now rather than when training is over.
    corpus = corpus_of(config.inputs.align, config.inputs.corpus)
    # A folder that the tower names is a parent like any other: it may be of an unvetted run.
    encoder = config.text_tower.folder if config.text_tower else None
    return run_training(
        config,
        stage="fuse",
        shards=config.inputs.shards,
        inputs={
            **parents,
            **({"text_encoder": encoder} if encoder else {}),
            **({"corpus": corpus} if corpus else {}),
        },
        make_task=lambda plan: make_task(config, plan),
        save=lambda trained: _save(config, trained, corpus),
        labelled=True,
    )


def _check_photos(config: FuseConfig, run: str) -> None:
    """What a classifier of photos says is added up class by class: it must speak of the same ones, of the same views.

    Raises:
        PrimaError: it does not.
    """
    theirs = read_bundle_config(local_copy(run) / "model")
    classes = read_manifest(config.inputs.shards).data_set.class_names
    if theirs.data_set.class_names != classes:
        raise PrimaError(
            f"inputs.photos tells {', '.join(theirs.data_set.class_names)} apart, these shards have "
            f"{', '.join(classes)}",
            where=run,
            mend="Name a run of finetune on the same classes, in the same order.",
        )
    for key in ("image_size", "resize"):
        mine, other = getattr(config.views, key), getattr(theirs.views, key)
        if mine != other:
            raise PrimaError(f"views.{key} is {mine}, inputs.photos reads {other}", where=run, mend="Set them alike.")


def tower_sources(config: FuseConfig) -> TowerSources:
    """Where the frozen towers come from."""
    align, finetune = config.inputs.align, config.inputs.finetune
    image: str | ImageTowerConfig | None = config.image_tower
    if finetune:
        image = component_folder(finetune, "classifier/image_tower")
    elif align:
        image = component_folder(align, "image_tower")
    text: str | TextTowerConfig | None = component_folder(align, "text_tower") if align else config.text_tower
    if image is None or text is None:
        raise TypeError("the config's validator asks for both towers")
    heads = component_folder(align, "heads") if align and config.features == "projected" else None
    photos = component_folder(config.inputs.photos, "classifier") if config.inputs.photos else None
    return TowerSources(seed=config.seed, image_tower=image, text_tower=text, heads=heads, photos=photos)


def make_task(config: FuseConfig, plan: Plan) -> FuseTask:
    """The task, with class weights from the training rows."""
    # The text tower goes on reading what it was aligned on.
    data_set = inherited_description(plan.index.manifest.data_set, config.inputs.align)
    # Towers that were trained know one split and serve its rows alone; others serve runs on every fold.
    trained = any((config.inputs.align, config.inputs.finetune, config.inputs.photos))
    vector = _vector(config, plan, data_set)
    weights = class_weights(plan.index.labels[plan.roles.train], data_set.class_names, config.losses.class_weights)
    return FuseTask(
        seed=config.seed,
        shards=config.inputs.shards,
        data_set=data_set,
        views=config.views,
        text=config.text,
        towers=tower_sources(config),
        fusion=config.fusion,
        members=config.members or 1,
        losses=config.losses,
        class_weights=weights,
        vector=vector,
        experts=config.experts,
        attribute_expert=_attribute_expert(config, plan, vector, weights),
        feature_root=feature_root(config),
        feature_config=config.feature_store,
        train_rows=plan.roles.train if trained else None,
        held_out_rows=np.concatenate([plan.roles.val, plan.roles.test]) if trained else None,
    )


def _vector(config: FuseConfig, plan: Plan, data_set: DataSetConfig) -> SoftTargetEncoder | None:
    if config.vector is None:
        return None
    rows = plan.index.attribute_rows(plan.roles.train)
    return SoftTargetEncoder.fit_vector(rows, data_set, config.text, **config.vector.model_dump())


def _attribute_expert(
    config: FuseConfig, plan: Plan, vector: SoftTargetEncoder | None, weights: Sequence[float]
) -> AttributeExpert | None:
    """Fitted on the training rows, and on the same rows without the blocks that training texts sometimes lack."""
    if config.experts is None or not config.experts.attributes or vector is None:
        return None
    rows, data_set = plan.roles.train, plan.index.manifest.data_set
    rows = rows[plan.index.labels[rows] >= 0]
    silent = expand_names(config.text.masked, data_set, what="masked")
    known = [
        {name: value for name, value in row.items() if name not in silent} for row in plan.index.attribute_rows(rows)
    ]
    labels = plan.index.labels[rows]
    asked = config.experts.block_dropout
    share = (config.text.block_dropout if asked is None else asked) if data_set.blocks else 0.0
    by_class = np.asarray(weights)[labels]
    return AttributeExpert.fit(
        np.concatenate([vector.encode(known), vector.encode(mask_blocks(known, data_set))]),
        np.concatenate([labels, labels]),
        np.concatenate([by_class * (1 - share), by_class * share]),
        num_classes=len(data_set.classes),
        inverse_penalty=config.experts.inverse_penalty,
    )


def _save(config: FuseConfig, trained: Trained, corpus: str | None) -> dict[str, Any]:
    align = config.inputs.align
    data_set = inherited_description(trained.plan.index.manifest.data_set, align)
    towers = tower_sources(config).build()
    model = trained.model
    fusion, attributes = (model.fusion, model.attributes) if isinstance(model, Pool) else (model, None)
    # Of features that do not pass them the heads are kept to explain them: two small matrices.
    heads = towers.heads or (load_component(component_folder(align, "heads")) if align else None)
    bundle = Bundle.of(
        kind="fuse",
        data_set=data_set,
        text=config.text,
        views=config.views,
        features=config.features,
        components={
            "image_tower": towers.image_tower,
            "text_tower": towers.text_tower,
            **({"heads": heads} if heads else {}),
            "fusion": fusion,
            **({"photos": towers.photos} if towers.photos else {}),
            **({"attributes": attributes} if attributes else {}),
        },
        experts=config.experts,
        vector=_vector(config, trained.plan, data_set),
        tuned_after_alignment=heads is not None and config.inputs.finetune is not None,
    )
    device, folder = str(driver_context(config).device), trained.plan.run.path / "model"
    predictor = Predictor.of(bundle, device=device, run=trained.plan.run.path, folder=folder)

    def calibrate(scores: Matrix, labels: Labels) -> Calibration:
        fitted = fit_calibration(scores, labels, data_set.class_names, config.calibration)
        index, roles = trained.plan.index, trained.plan.roles
        learned = drawn_rows(index, roles.train, config.familiarity.max_exams, "scarcity")
        asked = ask_with_less(predictor, index, roles.val)
        return with_scarcity(
            fitted, asked, index, roles.val, config.calibration, read=predictor.read_attributes, learned=learned
        )

    held_out = predict_held_out(trained, config, calibrate)
    bundle = replace(
        bundle,
        calibration=held_out.calibration,
        evidence=read_evidence(corpus, bundle, parents=[align] if align else []),
    )
    bundle, familiarity = complete(bundle, trained, held_out, config.familiarity, device=device)
    save_bundle(folder, bundle)
    return {**held_out.figures, "familiarity": familiarity}
