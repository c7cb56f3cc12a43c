"""The text tower: any transformers encoder as (global feature, tokens). To use another one, name it in the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from prima_ray.base import InputPath, PrimaError, StrictConfig, is_uri, read_json
from prima_ray.models.lora import LoraConfig, Trainable, set_trainable
from prima_ray.models.pretrained import check_architecture, from_architecture, load_pretrained, refuse_attention_dropout
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer, resolve_text_model


class TextTowerConfig(StrictConfig):
    """A transformers encoder."""

    name: str = OFFLINE_TEXT_MODEL
    """A hub name, a local folder, or the offline model inside its package."""
    path: InputPath | None = None
    """A local folder instead of `name`: a refined encoder, or what `prima fetch` brought."""
    config: dict[str, Any] | None = None
    """The architecture (`model_type`, its sizes, its dropout) for random weights; the tokenizer is still the
    source's."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """auto: what the folder's sentence-transformers file says, else CLS."""
    max_tokens: int = Field(default=128, ge=4)
    trainable: Trainable = "frozen"
    lora: LoraConfig = LoraConfig(rank=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs `model_type` (bert, modernbert, ...)")
        if self.config is not None and self.trainable == "lora":
            raise ValueError("LoRA over random weights adapts noise: set trainable to full, or name a model")
        refuse_attention_dropout(self.config or {})
        return self

    @property
    def source(self) -> str:
        return self.path or self.name

    @property
    def folder(self) -> str | None:
        """The folder that the model comes from, or its address; None for a hub's name and the offline model."""
        if is_uri(self.source):
            return self.source
        folder = Path(self.source).expanduser()
        return str(folder) if self.source != OFFLINE_TEXT_MODEL and folder.is_dir() else None

    def check_architecture(self) -> None:
        """Look for mistakes in `config` before anything is built from it.

        Raises:
            PrimaError: a field that is not of its `model_type`, or a value that it cannot have.
        """
        if self.config is not None:
            check_architecture(self.config, key="text_tower.config")

    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self.source, max_tokens=self.max_tokens)

    def build(self) -> TextTower:
        """The tower on the CPU. On the meta device (`with torch.device("meta")`) no weights are read.

        Raises:
            PrimaError: the model is neither in the folder nor to be had by name, or reads fewer tokens than wanted.
        """
        if self.config is not None:
            model = from_architecture(self.config, self.tokenizer().loaded)
        else:
            model, _ = load_pretrained(self.source, key="text_tower.path")
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and longest < self.max_tokens:
            raise PrimaError(f"text_tower.max_tokens is {self.max_tokens}, the model reads {longest}")
        return TextTower(self, model, pooling=self.resolve_pooling())

    def resolve_pooling(self) -> Literal["cls", "mean"]:
        """The pooling that the config names, or that the source's own files do."""
        from transformers.utils.hub import cached_file

        if self.pooling != "auto":
            return self.pooling
        file = cached_file(
            resolve_text_model(self.source),
            "1_Pooling/config.json",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return "mean" if file is not None and read_json(file).get("pooling_mode_mean_tokens") else "cls"


class TextTower(nn.Module):
    """(N, L) token ids -> global features (N, T) and tokens (N, L, T)."""

    def __init__(self, config: TextTowerConfig, model: Any, *, pooling: Literal["cls", "mean"]) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.pooling = pooling
        self.width = int(model.config.hidden_size)
        if hasattr(model, "pooler") and model.pooler is not None:
            # BERT's pooler belongs to next-sentence prediction; unused parameters would upset ZeRO.
            model.pooler = None
        set_trainable(self.model, config.trainable, config.lora)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """See the class.

        Args:
            attention_mask: (N, L) bool, true on tokens that are not padding.
        """
        tokens: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
        if self.pooling == "cls":
            return tokens[:, 0], tokens
        mask = attention_mask[..., None].to(tokens.dtype)
        return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), tokens
