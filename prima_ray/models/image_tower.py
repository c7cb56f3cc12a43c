"""The image tower: any timm model as (global feature, tokens). To use another one, name it in the config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.models.lora import LoraConfig, Trainable, set_trainable

_RANDOM_MASKS = ("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "patch_drop_rate", "pos_drop_rate")


class ImageTowerConfig(StrictConfig):
    """A timm model. Random weights unless `pretrained` or `weights` says otherwise."""

    name: str
    """timm's name, with or without the weights' tag: `vit_base_patch16_dinov3.lvd1689m`."""
    pretrained: bool = False
    """Download timm's weights by name (or take them from its cache)."""
    weights: InputPath | None = None
    """A local `.safetensors` file of the model, or a folder of `prima fetch` that holds one."""
    image_size: int = Field(default=224, ge=8)
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """The global feature: the CLS token where there is one, else the mean of the tokens."""
    trainable: Trainable = "full"
    lora: LoraConfig = LoraConfig()
    gradient_checkpointing: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to timm: `depth`, `embed_dim`, `stem_width` and the like."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in _RANDOM_MASKS:
            if self.options.get(key):
                raise ValueError(
                    f"options.{key}: random masks of a layer depend on the worker that draws them; leave it at 0"
                )
        if self.pretrained and self.weights:
            raise ValueError("pretrained and weights: give one of them")
        return self

    def build(self) -> ImageTower:
        """The tower on the CPU (or on the device of a `torch.device` context).

        Raises:
            PrimaError: unknown name, weights that do not fit, or pretrained weights that batch norm would need.
        """
        import timm

        base = self.name.partition(".")[0]
        if not timm.is_model(base):
            near = timm.list_models(f"*{base[:12]}*")[:3]
            raise PrimaError(f"timm has no model {self.name!r}", mend=f"Perhaps {', '.join(near)}?" if near else None)
        options = dict(self.options)
        if "vit" in base or "eva" in base or "beit" in base:
            options.setdefault("img_size", self.image_size)
        try:
            model = timm.create_model(self.name, pretrained=self.pretrained, num_classes=0, **options)
        except TypeError as error:
            raise PrimaError(f"options: {self.name} does not take them ({error})") from None
        except (OSError, RuntimeError) as error:
            if not self.pretrained:
                raise
            raise PrimaError(
                f"the weights of {self.name} could not be had by name ({error})",
                mend="Bring them with `prima fetch` and name the folder in image_tower.weights.",
            ) from None
        if _batch_norms(model):
            if self.pretrained or self.weights:
                raise PrimaError(
                    f"{self.name} uses batch norm, which mixes exams: its weights cannot be used here",
                    mend="Choose a model with layer or group norm: a ViT, a ConvNeXt, resnetv2_50x1_bit.",
                )
            _replace_batch_norm(model)
        if self.weights:
            load_weights(model, self.weights)
        return ImageTower(self, model)


class ImageTower(nn.Module):
    """(B, 3, S, S) -> global features (B, C) and tokens (B, K, C), K = grid height * width, row by row."""

    def __init__(self, config: ImageTowerConfig, model: Any) -> None:
        super().__init__()
        self.config = config
        self.model: Any = model
        self.width: int = int(model.num_features)
        mean_std = getattr(model, "pretrained_cfg", {}) or {}
        self.mean: tuple[float, ...] = tuple(mean_std.get("mean", (0.485, 0.456, 0.406)))
        self.std: tuple[float, ...] = tuple(mean_std.get("std", (0.229, 0.224, 0.225)))
        self.num_prefix_tokens: int = int(getattr(model, "num_prefix_tokens", 0))
        self.uses_cls = config.pooling == "cls" or (config.pooling == "auto" and self.num_prefix_tokens > 0)
        if self.uses_cls and not self.num_prefix_tokens:
            raise PrimaError(f"image_tower.pooling is cls, but {config.name} has no CLS token", mend="Set it to mean.")
        self.grid = self._find_grid()
        set_trainable(self.model, config.trainable, config.lora)
        if config.gradient_checkpointing:
            self.model.set_grad_checkpointing()

    def _find_grid(self) -> tuple[int, int]:
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if grid is not None and self.num_prefix_tokens:
            return int(grid[0]), int(grid[1])
        size = self.config.image_size
        device = next(self.model.parameters()).device
        training = self.model.training
        with torch.no_grad():
            shape = self.model.eval().forward_features(torch.zeros(1, 3, size, size, device=device)).shape
        self.model.train(training)
        if len(shape) == 4:
            return (int(shape[2]), int(shape[3])) if shape[1] == self.width else (int(shape[1]), int(shape[2]))
        side = math.isqrt(shape[1] - self.num_prefix_tokens)
        return side, side

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(images)
        if features.ndim == 4:
            # A convolutional map, (B, C, h, w); some hierarchical transformers give (B, h, w, C).
            channels_first = features.shape[1] == self.width
            tokens = features.flatten(2).transpose(1, 2) if channels_first else features.flatten(1, 2)
        else:
            tokens = features[:, self.num_prefix_tokens :]
        return (features[:, 0] if self.uses_cls else tokens.mean(dim=1)), tokens


def load_weights(model: nn.Module, path: str) -> None:
    """Load a local safetensors file into a timm model.

    Raises:
        PrimaError: no such file, or it does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path)
    if file.is_dir():
        found = sorted(file.glob("*.safetensors"))
        if len(found) != 1:
            raise PrimaError(f"expected one .safetensors file here, found {len(found)}", where=path)
        file = found[0]
    try:
        state = load_file(file)
    except FileNotFoundError:
        raise PrimaError("no such weights", where=path) from None
    except SafetensorError as error:
        raise PrimaError(f"not a whole safetensors file ({error})", where=file) from None
    # timm's own filters bring other layouts (a classifier head, another patch size) into this model's.
    filter_fn = getattr(model, "pretrained_filter_fn", None)
    state = filter_fn(state, model) if filter_fn else state
    state = {key: value for key, value in state.items() if not key.startswith(("head.", "classifier.", "fc."))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    odd = [*missing, *unexpected]
    if odd:
        raise PrimaError(
            f"these weights do not fit the model: {len(missing)} parameters are missing, {len(unexpected)} are "
            f"unknown ({odd[0]}, ...)",
            where=file,
            mend="Check image_tower.name, image_size and options.",
        )


def _batch_norms(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def _replace_batch_norm(model: nn.Module) -> None:
    """Batch norm mixes the exams of a batch; group norm of the same width does not (Wu & He 2018)."""
    for name in _batch_norms(model):
        old = model.get_submodule(name)
        width = int(old.num_features)  # type: ignore[arg-type]
        groups = max(number for number in range(1, 33) if width % number == 0)
        new: nn.Module = nn.GroupNorm(groups, width)
        if hasattr(old, "act"):
            # timm's BatchNormAct2d: norm, drop, activation in one.
            new = nn.Sequential(new, old.drop, old.act)  # type: ignore[arg-type]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
