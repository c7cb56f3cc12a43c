"""Whether photos are like those of training: two Mahalanobis distances, each with a limit from the validation fold.

One distance is in the space of the frozen tower's global features (Lee et al. 2018, "A Simple Unified Framework for
Detecting Out-of-Distribution Samples", with one Gaussian instead of one a class), one in the space of how photos look
(`appearance`). A tower that was trained on a few hundred photos maps much that it never saw onto what it knows, noise
for one; how a photo looks is known without it. Covariances are shrunk (Ledoit & Wolf 2004), for there may be fewer
photos than dimensions.

An exam's distance is that of its strangest photo. The limit of each distance is a conformal one (`conformal_threshold`,
Bates et al. 2023, "Testing for outliers with conformal p-values"): an exam like those of the validation fold passes a
limit with probability at most (1 - familiar) / 2, and either with at most 1 - familiar. It says nothing of how many
strange exams are noticed; that is measured (docs/answers.md).

Means and covariances of features say little of any one patient; features of patients are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig
from prima_ray.inference.appearance import NAMES, PhotoBounds, fit_bounds
from prima_ray.inference.calibration import conformal_threshold

Matrix = NDArray[np.float64]
_SPACES = ("features", "appearance")
_MIN_PHOTOS = 20


class FamiliarityConfig(StrictConfig):
    """Which photos are called strange."""

    familiar: float = Field(default=0.95, gt=0.0, lt=1.0)
    """Share of exams like those of the validation fold that are not called strange."""
    max_exams: int = Field(default=1000, ge=1)
    """Exams of the training fold, and of the validation fold, that are looked at; drawn by their ids."""


class FamiliarityRecord(StrictConfig):
    """`model/familiarity.json`."""

    limits: dict[str, float | None]
    """Space -> the largest distance that is familiar; null: too few validation exams to say."""
    bounds: PhotoBounds | None
    num_train: int
    """Photos."""
    num_val: int
    """Exams."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gaussian:
    """Where the training photos lie in a space of D dimensions."""

    mean: NDArray[np.float32]
    """(D,)"""
    whiten: NDArray[np.float32]
    """(D, D): a training photo less the mean, times this, has about unit covariance."""

    @classmethod
    def fit(cls, points: Matrix) -> Self:
        """Of (M, D) training photos."""
        from sklearn.covariance import LedoitWolf

        mean, scale = points.mean(axis=0), points.std(axis=0)
        # A dimension that never varies says nothing, rather than everything.
        scale = np.where(scale > 1e-6 * max(1.0, float(scale.max())), scale, np.inf)
        covariance = LedoitWolf(assume_centered=True).fit((points - mean) / scale).covariance_
        values, vectors = np.linalg.eigh(covariance)
        whiten = (vectors / np.sqrt(np.maximum(values, 1e-12))) / scale[:, None]
        return cls(mean.astype(np.float32), whiten.astype(np.float32))

    def distance(self, points: Matrix) -> Matrix:
        """(M, D) -> (M,) Mahalanobis distances, as a share of the root of D: about 1 for a training photo."""
        moved = (np.asarray(points, np.float64) - self.mean) @ self.whiten.astype(np.float64)
        found: Matrix = np.sqrt((moved**2).mean(axis=-1))
        return found


@dataclass(frozen=True)
class Familiarity:
    """What is known of the training photos."""

    record: FamiliarityRecord
    spaces: dict[str, Gaussian]

    def novelty(self, features: Matrix, looks: Matrix) -> dict[str, float]:
        """Of one exam's V photos, by space: the largest distance over its limit; 1 is at the limit.

        Args:
            features: (V, C) global features.
            looks: (V, A), see `measure`.

        Returns:
            only the spaces that have a limit.
        """
        given = {"features": features, "appearance": looks}
        return {
            name: float(space.distance(given[name]).max()) / limit
            for name, space in self.spaces.items()
            if (limit := self.record.limits[name]) is not None
        }


