"""The text tower: any transformers encoder as (global feature, tokens). To use another one, name it in the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.models.lora import LoraConfig, Trainable, set_trainable
from prima_ray.models.tokenizer import OFFLINE_TEXT_MODEL, TextTokenizer, resolve_text_model


class TextTowerConfig(StrictConfig):
    """A transformers encoder."""

    name: str = OFFLINE_TEXT_MODEL
    """A hub name, a local folder, or the offline model inside its package."""
    path: InputPath | None = None
    """A local folder instead of `name`: a refined encoder, or what `prima fetch` brought."""
    config: dict[str, Any] | None = None
    """The architecture (`model_type` and its sizes) for random weights; the tokenizer still comes from the name."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """auto: what the folder's sentence-transformers file says, else CLS."""
    max_tokens: int = Field(default=128, ge=4)
    trainable: Trainable = "frozen"
    lora: LoraConfig = LoraConfig(rank=8)

    @property
    def source(self) -> str:
        return self.path or self.name

    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self.source, max_tokens=self.max_tokens)

    def build(self) -> TextTower:
        """The tower on the CPU.

        Raises:
            PrimaError: the model is neither in the folder nor to be had by name.
        """
        return TextTower(self, _build_encoder(self), pooling=self.resolve_pooling())

    def resolve_pooling(self) -> Literal["cls", "mean"]:
        if self.pooling != "auto":
            return self.pooling
        file = Path(resolve_text_model(self.source)) / "1_Pooling" / "config.json"
        if file.exists():
            return "mean" if json.loads(file.read_text()).get("pooling_mode_mean_tokens") else "cls"
        return "cls"


def _build_encoder(config: TextTowerConfig) -> nn.Module:
    import torch
    from transformers import AutoConfig, AutoModel

    if config.config is not None:
        if "model_type" not in config.config:
            raise PrimaError("text_tower.config needs `model_type` (bert, modernbert, ...)")
        architecture = AutoConfig.for_model(**config.config)
        _no_dropout(architecture)
        model: nn.Module = AutoModel.from_config(architecture, dtype=torch.float32)
        return model
    folder = resolve_text_model(config.source)
    try:
        architecture = AutoConfig.from_pretrained(folder)
        _no_dropout(architecture)
        model = AutoModel.from_pretrained(folder, config=architecture, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise PrimaError(
            f"no text model to be had ({str(error).splitlines()[0]})",
            where=config.source,
            mend="Name a local folder in text_tower.path, or bring the model with `prima fetch`.",
        ) from None
    return model


def _no_dropout(architecture: Any) -> None:
    """Dropout draws from the global generator, which differs from rank to rank."""
    for key, value in vars(architecture).items():
        if "dropout" in key and isinstance(value, float):
            setattr(architecture, key, 0.0)


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
