"""Texts -> batches with masked tokens, for masked-language modelling.

What is masked depends on (seed, epoch, text) alone: never on the worker, the batch, or the texts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from prima_ray.base import StrictConfig
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Tokenize, mask_keys
from prima_ray.data.text_shards import TEXT
from prima_ray.data.views import view_generator

_Chosen = NDArray[np.bool_]


class ReplacementConfig(StrictConfig):
    """What stands in the place of a token that is to be guessed (Devlin et al. 2019)."""

    mask: float = Field(default=0.8, ge=0, le=1)
    """Share that the mask token replaces."""
    random: float = Field(default=0.1, ge=0, le=1)
    """Share that a random token replaces; what is left stays as it is."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask + self.random > 1:
            raise ValueError(f"mask {self.mask:g} and random {self.random:g} are more than all")
        return self


@dataclass(frozen=True)
class Masking:
    """How tokens are masked, for one tokenizer."""

    rate: float
    """Share of a text's real tokens; at least one."""
    replacement: ReplacementConfig
    mask_id: int
    vocabulary: int
    """Random tokens are drawn from so many."""

    def __call__(self, tokens: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], _Chosen]:
        """The real tokens of one text with some replaced, and which of them are to be guessed; both (n,).

        The share is exact up to rounding, and which way it is rounded is drawn too: on average it is right.
        """
        count = len(tokens)
        places, rounding = rng.random(count), rng.random()
        fates, others = rng.random(count), rng.integers(self.vocabulary, size=count)
        chosen = np.zeros(count, dtype=bool)
        chosen[np.argsort(places)[: max(1, int(count * self.rate + rounding))]] = True
        masked, share = tokens.copy(), self.replacement
        masked[chosen & (fates < share.mask)] = self.mask_id
        random = chosen & (fates >= share.mask) & (fates < share.mask + share.random)
        masked[random] = others[random]
        return masked, chosen


@dataclass(frozen=True)
class MaskingCollator:
    """Rows of text shards -> tokens, some of them masked, and what stood there."""

    seed: int
    train: bool
    """False: masks of the held-out side, the same whenever the same `epoch` is asked for."""
    tokenizer: Tokenize
    masking: Masking

    columns: ClassVar[tuple[str, ...]] = ("exam_id", "attributes")

    def __call__(self, table: pa.Table) -> ImageTextBatch:
        """See `stream.Collate`; an "exam" is a text here."""
        ids = tuple(name or "" for name in table["exam_id"].to_pylist())
        texts = [dict(pairs or ()).get(TEXT, "") for pairs in table["attributes"].to_pylist()]
        padding = torch.from_numpy(np.array(table["padding"].to_pylist(), dtype=bool))
        epochs: Sequence[int] = table["epoch"].to_pylist()
        input_ids, attention_mask, token_mask = self.tokenizer(texts)
        token_mask = token_mask & ~padding[:, None]
        masked, labels = input_ids.clone(), torch.full_like(input_ids, -1)
        for row, (name, epoch) in enumerate(zip(ids, epochs, strict=True)):
            real = token_mask[row]
            tokens = input_ids[row][real].numpy()
            rng = view_generator(self.seed, "train" if self.train else "held out", int(epoch), name, "mask")
            replaced, chosen = self.masking(tokens, rng)
            masked[row, real] = torch.from_numpy(replaced)
            labels[row, real] = torch.from_numpy(np.where(chosen, tokens, -1))
        keys = [(self.seed, int(epoch), name) for name, epoch in zip(ids, epochs, strict=True)]
        return ImageTextBatch(
            exam_ids=ids,
            weights=(~padding).float(),
            labels=torch.full((len(ids),), -1),
            mask_keys=mask_keys(keys) if self.train else None,
            input_ids=masked,
            attention_mask=attention_mask,
            token_mask=token_mask,
            token_labels=labels,
        )
