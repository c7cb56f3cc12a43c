"""How a photo looks, in a handful of plain numbers, and whether it can be used at all.

The numbers are of the view that the model reads, so a photo counts as the model sees it. They serve three ends: bounds
outside of which a photo is unusable (dark, blank, noise), a second look for photos unlike those of training
(`familiarity`), and drift. To add a number: a line in `measure` and its name in `NAMES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prima_ray.base import StrictConfig
from prima_ray.data.views import ViewConfig

Matrix = NDArray[np.float64]
_LUMA = np.array([0.299, 0.587, 0.114])
_NUM_SCALES = 4
_FLOOR = 1e-3
"""Added before logarithms are taken: a quarter of a grey level."""
NAMES = (
    *("brightness", "contrast", "blue", "blue_spread", "red", "red_spread"),
    *(f"detail_{scale}" for scale in range(_NUM_SCALES)),
    *("dark_2", "dark_25", "light_25", "light_2", "middle", "colour_detail"),
)
"""`detail_0` is the log of the mean gradient of the view's grey, `detail_1` of the view at half its size, and so on."""


def measure(pixels: NDArray[np.floating]) -> Matrix:
    """(M, S, S, 3) RGB in 0-1 -> (M, A), a column a name of `NAMES`. S is 16 at least; below that detail repeats."""
    view = np.asarray(pixels, dtype=np.float64)
    grey = view @ _LUMA
    # Differences to blue and red, as in YCbCr (ITU-R BT.601).
    blue, red = 0.564 * (view[..., 2] - grey), 0.713 * (view[..., 0] - grey)
    columns = [function(plane, axis=(1, 2)) for plane in (grey, blue, red) for function in (np.mean, np.std)]
    plane = grey
    for _ in range(_NUM_SCALES):
        columns.append(np.log(_FLOOR + _gradient(plane)))
        if plane.shape[1] >= 4:
            plane = _halved(plane)
    columns += list(np.quantile(grey.reshape(len(grey), -1), [0.02, 0.25, 0.75, 0.98], axis=1))
    quarter = grey.shape[1] // 4
    inner = grey[:, quarter : grey.shape[1] - quarter, quarter : grey.shape[2] - quarter]
    columns.append(inner.mean(axis=(1, 2)) - columns[0])
    colour = np.abs(np.diff(view - grey[..., None], axis=2)).mean(axis=(1, 2, 3))
    columns.append(np.log(_FLOOR + colour))
    return np.stack(columns, axis=1)


def _gradient(plane: Matrix) -> Matrix:
    across, down = np.diff(plane, axis=2)[:, :-1], np.diff(plane, axis=1)[:, :, :-1]
    found: Matrix = np.hypot(across, down).mean(axis=(1, 2))
    return found


def _halved(plane: Matrix) -> Matrix:
    side = plane.shape[1] // 2
    found: Matrix = plane[:, : 2 * side, : 2 * side].reshape(len(plane), side, 2, side, 2).mean(axis=(2, 4))
    return found


def pixels_of(images: Tensor, views: ViewConfig) -> NDArray[np.float32]:
    """Normalised images (M, 3, S, S) -> (M, S, S, 3) RGB in 0-1: what `normalise` was given."""
    channels = images.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    found: NDArray[np.float32] = channels * np.asarray(views.std, np.float32) + np.asarray(views.mean, np.float32)
    return np.clip(found, 0.0, 1.0)


class PhotoBounds(StrictConfig):
    """What the training photos were like; a photo far beyond is unusable.

    Low and high are the quantiles 0.01 and 0.99 of the training photos, so that a few bad ones among them do not widen
    the bounds; "far beyond" is by a factor of two, which none of them need be.
    """

    brightness: tuple[float, float]
    """Mean grey, 0-1."""
    contrast: float
    """Standard deviation of the grey: low."""
    detail: tuple[float, float]
    """Mean gradient of the grey from pixel to pixel."""
    side: int
    """Shorter side in pixels: low, at most the view's."""

    def complaints(self, look: Sequence[float], *, width: int, height: int) -> Iterator[str]:
        """What is wrong with one photo, for people; nothing where it can be used.

        Args:
            look: its row of `measure`.
        """
        value = dict(zip(NAMES, look, strict=True))
        detail = _detail(value["detail_0"])
        if min(width, height) < self.side / 2:
            yield f"too small ({width} x {height} pixels; those of training have {self.side} at least)"
        if value["brightness"] < self.brightness[0] / 2:
            darkest = _share(self.brightness[0])
            yield f"too dark (mean {_share(value['brightness'])}; those of training have {darkest} at least)"
        if 1 - value["brightness"] < (1 - self.brightness[1]) / 2:
            lightest = _share(self.brightness[1])
            yield f"too bright (mean {_share(value['brightness'])}; those of training have {lightest} at most)"
        if value["contrast"] < self.contrast / 2 or detail < self.detail[0] / 2:
            yield "blank or far out of focus: it shows next to no structure"
        if detail > 2 * self.detail[1]:
            yield "noise rather than a picture: neighbouring pixels have nothing in common"


def _share(value: float) -> str:
    return f"{value:.0%} of white"


def _detail(logarithm: float) -> float:
    return float(np.exp(logarithm) - _FLOOR)


def fit_bounds(looks: Matrix, sides: NDArray[np.int64], *, view_side: int) -> PhotoBounds:
    """The bounds of training photos.

    Args:
        looks: (M, A) of `measure`.
        sides: (M,) shorter sides in pixels.
        view_side: what the model reads.
    """
    columns = dict(zip(NAMES, looks.T, strict=True))

    def quantiles(values: Matrix) -> tuple[float, float]:
        low, high = np.quantile(values, [0.01, 0.99])
        return float(low), float(high)

    return PhotoBounds(
        brightness=quantiles(columns["brightness"]),
        contrast=quantiles(columns["contrast"])[0],
        detail=quantiles(np.exp(columns["detail_0"]) - _FLOOR),
        side=int(min(view_side, np.quantile(sides, 0.01))),
    )
