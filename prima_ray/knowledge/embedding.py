"""Texts -> unit vectors, by a text tower; and which tower it was, so that an index can refuse another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from prima_ray.base import InputPath, PrimaError, StrictConfig, hash_json
from prima_ray.models.store import module_hash
from prima_ray.models.text_tower import TextTower, TextTowerConfig
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer

Vectors = NDArray[np.float32]


class EncoderConfig(StrictConfig):
    """The model that makes vectors of texts."""

    name: str = OFFLINE_TEXT_MODEL
    """A hub name, a local folder, or the offline model inside its package."""
    path: InputPath | None = None
    """A local folder instead of `name`."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """auto: what the folder's sentence-transformers file says, else CLS."""
    max_tokens: int = Field(default=256, ge=8)
    """Longer texts are cut off."""


class EncoderIdentity(StrictConfig):
    """What vectors depend on: two encoders with equal identities make equal vectors."""

    name: str
    """For people; not compared."""
    hash: str
    """Of weights, architecture, pooling and tokenizer."""
    max_tokens: int
    width: int

    def same(self, other: EncoderIdentity) -> bool:
        """True where vectors of both can be compared."""
        return (self.hash, self.max_tokens, self.width) == (other.hash, other.max_tokens, other.width)

    def __str__(self) -> str:
        return f"{self.name} ({self.hash[:12]}, {self.max_tokens} tokens)"


class Embedder:
    """Texts -> (N, width) float32 vectors of length one; batches hold texts of about one length."""

    def __init__(
        self, tower: TextTower, tokenizer: TextTokenizer, *, device: str, batch_size: int | None, name: str
    ) -> None:
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        # On a CPU what a small batch needs stays in the caches; a GPU wants more to do.
        self.batch_size = batch_size or (8 if self.device.type == "cpu" else 128)
        self.width = tower.width
        self._tower = tower.eval().requires_grad_(False).to(self.device)
        self.identity = EncoderIdentity(
            name=name,
            hash=hash_json([module_hash(tower), tokenizer.bare.to_str()]),
            max_tokens=tokenizer.max_tokens,
            width=tower.width,
        )

    @classmethod
    def load(cls, config: EncoderConfig, *, device: str = "auto", batch_size: int | None = None) -> Embedder:
        """The encoder that a config names.

        Args:
            device: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one.
            batch_size: texts at a time; None: what suits the device.

        Raises:
            PrimaError: the model is neither in the folder nor to be had by name, or reads fewer tokens than wanted.
        """
        tower_config = TextTowerConfig(
            name=config.name, path=config.path, pooling=config.pooling, max_tokens=config.max_tokens
        )
        tokenizer = tower_config.tokenizer()
        try:
            tower = tower_config.build()
        except PrimaError as error:
            # The tower's keys are here under another name.
            mend = error.mend and error.mend.replace("text_tower.", "encoder.")
            raise PrimaError(error.what.replace("text_tower.", "encoder."), where=error.where, mend=mend) from None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        # An index travels: no path of the machine that made it.
        named = config.path or config.name
        name = Path(named).name if Path(named).is_absolute() else named
        return cls(tower, tokenizer, device=device, batch_size=batch_size, name=name)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Vectors:
        """A vector a text, in their order."""
        found = np.empty((len(texts), self.width), dtype=np.float32)
        if not texts:
            return found
        ids: list[list[int]] = self.tokenizer.loaded(
            list(texts), truncation=True, max_length=self.tokenizer.max_tokens
        )["input_ids"]
        # By length: the padding of a batch of mixed lengths would cost as much as its texts.
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            found[places] = self._embed([ids[place] for place in places])
        return found

    def _embed(self, batch: Sequence[list[int]]) -> Any:
        longest = max(map(len, batch))
        padding = self.tokenizer.loaded.pad_token_id or 0
        ids = torch.full((len(batch), longest), padding, dtype=torch.int64)
        mask = torch.zeros((len(batch), longest), dtype=torch.bool)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = True
        pooled, _ = self._tower(ids.to(self.device), mask.to(self.device))
        return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
