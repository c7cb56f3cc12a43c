"""Rows of shards -> `ImageTextBatch`: decoding, augmentation, text and soft targets, in whatever thread calls it.

A `Collator` is built from small configs, is picklable and holds no random state: a batch depends on its rows and their
epoch alone. To add a part of the batch, add a field to `ImageTextBatch`, its config here, and a line to `__call__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prima_ray.base import PrimaError, hash_key
from prima_ray.data.attribute_vectors import SoftTargetEncoder
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.description import DataSetConfig
from prima_ray.data.features import FeatureSpec, decode_columns
from prima_ray.data.images import ImageRejected, decode_image
from prima_ray.data.metadata import MetadataTextConfig, describe, draw_dropped, expand_names
from prima_ray.data.views import (
    ViewConfig,
    apply_augmentation,
    augmented_side,
    choose_photos,
    draw_augmentation,
    evaluation_view,
    fill_color,
    normalise,
    view_generator,
)

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor, Tensor]]
"""Texts -> (N, L) input ids, attention mask (bool), mask of real tokens (bool)."""
Photos = list[list[dict[str, Any]]]


@dataclass(frozen=True)
class Collator:
    """What a stage wants of a row. Parts that are None are left out of the batch, and their columns are not read."""

    data_set: DataSetConfig
    seed: int
    train: bool
    """Augment, drop attributes, and let labels into the soft targets."""
    views: ViewConfig | None = None
    text: MetadataTextConfig | None = None
    tokenizer: Tokenize | None = None
    soft_targets: SoftTargetEncoder | None = None
    vector: SoftTargetEncoder | None = None
    """Makes the attributes that a model reads as a vector: what the text does without, it does without too."""
    features: tuple[FeatureSpec, ...] = ()
    """Stored columns that stand in for pixels or text."""
    variant: bool = False
    """The rows' `epoch` is the number of a feature variant (see `features`)."""

    def __post_init__(self) -> None:
        if (self.text is None) != (self.tokenizer is None):
            raise ValueError("a text needs a tokenizer, and a tokenizer a text")
        if self.vector is not None and (self.text is None or self.soft_targets is not None):
            raise ValueError("a vector stands beside a text, and takes the place of the soft targets")

    @property
    def columns(self) -> tuple[str, ...]:
        """The shard columns that a batch is made of."""
        wanted = ["exam_id", "label"]
        if self.views is not None:
            wanted.append("images")
        if self.text is not None or self.soft_targets is not None:
            wanted.append("attributes")
        return tuple(wanted)

    @property
    def random(self) -> bool:
        """Whether training batches of the same exams differ from epoch to epoch."""
        dropout = self.text is not None and (self.text.attribute_dropout > 0 or self.text.block_dropout > 0)
        return self.views is not None or dropout

    def for_evaluation(self) -> Self:
        """The same without augmentation, attribute dropout, and labels in the soft targets."""
        return replace(self, train=False)

    def __call__(self, table: pa.Table) -> ImageTextBatch:
        """Make the batch of N rows.

        Args:
            table: `columns`, the columns of `features`, and optionally `epoch` (int64) and `padding` (bool).

        Raises:
            PrimaError: a photo cannot be decoded, or an exam has none, naming exam and photo.
        """
        count = table.num_rows
        exam_ids = tuple(name or "" for name in table["exam_id"].to_pylist())
        padding = _column(table, "padding", np.zeros(count, dtype=bool))
        epochs = _column(table, "epoch", np.zeros(count, dtype=np.int64))
        parts: dict[str, Tensor] = {}
        if self.views is not None:
            parts.update(self._images(table["images"].to_pylist(), exam_ids, epochs, padding, self.views))
        labels: list[str | None] = table["label"].to_pylist()
        if self.text is not None or self.soft_targets is not None:
            attributes = [dict(pairs or ()) for pairs in table["attributes"].to_pylist()]
            if self.text is not None and self.tokenizer is not None:
                dropped = self._dropped(exam_ids, epochs, self.text)
                texts = [
                    describe(row, self.data_set, self.text, dropped=names)
                    for row, names in zip(attributes, dropped, strict=True)
                ]
                parts.update(_tokens(self.tokenizer, texts, padding))
                if self.vector is not None:
                    masked = expand_names(self.text.masked, self.data_set, what="masked")
                    parts["attributes"] = _vector(self.vector, attributes, [names.union(masked) for names in dropped])
            if self.soft_targets is not None:
                encoded = self.soft_targets.encode(attributes, labels if self.train else None)
                parts["attributes"] = torch.from_numpy(encoded)
        if self.features:
            parts.update(decode_columns(table, self.features, padding=padding))
        if self.train:
            keys = [self._key(epoch, exam_id) for epoch, exam_id in zip(epochs, exam_ids, strict=True)]
            parts["mask_keys"] = mask_keys(keys)
        classes = {name: index for index, name in enumerate(self.data_set.class_names)}
        return ImageTextBatch(
            exam_ids=exam_ids,
            weights=torch.from_numpy((~padding).astype(np.float32)),
            labels=torch.tensor([-1 if name is None else classes[name] for name in labels], dtype=torch.int64),
            **parts,
        )

    def _key(self, epoch: int, exam_id: str, *parts: object) -> tuple[object, ...]:
        moment = ("variant", int(epoch)) if self.variant else (int(epoch),)
        return (self.seed, *moment, exam_id, *parts)

    def _dropped(
        self, exam_ids: Sequence[str], epochs: NDArray[np.int64], config: MetadataTextConfig
    ) -> list[frozenset[str]]:
        """The attributes that each exam does without."""
        if not self.train:
            return [frozenset()] * len(exam_ids)
        keys = [self._key(epoch, exam_id, "text") for exam_id, epoch in zip(exam_ids, epochs, strict=True)]
        return [draw_dropped(self.data_set, config, *key) for key in keys]

    def _images(
        self,
        photos: Photos,
        exam_ids: Sequence[str],
        epochs: NDArray[np.int64],
        padding: NDArray[np.bool_],
        config: ViewConfig,
    ) -> dict[str, Tensor]:
        for exam_photos, exam_id, pad in zip(photos, exam_ids, padding, strict=True):
            if not pad and not exam_photos:
                raise PrimaError(f"the exam {exam_id} has no photo", mend="Ingest the data set again.")
        counts = [len(items or ()) for items in photos]
        slots = [config.count_views(count) if self.train else min(count, config.max_photos) for count in counts]
        width = max([1, *slots])
        size = config.image_size
        pixels = np.zeros((len(photos), width, size, size, 3), dtype=np.uint8)
        mask = np.zeros((len(photos), width), dtype=bool)
        for position, (exam_photos, exam_id, epoch) in enumerate(zip(photos, exam_ids, epochs, strict=True)):
            if padding[position]:
                continue
            if self.train:
                self._augmented(exam_photos, exam_id, int(epoch), config, pixels[position, : slots[position]])
                mask[position, : slots[position]] = True
                continue
            for slot, photo in enumerate(exam_photos[: config.max_photos]):
                image = _decode(photo, exam_id, draft_side=size)
                pixels[position, slot] = evaluation_view(image, size=size, resize=config.resize)
                mask[position, slot] = True
        images = normalise(pixels, config)
        images[torch.from_numpy(~mask)] = 0.0
        # A padding row has one open slot: the mean over an exam's views stays finite.
        mask[padding, 0] = True
        return {"images": images, "image_mask": torch.from_numpy(mask)}

    def _augmented(
        self,
        photos: Sequence[Mapping[str, Any]],
        exam_id: str,
        epoch: int,
        config: ViewConfig,
        out: NDArray[np.uint8],
    ) -> None:
        """Fill ``out`` (V, S, S, 3) with the exam's training views."""
        choice = view_generator(*self._key(epoch, exam_id, "photos"))
        chosen = choose_photos(len(photos), len(out), choice)
        draws = [
            draw_augmentation(view_generator(*self._key(epoch, exam_id, view)), config.augment)
            for view in range(len(out))
        ]
        for index in sorted(set(chosen)):
            photo = photos[index]
            aspect = photo["width"] / photo["height"]
            mine = [view for view in range(len(out)) if chosen[view] == index]
            # One decode serves every view of the photo, at the reduction that the tightest crop allows.
            side = max(augmented_side(draws[view], aspect, config.image_size) for view in mine)
            image = _decode(photo, exam_id, draft_side=side)
            for view in mine:
                out[view] = apply_augmentation(
                    image, draws[view], size=config.image_size, aspect=aspect, fill=fill_color(config)
                )


