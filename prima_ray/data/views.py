"""Photos -> views: augmentation for training, one fixed view a photo for everything else.

Every function is pure: a view depends on the photo and on a numpy `Generator` that the caller keys by
(seed, epoch, exam, view), never on the global random state, because views are made in threads and on any rank.
To add a distortion, give `AugmentConfig` a key, `Augmentation` a parameter, and `apply_augmentation` a line; take its
random numbers from the end of the vector in `draw_augmentation`, so that all the others stay what they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageStat
from pydantic import Field, model_validator
from torch import Tensor

from prima_ray.base import StrictConfig, hash_key

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
_GRAY = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_NUM_DRAWS = 32


class AugmentConfig(StrictConfig):
    """Random distortions of a training view. A probability of 0 switches one off."""

    crop_area: tuple[float, float] = (0.4, 1.0)
    """Share of the photo's area that the crop keeps."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of the crop."""
    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.5
    quarter_turns: bool = True
    """Turn by 0, 90, 180 or 270 degrees: a lesion has no upright."""
    rotation: Probability = 0.3
    rotation_degrees: float = Field(default=20.0, ge=0.0, le=45.0)
    color: Probability = 0.8
    brightness: float = Field(default=0.2, ge=0.0, lt=1.0)
    contrast: float = Field(default=0.2, ge=0.0, lt=1.0)
    saturation: float = Field(default=0.2, ge=0.0, le=1.0)
    hue_degrees: float = Field(default=8.0, ge=0.0, le=180.0)
    blur: Probability = 0.1
    blur_sigma: tuple[float, float] = (0.3, 1.2)
    """In pixels of the finished view."""
    erase: Probability = 0.0
    erase_area: tuple[float, float] = (0.02, 0.15)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("crop_area", "crop_ratio", "blur_sigma", "erase_area"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: {low:g}, {high:g} is not a range of positive numbers")
        if self.crop_area[1] > 1 or self.erase_area[1] > 1:
            raise ValueError("crop_area and erase_area are shares of an area, at most 1")
        return self


class ViewConfig(StrictConfig):
    """From a photo to the (3, size, size) input of an image tower."""

    image_size: int = Field(default=224, ge=8)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Literal["crop", "squash"] = "crop"
    """Without augmentation: the central square, or the whole photo out of proportion."""
    num_views: Annotated[int, Field(ge=1)] | Literal["all"] = 2
    """Augmented views an exam in training; `all`: one of each photo, up to `max_photos`, as without augmentation."""
    max_photos: int = Field(default=8, ge=1)
    """Without augmentation every photo of the exam is a view, up to this many."""
    augment: AugmentConfig = AugmentConfig()

    def count_views(self, num_photos: int) -> int:
        """Training views of an exam with so many photos."""
        return min(num_photos, self.max_photos) if self.num_views == "all" else self.num_views


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The parameters of one view, free of the photo's size."""

    area: float
    ratio: float
    left: float
    top: float
    flip_horizontal: bool
    flip_vertical: bool
    quarter_turns: int
    degrees: float
    brightness: float
    contrast: float
    saturation: float
    hue_degrees: float
    blur_sigma: float
    erase: tuple[float, float, float, float] | None
    """Left, top, width, height as shares of the view."""

    def crop_shares(self, aspect: float) -> tuple[float, float]:
        """Width and height of the crop as shares of a photo whose width over height is ``aspect``."""
        return (
            min(1.0, math.sqrt(self.area * self.ratio / aspect)),
            min(1.0, math.sqrt(self.area / self.ratio * aspect)),
        )


def view_generator(*key: object) -> np.random.Generator:
    """Random numbers that depend on ``key`` alone: (seed, epoch, exam, view)."""
    return np.random.Generator(np.random.PCG64(hash_key(*key)))


def choose_photos(num_photos: int, num_views: int, rng: np.random.Generator) -> list[int]:
    """Which photo each view shows: different ones while there are any, then the same ones again."""
    order = [int(index) for index in rng.permutation(num_photos)]
    return [order[view % num_photos] for view in range(num_views)]


def draw_augmentation(rng: np.random.Generator, config: AugmentConfig) -> Augmentation:
    """Draw one view's parameters. Each takes fixed places of one random vector, whatever the config switches off."""
    u = rng.random(_NUM_DRAWS)

    def between(low: float, high: float, draw: float) -> float:
        return low + (high - low) * float(draw)

    def factor(spread: float, draw: float) -> float:
        return between(1.0 - spread, 1.0 + spread, draw) if u[10] < config.color else 1.0

    erase = None
    if u[17] < config.erase:
        area, ratio = between(*config.erase_area, u[18]), math.exp(between(-1.0, 1.0, u[19]))
        width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
        erase = (float(u[20]) * (1.0 - width), float(u[21]) * (1.0 - height), width, height)
    return Augmentation(
        area=between(*config.crop_area, u[0]),
        ratio=math.exp(between(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1]), u[1])),
        left=float(u[2]),
        top=float(u[3]),
        flip_horizontal=bool(u[4] < config.horizontal_flip),
        flip_vertical=bool(u[5] < config.vertical_flip),
        quarter_turns=int(4 * u[6]) if config.quarter_turns else 0,
        degrees=between(-config.rotation_degrees, config.rotation_degrees, u[8]) if u[7] < config.rotation else 0.0,
        brightness=factor(config.brightness, u[11]),
        contrast=factor(config.contrast, u[12]),
        saturation=factor(config.saturation, u[13]),
        hue_degrees=between(-config.hue_degrees, config.hue_degrees, u[14]) if u[10] < config.color else 0.0,
        blur_sigma=between(*config.blur_sigma, u[16]) if u[15] < config.blur else 0.0,
        erase=erase,
    )


