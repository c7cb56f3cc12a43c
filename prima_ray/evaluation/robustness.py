"""Robustness: the same exams with less known of them, or with worse photos.

An alteration is a function of an exam's row alone: what it draws depends on (seed, alteration, exam), so it is the same
in every order and every batch. To add one: a line in `alterations`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig, hash_key
from prima_ray.data.images import ImageRejected, decode_image
from prima_ray.evaluation.metrics import Labels, Probabilities, headline_draws
from prima_ray.evaluation.statistics import bootstrap, paired_differences, verdict

Row = dict[str, Any]
Change = Callable[[Row], Row]
_Draw = np.random.Generator
AS_THEY_ARE = "as they are"


class RobustnessConfig(StrictConfig):
    """How exams are altered; each value is a pass of the test fold through the model."""

    enabled: bool = False
    """`--robustness` says true."""
    seed: int = 0
    drop_rates: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the attributes that are left out, each by itself, at random."""
    in_the_pattern: bool = True
    """What another exam, drawn at random from those that are not scored, lacks is left out."""
    without_attributes: bool = True
    without_photos: bool = True
    """The mean colour in the place of every photo: the model cannot do without one."""
    blur: tuple[float, ...] = (0.01, 0.03)
    """Standard deviations as shares of the shorter side."""
    darken: tuple[float, ...] = (0.5, 0.25)
    """Shares of the light that are left."""
    crop: tuple[float, ...] = (0.5, 0.25)
    """Shares of the area that are left, the place at random."""
    jpeg: tuple[int, ...] = Field(default=(20, 5))
    """Qualities, 1 to 95."""


@dataclass(frozen=True)
class Alteration:
    """One kind of worse exams."""

    name: str
    title: str
    change: Change


def alterations(
    config: RobustnessConfig,
    *,
    reads_attributes: bool,
    recorded: Sequence[Iterable[str]] = (),
    mean_color: tuple[int, int, int] = (128, 128, 128),
) -> list[Alteration]:
    """What a config asks for.

    Args:
        reads_attributes: False leaves out what alters attributes.
        recorded: of exams that are not scored the names of the attributes that are known.
        mean_color: 8-bit RGB of a photo that is not there.
    """
    seed, found = config.seed, []
    if reads_attributes:
        for rate in config.drop_rates:
            title = f"{rate:.0%} of the attributes left out at random"
            found.append(Alteration(f"drop_{rate:g}", title, partial(_drop, rate=rate, seed=seed)))
        patterns = [frozenset(names) for names in recorded]
        if config.in_the_pattern and patterns:
            title = "attributes missing as in another exam"
            found.append(Alteration("pattern", title, partial(_keep_pattern, patterns=patterns, seed=seed)))
        if config.without_attributes:
            found.append(Alteration("no_attributes", "no attributes", lambda row: {**row, "attributes": []}))
    photos: list[tuple[str, str, Callable[[Image.Image, _Draw], Image.Image], int | None]] = []
    for sigma in config.blur:
        photos.append((f"blur_{sigma:g}", f"photos blurred by {sigma:.0%} of their side", _blurring(sigma), None))
    for light in config.darken:
        photos.append((f"darken_{light:g}", f"photos with {light:.0%} of their light", _darkening(light), None))
    for area in config.crop:
        photos.append((f"crop_{area:g}", f"{area:.0%} of the photos' area", _cropping(area), None))
    for level in config.jpeg:
        photos.append((f"jpeg_{level}", f"photos as JPEG of quality {level}", lambda photo, _: photo, level))
    if config.without_photos:
        blank = _blank(mean_color)
        photos.append(("no_photos", "no photos (their mean colour instead)", blank, None))
    for name, title, make, quality in photos:
        change = partial(_rephotograph, make=make, seed=seed, name=name, quality=quality)
        found.append(Alteration(name, title, change))
    return found


def altered(tables: Iterable[pa.Table], alteration: Alteration) -> Iterator[pa.Table]:
    """Tables with the columns of the shard schema, every row altered."""
    for table in tables:
        rows = [alteration.change(row) for row in table.to_pylist()]
        yield pa.Table.from_pylist(rows, schema=table.schema)