def mask_keys(keys: Sequence[tuple[object, ...]]) -> Tensor:
    """(seed, epoch, exam) of N exams -> `ImageTextBatch.mask_keys`, (N,) int64."""
    return torch.from_numpy(np.array([hash_key(*key, "masks") for key in keys], dtype=np.uint64).view(np.int64))


def _vector(
    encoder: SoftTargetEncoder, attributes: Sequence[Mapping[str, str]], silent: Sequence[frozenset[str]]
) -> Tensor:
    known = [
        {name: value for name, value in row.items() if name not in names}
        for row, names in zip(attributes, silent, strict=True)
    ]
    return torch.from_numpy(encoder.encode(known))


def _tokens(tokenizer: Tokenize, texts: Sequence[str], padding: NDArray[np.bool_]) -> dict[str, Tensor]:
    input_ids, attention_mask, token_mask = tokenizer(texts)
    # A padding row keeps its special tokens, for a softmax over nothing is not a number, but has no real ones.
    real = torch.as_tensor(token_mask).bool() & torch.from_numpy(~padding)[:, None]
    return {
        "input_ids": torch.as_tensor(input_ids).long(),
        "attention_mask": torch.as_tensor(attention_mask).bool(),
        "token_mask": real,
    }


def _decode(photo: Mapping[str, Any], exam_id: str, *, draft_side: int) -> Image.Image:
    try:
        return decode_image(photo["bytes"], draft_side=draft_side)
    except ImageRejected as error:
        raise PrimaError(
            f"exam {exam_id}: the photo {photo['image_id']} cannot be decoded ({error})",
            mend="The shards are damaged: ingest the data set again.",
        ) from None


def _column(table: pa.Table, name: str, default: NDArray[Any]) -> NDArray[Any]:
    return table[name].to_numpy() if name in table.column_names else default
