"""The batch that every training and prediction loop sees, on the host or on a device."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

_HEAVY = ("images", "input_ids", "image_cls", "image_seq", "photo_logits", "text_cls", "text_seq")


@dataclass(frozen=True, slots=True)
class ImageTextBatch:
    """N exams. Absent parts are None: a stage on frozen features reads no pixels.

    Shapes: V views an exam, K image tokens, L text tokens, A soft-target dimensions, P photos at most.
    """

    exam_ids: tuple[str, ...]
    weights: Tensor
    """(N,) float32: 1 for an exam, 0 for padding at a ragged end."""
    labels: Tensor
    """(N,) int64: the class index, -1 where the exam has no label."""
    mask_keys: Tensor | None = None
    """(N,) int64, in training: of (seed, epoch, exam), what the random masks of the layers are keyed by."""
    images: Tensor | None = None
    """(N, V, 3, H, W) float32, normalised."""
    image_mask: Tensor | None = None
    """(N, V) bool: False where a photo slot is padding. None: all are real."""
    input_ids: Tensor | None = None
    """(N, L) int64 token ids of the metadata text."""
    attention_mask: Tensor | None = None
    """(N, L) bool: True on every token that is not padding (specials included)."""
    token_mask: Tensor | None = None
    """(N, L) bool: True on real tokens (neither padding nor special)."""
    token_labels: Tensor | None = None
    """(N, L) int64: the token that stood where one was masked, -1 elsewhere."""
    attributes: Tensor | None = None
    """(N, A) float32: the weighted one-hot vector y of the soft targets, or the attributes as a vector to be read."""
    image_cls: Tensor | None = None
    """(N, V, C) float32: cached global image features."""
    image_seq: Tensor | None = None
    """(N, V, K, C) float32: cached image tokens, K = grid height * grid width, row by row."""
    photo_logits: Tensor | None = None
    """(N, C) float32: what a classifier of photos says by itself."""
    text_cls: Tensor | None = None
    """(N, T) float32: cached global text features."""
    text_seq: Tensor | None = None
    """(N, L, T) float32: cached text tokens."""

    def __len__(self) -> int:
        return len(self.exam_ids)

    def to(self, device: torch.device | str) -> Self:
        """A copy with every tensor on ``device``."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def light(self) -> Self:
        """A copy without what only models read: pixels, tokens and features, which are nearly all of its bytes."""
        nothing: dict[str, Any] = dict.fromkeys(_HEAVY)
        return replace(self, **nothing)

    def split(self, size: int) -> list[Self]:
        """Micro-batches of ``size`` exams, in order; the last may be shorter."""
        pieces = []
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            parts: dict[str, Any] = {
                field.name: value[rows] for field in fields(self) if (value := getattr(self, field.name)) is not None
            }
            pieces.append(replace(self, **parts))
        return pieces
