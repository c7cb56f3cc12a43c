"""Random masks that belong to an exam: dropout and stochastic depth keyed by (seed, epoch, exam, layer).

torch's dropout draws from a generator a process, so its masks depend on the rank, on the micro-batch and on the place
in it. Here a value's fate is a pure function of integers: the exam's key of this epoch (`ImageTextBatch.mask_keys`),
the layer's name, and the place of the value within its exam. So it is the same for any number of workers, in both
passes of the gradient cache, in a recomputation under gradient checkpointing, on a CPU and on a GPU.

Places are counted exam by exam, row by row. A layer therefore has to see exams first (several rows an exam, such as
its views or the windows of an image, one after the other), and padding behind what is real: then a token has the same
place however long the longest text of its batch is. A layer that is called twice in one forward pass drops the same
places twice.

To key another kind of random layer: a branch in `_keyed`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prima_ray.base import hash_key

_LEVELS = 2**16
"""A fate is 16 bits wide: a rate is rounded to a multiple of 1 / 65536."""


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# SplitMix64 (Steele, Lea & Flood 2014). int64 wraps around as unsigned numbers do; only shifts differ, by their sign.
_GAMMA = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place."""
    for shift, factor in _ROUNDS:
        x ^= (x >> shift) & (2 ** (64 - shift) - 1)
        x *= factor
    x ^= (x >> 31) & (2**33 - 1)
    return x


def keep_mask(keys: Tensor, count: int, rate: float) -> Tensor:
    """Which of ``count`` values of every stream are kept: (N,) int64 keys -> (N, count) bool, False at about ``rate``.

    A value's fate depends on its key and its place alone, not on ``count``. A step of the generator gives four fates,
    so the work takes two bytes a value, half of what the values themselves do.
    """
    words = torch.arange(1, -(-count // 4) + 1, device=keys.device) * _GAMMA
    fates = _mix(keys[:, None] + words).view(torch.int16)[:, :count]
    return fates < _kept(rate) - _LEVELS // 2


def _kept(rate: float) -> int:
    """How many of the levels of a fate are kept; never all, never none."""
    return min(max(round((1 - rate) * _LEVELS), 1), _LEVELS - 1)


class ExamKeys:
    """The exams that a model is at work on; its layers share one.

    It stays until the next forward pass: gradient checkpointing runs layers again during backward, from threads of
    its own.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def note(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model, whose only argument is the batch."""
        del module
        self.keys = arguments[0].mask_keys

    def of(self, layer: str, rows: int) -> Tensor:
        """(N,) int64: the exams' keys for one layer that sees so many rows.

        Raises:
            ValueError: the batch brought no keys, or the rows are no whole number an exam.
        """
        if self.keys is None:
            raise ValueError(f"{layer} drops at random, but the batch has no mask_keys to draw its masks from")
        if rows % len(self.keys):
            raise ValueError(f"{layer}: {rows} rows of {len(self.keys)} exams; masks are keyed by exam, exams first")
        return self.keys


class _Keyed(nn.Module):
    # Not called `p` or `drop_prob`: whoever reads a rate wants to draw masks of its own.
    def __init__(self, layer: str, rate: float, exams: ExamKeys) -> None:
        super().__init__()
        self.layer, self.rate = layer, rate
        self._exams = exams
        self._salt = _signed(hash_key("mask", layer))

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"

    def _drop(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Values of ``x`` to zero by masks of ``shape``, exams first; the others scaled, so that the mean stays."""
        keys = self._exams.of(self.layer, shape[0])
        count = torch.Size(shape).numel() // len(keys)
        keep = keep_mask(_mix(keys + self._salt), count, self.rate).reshape(shape)
        # A mask of one byte a value is all that backward needs.
        return x.masked_fill(~keep, 0.0) * (_LEVELS / _kept(self.rate))


class KeyedDropout(_Keyed):
    """`nn.Dropout` with masks keyed by exam."""

    def forward(self, x: Tensor) -> Tensor:
        return self._drop(x, tuple(x.shape)) if self.training else x


class KeyedDropPath(_Keyed):
    """timm's `DropPath`, stochastic depth (Huang et al. 2016), keyed by exam and row: an image's path goes as one."""

    def forward(self, x: Tensor) -> Tensor:
        return self._drop(x, (len(x), *[1] * (x.ndim - 1))) if self.training else x


def key_random_masks(model: nn.Module) -> None:
    """Put keyed layers in the place of a model's dropout and DropPath, where their rate is above 0, in place.

    The model must be called with an `ImageTextBatch`. What draws masks elsewhere (inside attention, by channels) is
    left as it is: `training.task.refuse_unkeyed` finds it.
    """
    exams, found = ExamKeys(), False
    # One layer may stand under several names.
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        keyed = _keyed(name, layer, exams)
        if keyed is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, keyed.train(layer.training))
            found = True
    if found:
        model.register_forward_pre_hook(exams.note)


def _keyed(name: str, layer: nn.Module, exams: ExamKeys) -> nn.Module | None:
    if type(layer) is nn.Dropout and layer.p > 0:
        return KeyedDropout(name, layer.p, exams)
    if is_drop_path(layer) and float(layer.drop_prob or 0.0) > 0:  # type: ignore[arg-type]
        return KeyedDropPath(name, float(layer.drop_prob), exams)  # type: ignore[arg-type]
    return None


def is_drop_path(layer: nn.Module) -> bool:
    """Whether this is timm's DropPath, told by its name: importing timm takes seconds."""
    return type(layer).__name__ == "DropPath" and getattr(layer, "scale_by_keep", False) is True


def silence(module: nn.Module, *, dropout: bool = True, drop_path: bool = True) -> None:
    """Set the rates of dropout and DropPath layers to 0, in place."""
    for layer in module.modules():
        if dropout and isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
        elif drop_path and is_drop_path(layer):
            layer.drop_prob = 0.0  # type: ignore[assignment]
