"""Fuse: a fusion model over the features of frozen towers, which are computed once and streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from prima_ray.base import PrimaError
from prima_ray.data.attribute_vectors import SoftTargetEncoder
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.description import DataSetConfig
from prima_ray.data.feature_writer import FeatureConfig, compute_features
from prima_ray.data.features import FeatureSet
from prima_ray.data.metadata import MetadataTextConfig
from prima_ray.data.reader import Rows
from prima_ray.data.views import ViewConfig
from prima_ray.models.classifier import ImageClassifier
from prima_ray.models.dual_encoder import FeatureEncoder, ProjectionHeads
from prima_ray.models.ensemble import Ensemble
from prima_ray.models.experts import AttributeExpert, ExpertsConfig, Pool
from prima_ray.models.fusion import FusionConfig, FusionInputs
from prima_ray.models.image_tower import ImageTower, ImageTowerConfig
from prima_ray.models.store import load_component, module_hash
from prima_ray.models.text_tower import TextTower, TextTowerConfig
from prima_ray.training.classification import ClassificationLossConfig, ClassificationTask
from prima_ray.training.contexts import StreamSpec, WorkerContext, counting
from prima_ray.training.task import seeded_init

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class TowerSources:
    """Where the frozen towers come from: folders of `save_component`, or untrained towers."""

    seed: int
    image_tower: str | ImageTowerConfig
    text_tower: str | TextTowerConfig
    heads: str | None = None
    """Given: features are projected into the shared space."""
    photos: str | None = None
    """Given: a classifier of photos, whose logits stand beside the features."""

    def build(self) -> FeatureEncoder:
        """The towers, frozen, in eval mode.

        Raises:
            PrimaError: a folder holds something else.
        """
        with seeded_init(self.seed, "image tower"):
            image = _load(self.image_tower, ImageTower)
        with seeded_init(self.seed, "text tower"):
            text = _load(self.text_tower, TextTower)
        heads = _load(self.heads, ProjectionHeads) if self.heads else None
        photos = _load(self.photos, ImageClassifier) if self.photos else None
        return FeatureEncoder(image, text, heads, photos).eval()


def _encoding(encoder: FeatureEncoder, device: torch.device) -> Callable[[ImageTextBatch], dict[str, Tensor]]:
    def encode(batch: ImageTextBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs: dict[str, Tensor] = encoder(batch.to(device))
        # Stored with the text that was made beside it: both do without the same attributes.
        return outputs if batch.attributes is None else {**outputs, "attributes": batch.attributes}

    return encode


def _load(source: str | ImageTowerConfig | TextTowerConfig, kind: type[ModuleT]) -> ModuleT:
    module = load_component(source) if isinstance(source, str) else source.build()
    if not isinstance(module, kind):
        raise PrimaError(f"holds a {type(module).__name__}, expected a {kind.__name__}", where=str(source))
    return module


@dataclass(frozen=True)
class FuseTask(ClassificationTask):
    """See the module."""

    kind: ClassVar[str] = "fuse"

    seed: int
    shards: str
    data_set: DataSetConfig
    views: ViewConfig
    text: MetadataTextConfig
    towers: TowerSources
    fusion: FusionConfig
    members: int
    losses: ClassificationLossConfig
    class_weights: tuple[float, ...]
    vector: SoftTargetEncoder | None
    """Makes the attributes' vector; None for a model that reads the text alone."""
    experts: ExpertsConfig | None
    """None: the fusion model answers alone."""
    attribute_expert: AttributeExpert | None
    feature_root: str
    feature_config: FeatureConfig
    train_rows: Rows | None = None
    held_out_rows: Rows | None = None
    """Whose features are needed; None for all, which runs on other folds can share."""
    train_features: FeatureSet | None = None
    val_features: FeatureSet | None = None
    inputs: FusionInputs | None = None

    def prepare(self, context: WorkerContext) -> Self:
        encoder = self.towers.build().to(context.device)
        tokenizer = encoder.text_tower.config.tokenizer()
        sets = []
        for train in (True, False):
            # The classifier of photos is an expert, and experts are asked about exams that are held out.
            asked = FeatureEncoder(encoder.image_tower, encoder.text_tower, encoder.heads) if train else encoder
            collate = Collator(
                data_set=self.data_set,
                seed=self.seed,
                train=train,
                views=self.views,
                text=self.text,
                tokenizer=tokenizer,
                vector=self.vector,
            )
            with counting(context, "fuse: features of both towers") as progress:
                found = compute_features(
                    self.feature_root,
                    self.shards,
                    collate,
                    _encoding(asked, context.device),
                    tower=f"towers:{module_hash(asked)}:{tokenizer.digest}",
                    config=self.feature_config,
                    rows=self.train_rows if train else self.held_out_rows,
                    rank=context.rank,
                    world_size=context.world_size,
                    barrier=context.barrier,
                    progress=progress,
                )
            sets.append(found)
        inputs = FusionInputs(
            image_width=encoder.image_width,
            text_width=encoder.text_width,
            attribute_width=self.vector.width if self.vector else 0,
            grid=encoder.image_tower.grid,
            class_phrases=tuple(item.phrase for item in self.data_set.classes),
            subject=self.data_set.subject,
        )
        return replace(self, train_features=sets[0], val_features=sets[1], inputs=inputs)

    def build(self) -> nn.Module:
        if self.inputs is None:
            raise ValueError("prepare the task before it builds: the features are not there yet")
        with seeded_init(self.seed, "fusion"):
            fusion = self._build_fusion(self.inputs)
            return (Pool(self.experts, fusion, self.attribute_expert) if self.experts else fusion).train()

    def _build_fusion(self, inputs: FusionInputs) -> nn.Module:
        # One after the other, they draw different weights.
        members = [self.fusion.build(inputs) for _ in range(self.members)]
        return members[0] if self.members == 1 else Ensemble(members)

    def stream(self, *, train: bool) -> StreamSpec:
        features = self.train_features if train else self.val_features
        if features is None:
            raise ValueError("prepare the task before it streams: the features are not there yet")
        collate = Collator(data_set=self.data_set, seed=self.seed, train=train, features=features.manifest.specs)
        return StreamSpec(collate, features)
