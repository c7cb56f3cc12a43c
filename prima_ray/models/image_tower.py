"""The image tower: any timm model as (global feature, tokens). To use another one, name it in the config."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.models.keyed_dropout import silence
from prima_ray.models.lora import LoraConfig, Trainable, merge_lora, set_trainable

_UNKEYED_MASKS = {
    "attn_drop_rate": "its masks are drawn inside of the attention, by the worker",
    "patch_drop_rate": "its masks are drawn by the worker",
    "drop_block_rate": "its masks are drawn by the worker",
    "drop_rate": "it belongs to the classifier, which features do not pass",
}
_ORIENTATIONS = [(turn, mirrored) for mirrored in (False, True) for turn in range(4)]
_KEYED_DROPOUT = ("proj_drop_rate", "pos_drop_rate")


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
    orientations: Literal[1, 4, 8] = 1
    """Outside of training, features are means over so many turns (4) and mirrored turns (8) of the image, tokens turned
    back: for images without an upright. Each costs a forward pass."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to timm: `depth`, `embed_dim`, `stem_width` and the like. `drop_path_rate`, `proj_drop_rate` and
    `pos_drop_rate` drop by masks keyed by exam (`models.keyed_dropout`)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, reason in _UNKEYED_MASKS.items():
            if self.options.get(key):
                raise ValueError(f"options.{key}: {reason}; leave it at 0 (drop_path_rate can be keyed by exam)")
        if self.pretrained and self.weights:
            raise ValueError("pretrained and weights: give one of them")
        if self.trainable == "lora" and not (self.pretrained or self.weights):
            raise ValueError(
                "LoRA over random weights adapts noise: set trainable to full, or give pretrained or weights"
            )
        return self

    def build(self) -> ImageTower:
        """The tower on the CPU. On the meta device (`with torch.device("meta")`) the name alone is read, no weights.

        Raises:
            PrimaError: unknown name, weights that do not fit, or pretrained weights that batch norm would need.
        """
        import timm

        base = self.name.partition(".")[0]
        if not timm.is_model(base):
            raise PrimaError(f"timm has no model {self.name!r}", mend=near_models(base))
        reads = torch.get_default_device().type != "meta"
        options, weights = dict(self.options), {}
        try:
            published = timm.models.get_pretrained_cfg(self.name)
        except RuntimeError:
            raise PrimaError(f"timm has no weights {self.name!r}", mend="Leave the part after the dot out.") from None
        if published and published.fixed_input_size and published.input_size[-1] != self.image_size:
            options.setdefault("img_size", self.image_size)
        if self.weights and reads:
            state = read_weights(self.weights, drop=published.classifier if published else None)
            # timm's own loader brings other layouts (another patch grid, other names) into this model's, and with the
            # right number of classes it is strict.
            weights = {"pretrained_cfg_overlay": {"state_dict": state, "num_classes": 0}}
        try:
            model = timm.create_model(
                self.name, pretrained=(self.pretrained or bool(weights)) and reads, num_classes=0, **weights, **options
            )
        except TypeError as error:
            raise PrimaError(f"options: {self.name} does not take them ({error})") from None
        except Exception as error:
            raise self._explain(error) from None
        if weights:
            model.pretrained_cfg["state_dict"] = None
        if _batch_norms(model):
            if self.pretrained or self.weights:
                raise PrimaError(
                    f"{self.name} uses batch norm, which mixes exams: its weights cannot be used here",
                    mend="Choose a model with layer or group norm: a ViT, a ConvNeXt, resnetv2_50x1_bit.",
                )
            _replace_batch_norm(model)
        _only_asked_masks(model, self.options)
        return ImageTower(self, model)

    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation, (R, G, B), of the pixels that the published weights were trained on.

        None for random weights, and for a model of which timm knows none.
        """
        if not (self.pretrained or self.weights):
            return None
        import timm

        published = timm.models.get_pretrained_cfg(self.name)
        return (tuple(published.mean), tuple(published.std)) if published else None

    def _explain(self, error: Exception) -> Exception:
        """A mistake in the config as a `PrimaError`; anything else as it is."""
        first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if self.weights:
            odd = rest[0] if rest else first
            return PrimaError(
                f"these weights do not fit the model ({odd if len(odd) < 120 else odd[:117] + '...'})",
                where=self.weights,
                mend="Check image_tower.name, image_size and options.",
            )
        if self.pretrained:
            return PrimaError(
                f"the weights of {self.name} could not be had by name ({first})",
                mend="Bring them with `prima fetch` and name the folder in image_tower.weights.",
            )
        return error


class ImageTower(nn.Module):
    """(B, 3, S, S) -> global features (B, C) and tokens (B, K, C), K = grid height * width, row by row."""

    def __init__(self, config: ImageTowerConfig, model: Any) -> None:
        super().__init__()
        self.config = config
        self.model: Any = model
        self.num_prefix_tokens: int = int(getattr(model, "num_prefix_tokens", 0))
        has_cls = self.num_prefix_tokens > 0 and getattr(model, "cls_token", None) is not None
        if config.pooling == "cls" and not has_cls:
            raise PrimaError(f"image_tower.pooling is cls, but {config.name} has no CLS token", mend="Set it to mean.")
        self.uses_cls = has_cls and config.pooling != "mean"
        for layer in model.modules():
            if hasattr(layer, "qkv_bias_separate"):
                # Else timm reads the weights of these projections instead of calling them, past any adapter.
                layer.qkv_bias_separate = True
        self._reach = _probe(config, model)
        self.width, self.grid = self._read_shape(self._reach.shape)
        if config.orientations > 1 and self.grid[0] != self.grid[1]:
            raise PrimaError(
                f"image_tower.orientations: the {self.grid[0]} x {self.grid[1]} tokens of {config.name} do not turn",
                mend="Set it to 1.",
            )
        self.set_trainable(config.trainable, config.lora)
        if config.gradient_checkpointing:
            self.model.set_grad_checkpointing()

    def set_trainable(self, trainable: Trainable, lora: LoraConfig) -> None:
        """Freeze, free, or freeze and adapt the tower; what its features do not pass through stays frozen.

        Adapters that are there already are folded in.
        """
        merge_lora(self.model)
        set_trainable(self.model, trainable, lora, called=self._reach.called)
        for name, parameter in self.model.named_parameters():
            if name in self._reach.idle:
                parameter.requires_grad_(False)

    def _read_shape(self, shape: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
        """Width and grid of the tokens."""
        if len(shape) == 4:
            # A convolutional map, (B, C, h, w); some hierarchical transformers give (B, h, w, C).
            self._channels_first = getattr(self.model, "output_fmt", "NCHW") != "NHWC"
            _, *rest = shape if self._channels_first else (shape[0], shape[3], shape[1], shape[2])
            return rest[0], (rest[1], rest[2])
        count, width = shape[1] - self.num_prefix_tokens, shape[2]
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if grid is not None and grid[0] * grid[1] == count:
            return width, (int(grid[0]), int(grid[1]))
        side = math.isqrt(count)
        if side * side != count:
            raise PrimaError(
                f"the {count} tokens of {self.config.name} form no square grid", mend="Choose another model."
            )
        return width, (side, side)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class.

        Raises:
            PrimaError: the images are not of the tower's size.
        """
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise PrimaError(
                f"the image tower reads {size} px, the images have {images.shape[-2]} x {images.shape[-1]}",
                mend=f"Set views.image_size to {size}.",
            )
        if self.training or self.config.orientations == 1:
            return self._features(images)
        found = [self._turned(images, turn, mirrored) for turn, mirrored in _ORIENTATIONS[: self.config.orientations]]
        return torch.stack([cls for cls, _ in found]).mean(dim=0), torch.stack([seq for _, seq in found]).mean(dim=0)

    def _turned(self, images: Tensor, turn: int, mirrored: bool) -> tuple[Tensor, Tensor]:
        """Features of the images mirrored and then turned by quarters; the tokens where the upright image has them."""
        cls, tokens = self._features((images.flip(-1) if mirrored else images).rot90(turn, (-2, -1)))
        rows, columns = self.grid
        maps = tokens.reshape(len(tokens), rows, columns, -1).rot90(-turn, (1, 2))
        return cls, (maps.flip(2) if mirrored else maps).flatten(1, 2)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._reach.shape) == 4:
            # Quicker on a CPU (benchmarks/channels_last.py), and what tensor cores work in; a turn leaves others.
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.model.forward_features(images)
        if features.ndim == 4:
            tokens = features.flatten(2).transpose(1, 2) if self._channels_first else features.flatten(1, 2)
        else:
            tokens = features[:, self.num_prefix_tokens :]
        return (features[:, 0] if self.uses_cls else tokens.mean(dim=1)), tokens