def _drop(row: Row, rate: float, seed: int) -> Row:
    kept = drop_attributes(dict(row["attributes"] or ()), rate, seed, "drop", row["exam_id"])
    return {**row, "attributes": list(kept.items())}


def drop_attributes(attributes: Mapping[str, str], rate: float, *key: object) -> dict[str, str]:
    """Each left out by itself with this probability, drawn by ``key``: what a rate leaves out, a higher one does
    too."""
    return {name: value for name, value in attributes.items() if hash_key(*key, name) / 2**64 >= rate}


def _keep_pattern(row: Row, patterns: Sequence[frozenset[str]], seed: int) -> Row:
    other = patterns[hash_key(seed, "pattern", row["exam_id"]) % len(patterns)]
    return {**row, "attributes": [(name, value) for name, value in row["attributes"] or () if name in other]}


def _rephotograph(
    row: Row, make: Callable[[Image.Image, _Draw], Image.Image], *, seed: int, name: str, quality: int | None
) -> Row:
    images = []
    for number, photo in enumerate(row["images"]):
        rng = np.random.default_rng(hash_key(seed, name, row["exam_id"], number))
        try:
            picture = make(decode_image(photo["bytes"]), rng)
        except ImageRejected as error:
            raise PrimaError(f"a photo cannot be used: {error.detail}", where=row["exam_id"]) from None
        stream = io.BytesIO()
        if quality is None:
            picture.save(stream, "PNG", compress_level=1)
        else:
            picture.save(stream, "JPEG", quality=quality)
        images.append({**photo, "bytes": stream.getvalue(), "width": picture.width, "height": picture.height})
    return {**row, "images": images}


def _blurring(sigma: float) -> Callable[[Image.Image, _Draw], Image.Image]:
    return lambda photo, _: photo.filter(ImageFilter.GaussianBlur(sigma * min(photo.size)))


def _darkening(light: float) -> Callable[[Image.Image, _Draw], Image.Image]:
    return lambda photo, _: photo.point(lambda value: round(light * value))


def _cropping(area: float) -> Callable[[Image.Image, _Draw], Image.Image]:
    def crop(photo: Image.Image, rng: _Draw) -> Image.Image:
        width, height = (max(1, round(side * area**0.5)) for side in photo.size)
        left = int(rng.integers(0, photo.width - width + 1))
        top = int(rng.integers(0, photo.height - height + 1))
        return photo.crop((left, top, left + width, top + height))

    return crop


def _blank(color: tuple[int, int, int]) -> Callable[[Image.Image, _Draw], Image.Image]:
    return lambda photo, _: Image.new("RGB", photo.size, color)


def robustness_evidence(
    labels: Labels,
    conditions: Mapping[str, Probabilities],
    patients: Sequence[str],
    *,
    titles: Mapping[str, str],
    answered: Mapping[str, NDArray[np.bool_]] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """A record a condition: `name, title, figures`, `differences` (altered minus as they are, paired) and `verdicts`
    (null of the first), `confidence`: the mean of the largest probabilities, `answered`: the share that is,
    `accuracy_answered`.

    Args:
        conditions: name -> (N, C); the first is of the exams as they are.
        answered: name -> (N,) whether it is not too uncertain; None: all are.
    """
    scores = bootstrap(headline_draws, labels, conditions, patients, num_resamples=num_resamples, seed=seed)
    first = next(iter(conditions))
    found = []
    for name, probabilities in conditions.items():
        gaps = paired_differences(scores[name], scores[first]) if name != first else None
        kept = answered[name] if answered else np.ones(len(labels), dtype=bool)
        right = probabilities.argmax(axis=1) == labels if len(labels) else kept
        found.append(
            {
                "name": name,
                "title": titles.get(name, name),
                "figures": {figure: asdict(value) for figure, value in scores[name].intervals().items()},
                "differences": {figure: asdict(gap) for figure, gap in gaps.items()} if gaps else None,
                "verdicts": {figure: verdict(gap) for figure, gap in gaps.items()} if gaps else None,
                "confidence": float(probabilities.max(axis=1).mean()) if len(labels) else float("nan"),
                "answered": float(kept.mean()) if len(kept) else float("nan"),
                "accuracy_answered": float(right[kept].mean()) if kept.any() else float("nan"),
            }
        )
    return {"conditions": found}
