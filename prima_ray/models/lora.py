"""LoRA by peft, on linear layers that are discovered, never assumed; and what of a tower trains."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.models.keyed_dropout import silence

Trainable = Literal["full", "lora", "frozen"]


class LoraConfig(StrictConfig):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=32, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the update is alpha / rank; `null`: alpha = rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Rate at which an adapter's inputs are dropped, by masks keyed by exam (`models.keyed_dropout`)."""


def lora_targets(module: nn.Module, called: Collection[str] | None = None) -> list[str]:
    """Names of the linear layers inside the repeated blocks of a transformer: attention and MLP, whatever their names.

    A stack of blocks shows as a number in the qualified name (`blocks.3.attn.qkv`, `layers.0.mlp.Wi`).

    Args:
        called: the layers that the model is known to call; None: all.

    Raises:
        PrimaError: there are none (a convolutional network, say).
    """
    found = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and any(part.isdigit() for part in name.split("."))
        and (called is None or name in called)
    ]
    if not found:
        raise PrimaError(
            f"{type(module).__name__} has no linear layers in repeated blocks for LoRA to adapt",
            mend="Set `trainable: full` or `trainable: frozen`.",
        )
    return found


def set_trainable(
    module: nn.Module, trainable: Trainable, lora: LoraConfig, *, called: Collection[str] | None = None
) -> None:
    """Freeze, free, or freeze and adapt a module, in place; ``called`` as in `lora_targets`.

    What is frozen drops nothing at random.
    """
    module.requires_grad_(trainable == "full")
    if trainable == "frozen":
        silence(module)
    if trainable != "lora":
        return
    _before_peft()
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        lora_dropout=lora.dropout,
        target_modules=lora_targets(module, called),
    )
    peft.inject_adapter_in_model(config, module)


def _before_peft() -> None:
    """peft imports DeepSpeed where it is installed, and that would warn, in every process, that it found no GPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def merge_lora(module: nn.Module) -> None:
    """Fold every adapter into its layer, in place, leaving the module as it was before `set_trainable`."""
    _before_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapters:
        with torch.no_grad():
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    for part in module.modules():
        # What peft leaves behind would make it warn of a second adapter.
        vars(part).pop("peft_config", None)
