"""Align: both towers into one space by four losses over the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from prima_ray.data.attribute_vectors import SoftTargetEncoder
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.description import DataSetConfig
from prima_ray.data.feature_writer import FeatureConfig, compute_features
from prima_ray.data.features import FeatureSet
from prima_ray.data.metadata import MetadataTextConfig
from prima_ray.data.views import ViewConfig
from prima_ray.losses import AlignLossConfig, align_losses, condense_outputs
from prima_ray.models.dual_encoder import DualEncoder, ProjectionConfig, ProjectionHeads, TemperatureConfig
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.models.store import module_hash
from prima_ray.models.text_tower import TextTowerConfig
from prima_ray.training.contexts import StreamSpec, WorkerContext, counting
from prima_ray.training.feature_note import note_features, noted_features
from prima_ray.training.gather import Gather
from prima_ray.training.task import seeded_init


@dataclass(frozen=True)
class AlignTask:
    """See the module. A frozen text tower's features are computed once and streamed; it is not in the model then."""

    kind: ClassVar[str] = "align"
    interacts: ClassVar[bool] = True
    batch_level: ClassVar[tuple[str, ...]] = ("temperature",)

    seed: int
    shards: str
    data_set: DataSetConfig
    views: ViewConfig
    text: MetadataTextConfig
    image_tower: ImageTowerConfig
    text_tower: TextTowerConfig
    projection: ProjectionConfig
    temperature: TemperatureConfig
    losses: AlignLossConfig
    soft_targets: SoftTargetEncoder | None
    label_temperature: float
    feature_root: str
    feature_config: FeatureConfig
    cache_text: bool = True
    """False computes a frozen text tower's features anew for every batch."""
    feature_note: str | None = None
    """A file in the run that says where the features are, once they have been found."""
    train_text: FeatureSet | None = None
    val_text: FeatureSet | None = None

    @property
    def caches_text(self) -> bool:
        return self.cache_text and self.text_tower.trainable == "frozen"

    @property
    def metric_names(self) -> tuple[str, ...]:
        parts = [f"{name}_loss" for name, section in self.losses if section.weight]
        return ("loss", "temperature", *parts)

    def prepare(self, context: WorkerContext) -> Self:
        if not self.caches_text:
            return self
        noted = noted_features(self.feature_note, self.shards, context)
        if noted is not None:
            return replace(self, train_text=noted["train"], val_text=noted["val"])
        with seeded_init(self.seed, "text tower"):
            tower = self.text_tower.build().eval().to(context.device)
        digest = module_hash(tower)

        def encode(batch: ImageTextBatch) -> dict[str, Tensor]:
            moved = batch.to(context.device)
            with torch.no_grad():
                cls, seq = tower(moved.input_ids, moved.attention_mask)
            return {"text_cls": cls, "text_seq": seq}

        sets = []
        for train in (True, False):
            with counting(context, "align: text features") as progress:
                found = compute_features(
                    self.feature_root,
                    self.shards,
                    replace(self._collator(train=train), views=None, soft_targets=None),
                    encode,
                    tower=f"text:{digest}:{self.text_tower.tokenizer().digest}",
                    config=self.feature_config,
                    rank=context.rank,
                    world_size=context.world_size,
                    barrier=context.barrier,
                    progress=progress,
                )
            sets.append(found)
        note_features(self.feature_note, dict(zip(("train", "val"), sets, strict=True)), context)
        return replace(self, train_text=sets[0], val_text=sets[1])

    def build(self) -> nn.Module:
        with seeded_init(self.seed, "text tower"):
            text_tower = None if self.caches_text else self.text_tower.build()
        with seeded_init(self.seed, "image tower"):
            image_tower = self.image_tower.build()
        with seeded_init(self.seed, "heads"):
            heads = ProjectionHeads(
                self.projection, image_width=image_tower.width, text_width=self._text_width(text_tower)
            )
        return DualEncoder(image_tower, text_tower, heads, self.temperature)

    def _text_width(self, tower: nn.Module | None) -> int:
        if tower is not None:
            return int(tower.width)  # type: ignore[arg-type]
        if self.train_text is None:
            raise ValueError("prepare the task before it builds: the text features are not there yet")
        return next(spec.shape[0] for spec in self.train_text.manifest.specs if spec.name == "text_cls")

    def stream(self, *, train: bool) -> StreamSpec:
        collate = self._collator(train=train)
        features = self.train_text if train else self.val_text
        if features is None:
            return StreamSpec(collate)
        return StreamSpec(replace(collate, text=None, tokenizer=None, features=features.manifest.specs), features)

    def _collator(self, *, train: bool) -> Collator:
        views = self.views
        if not train:
            # Validation asks the same question as training, two views an exam, without augmentation.
            views = views.model_copy(update={"max_photos": views.num_views})
        return Collator(
            data_set=self.data_set,
            seed=self.seed,
            train=train,
            views=views,
            text=self.text,
            tokenizer=self.text_tower.tokenizer(),
            soft_targets=self.soft_targets,
        )

    def batch_weight(self, batch: ImageTextBatch) -> Tensor:
        del batch
        raise TypeError("align's losses span the global batch; they have no weights that add up")

    def condense(self, outputs: Mapping[str, Tensor], batch: ImageTextBatch) -> dict[str, Tensor]:
        return condense_outputs(self.losses, outputs, token_mask=batch.token_mask)

    def loss(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: Gather | None, total_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        del total_weight
        return align_losses(
            self.losses,
            outputs,
            attributes=batch.attributes,
            label_temperature=self.label_temperature,
            weights=batch.weights,
            gather=gather,
        )

    def observe(
        self, outputs: Mapping[str, Tensor], batch: ImageTextBatch, *, gather: Gather | None
    ) -> dict[str, Tensor]:
        two = dict(outputs)
        if two["image_cls"].shape[1] == 1:
            # An exam with one photo stands twice: its image loss is then that of a perfect match, on every run alike.
            two["image_cls"] = two["image_cls"].expand(-1, 2, -1)
        elif batch.image_mask is not None:
            for name in ("image_cls", "token_contrast", "mean_patch"):
                if name in two:
                    two[name] = _fill_missing(two[name], batch.image_mask)
        nothing = torch.zeros((), device=batch.weights.device)
        total, parts = self.loss(two, batch, gather=gather, total_weight=nothing)
        values = {"loss": total, **parts, "temperature": outputs["temperature"].reshape(())}
        if gather is not None:
            # A rank's value alone means little; the mean over ranks is the global one.
            values = {name: gather(value.reshape(1)).mean() for name, value in values.items()}
        return {name: value.float().expand(len(batch)).contiguous() for name, value in values.items()}

    def metrics(self, observed: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: float(values.double().mean()) for name, values in observed.items()}


def _fill_missing(values: Tensor, mask: Tensor) -> Tensor:
    """(N, V, ...): slots without a photo repeat the first photo."""
    keep = mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
    return torch.where(keep, values, values[:, :1])