def fit_familiarity(
    train: tuple[Matrix, Matrix, NDArray[np.int64]],
    val: tuple[Matrix, Matrix, NDArray[np.int64]],
    config: FamiliarityConfig,
    *,
    view_side: int,
) -> Familiarity:
    """Fit on training photos, with limits from the validation fold.

    Args:
        train: features (M, C), looks (M, A) and shorter sides (M,) of training photos.
        val: features (K, C), looks (K, A) and exam numbers (K,) of the validation fold's photos.
    """
    features, looks, sides = train
    exams = val[2]
    enough = len(looks) >= _MIN_PHOTOS
    record = FamiliarityRecord(
        limits=dict.fromkeys(_SPACES),
        bounds=fit_bounds(looks, sides, view_side=view_side) if enough else None,
        num_train=len(looks),
        num_val=len(np.unique(exams)),
        notes=() if enough else (f"{len(looks)} training photos are too few to tell strange photos or unusable ones",),
    )
    if not enough:
        return Familiarity(record, {})
    found = Familiarity(record, {"features": Gaussian.fit(features), "appearance": Gaussian.fit(looks)})
    photos = [(val[0][exams == exam], val[1][exams == exam]) for exam in np.unique(exams)]
    return with_limits(found, strangest(found, photos), num_val=record.num_val, config=config)


def with_limits(
    familiarity: Familiarity, distances: Mapping[str, Matrix], *, num_val: int, config: FamiliarityConfig
) -> Familiarity:
    """The same with limits from exams that were not learned from; where nothing was fitted, as it is.

    Args:
        distances: see `strangest`.
        num_val: how many exams these are.
    """
    if not familiarity.spaces:
        return familiarity
    share = 1 - (1 - config.familiar) / len(_SPACES)
    limits = {name: conformal_threshold(distances.get(name, np.zeros(0)), share) for name in _SPACES}
    notes = (f"{num_val} validation exams are too few to tell strange photos (familiar: {config.familiar:g})",)
    record = familiarity.record.model_copy(
        update={"limits": limits, "num_val": num_val, "notes": notes if limits["features"] is None else ()}
    )
    return Familiarity(record, familiarity.spaces)


def strangest(familiarity: Familiarity, photos: Sequence[tuple[Matrix, Matrix]]) -> dict[str, Matrix]:
    """Space -> (N,) the distance of each exam's strangest photo.

    Args:
        photos: features (V, C) and looks (V, A) of each exam's photos.
    """
    if not familiarity.spaces:
        return {}
    places = {"features": 0, "appearance": 1}
    return {
        name: np.array([familiarity.spaces[name].distance(exam[place]).max() for exam in photos])
        for name, place in places.items()
    }


def save_arrays(path: Path, familiarity: Familiarity) -> None:
    """`model/familiarity.safetensors`."""
    from safetensors.numpy import save_file

    arrays = {
        f"{name}.{part}": np.ascontiguousarray(getattr(space, part))
        for name, space in familiarity.spaces.items()
        for part in ("mean", "whiten")
    }
    save_file(arrays, path)


def load_familiarity(path: Path, record: FamiliarityRecord) -> Familiarity:
    """Read the arrays that belong to a record.

    Raises:
        PrimaError: they are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except FileNotFoundError:
        raise PrimaError("no such file", where=path) from None
    except (SafetensorError, OSError) as error:
        raise PrimaError(f"not a whole safetensors file ({error})", where=path) from None
    names = _SPACES if record.num_train >= _MIN_PHOTOS else ()
    odd = set(arrays) ^ {f"{name}.{part}" for name in names for part in ("mean", "whiten")}
    if odd or any(arrays["appearance.mean"].shape != (len(NAMES),) for _ in names):
        raise PrimaError(
            "these are not the arrays that familiarity.json speaks of",
            where=path,
            mend="Copy the run again, or train it again.",
        )
    return Familiarity(record, {name: Gaussian(arrays[f"{name}.mean"], arrays[f"{name}.whiten"]) for name in names})