def augmented_side(draw: Augmentation, aspect: float, size: int) -> int:
    """The shortest side, in pixels, at which a decoded photo still holds ``size`` pixels across the crop."""
    return math.ceil(size / min(draw.crop_shares(aspect)))


def apply_augmentation(
    image: Image.Image, draw: Augmentation, *, size: int, aspect: float | None = None, fill: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """One training view, (size, size, 3) uint8.

    Args:
        image: upright RGB, perhaps decoded at a fraction of its size.
        aspect: width over height of the full photo; the decoder rounds the sides of a reduced one.
        fill: the colour of an erased patch: the data's mean.
    """
    width, height = image.size
    share_w, share_h = draw.crop_shares(aspect if aspect is not None else width / height)
    left, top = draw.left * (1.0 - share_w) * width, draw.top * (1.0 - share_h) * height
    box = (left, top, min(width, left + share_w * width), min(height, top + share_h * height))
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    for wanted, method in (
        (draw.flip_horizontal, Image.Transpose.FLIP_LEFT_RIGHT),
        (draw.flip_vertical, Image.Transpose.FLIP_TOP_BOTTOM),
        (draw.quarter_turns == 1, Image.Transpose.ROTATE_90),
        (draw.quarter_turns == 2, Image.Transpose.ROTATE_180),
        (draw.quarter_turns == 3, Image.Transpose.ROTATE_270),
    ):
        view = view.transpose(method) if wanted else view
    if draw.degrees:
        view = _rotate(view, draw.degrees)
    view = _recolor(view, draw)
    if draw.blur_sigma:
        view = view.filter(ImageFilter.GaussianBlur(draw.blur_sigma))
    if draw.erase is not None:
        x, y, w, h = (round(share * size) for share in draw.erase)
        view.paste(fill, (x, y, x + w, y + h))
    return np.asarray(view)


def _rotate(view: Image.Image, degrees: float) -> Image.Image:
    """Rotate about the centre; corners show the reflected edge, not a black wedge that no photo has."""
    size = view.width
    angle = math.radians(abs(degrees))
    margin = min(size - 1, math.ceil(0.5 * size * (math.cos(angle) + math.sin(angle) - 1.0)) + 1)
    padded = Image.fromarray(np.pad(np.asarray(view), ((margin, margin), (margin, margin), (0, 0)), mode="reflect"))
    return padded.rotate(degrees, Image.Resampling.BILINEAR).crop((margin, margin, margin + size, margin + size))


def _recolor(view: Image.Image, draw: Augmentation) -> Image.Image:
    """Brightness, contrast about the mean grey, saturation and hue: together one affine map of RGB, one pass in C."""
    if draw.brightness == draw.contrast == draw.saturation == 1.0 and not draw.hue_degrees:
        return view
    saturation = draw.saturation * np.eye(3) + (1.0 - draw.saturation) * np.outer(np.ones(3), _GRAY)
    angle = math.radians(draw.hue_degrees)
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    hue = np.linalg.solve(_YIQ, turn @ _YIQ)
    matrix = draw.contrast * draw.brightness * (hue @ saturation)
    offset = (1.0 - draw.contrast) * draw.brightness * ImageStat.Stat(view.convert("L")).mean[0]
    rows = np.column_stack([matrix, np.full(3, offset)])
    return view.convert("RGB", tuple(float(value) for value in rows.ravel()))


def evaluation_view(image: Image.Image, *, size: int, resize: Literal["crop", "squash"]) -> NDArray[np.uint8]:
    """The one view of a photo outside of training, (size, size, 3) uint8: its central square, or all of it squashed."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if resize == "crop" else (0, 0, width, height)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def fill_color(config: ViewConfig) -> tuple[int, int, int]:
    """The mean colour as 8-bit RGB."""
    red, green, blue = (round(255 * value) for value in config.mean)
    return red, green, blue


def normalise(pixels: NDArray[np.uint8], config: ViewConfig) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, zero mean and unit variance by the tower's statistics."""
    images = torch.from_numpy(pixels).movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    shape: Any = (3, 1, 1)
    scale = torch.tensor([1.0 / (255.0 * std) for std in config.std]).view(shape)
    shift = torch.tensor([mean / std for mean, std in zip(config.mean, config.std, strict=True)]).view(shape)
    return images.mul_(scale).sub_(shift)