def near_models(name: str) -> str | None:
    """Whether one of timm's names may have been meant."""
    import timm

    near = get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.8)
    return f"Perhaps {', '.join(near)}?" if near else None


@dataclass(frozen=True)
class _Reach:
    """What one image passes through."""

    shape: tuple[int, ...]
    """Of the features."""
    called: frozenset[str]
    """Linear layers that are called; others are read or idle, and an adapter around them would adapt nothing."""
    idle: frozenset[str]
    """Parameters that the features do not depend on (a pooling head's)."""


def _probe(config: ImageTowerConfig, model: nn.Module) -> _Reach:
    """Follow an image through a weightless copy of the model: shapes and gradients cost nothing on the meta device."""
    memo: dict[int, Any] = {
        id(item): nn.Parameter(torch.empty_like(item, device="meta")) for item in model.parameters()
    }
    memo.update({id(item): item.to("meta") for item in model.buffers()})
    copy: Any = deepcopy(model, memo).eval()
    called: set[str] = set()
    for name, layer in copy.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    size = config.image_size
    try:
        features = copy.forward_features(torch.zeros(1, 3, size, size, device="meta"))
        shape = tuple(int(number) for number in features.shape)
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        raise PrimaError(f"{config.name} gives no features of images of {size} px ({error})") from None
    features.sum().backward()
    idle = frozenset(name for name, item in copy.named_parameters() if item.grad is None)
    return _Reach(shape=shape, called=frozenset(called), idle=idle)


def read_weights(path: str, *, drop: str | tuple[str, ...] | None) -> dict[str, Tensor]:
    """The tensors of a local safetensors file, without those of the layers named in ``drop`` (the classifier).

    Args:
        path: the file, or a folder that holds one.

    Raises:
        PrimaError: no such file, not one file, or not a whole one.
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
        state: dict[str, Tensor] = load_file(file)
    except FileNotFoundError:
        raise PrimaError("no such weights", where=path) from None
    except SafetensorError as error:
        raise PrimaError(f"not a whole safetensors file ({error})", where=file) from None
    names = (drop,) if isinstance(drop, str) else drop or ()
    return {key: value for key, value in state.items() if key.rpartition(".")[0] not in names}


def _only_asked_masks(model: nn.Module, options: dict[str, Any]) -> None:
    """Some architectures drop paths by default; here a rate is what the config says."""
    from timm.layers import DropBlock2d

    silence(
        model,
        dropout=not any(options.get(key) for key in _KEYED_DROPOUT),
        drop_path=not options.get("drop_path_rate"),
    )
    for layer in model.modules():
        if isinstance(layer, DropBlock2d):
            layer.drop_prob = 0.0


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
