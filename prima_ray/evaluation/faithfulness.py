"""Do explanations name what the answer rests on? Deletion curves beside those of random orders.

Take away what an explanation ranks highest, then the next, and watch the predicted class's probability (deletion, RISE,
Petsiuk et al. 2018): the faster it falls, the more of the answer was there. The figure is the area between the curve
and the mean curve of random orders on the same exam, in probability: zero is what a map is worth that says nothing. It
is of the first part of the deletion alone: what is left in the end is an empty picture, which has a diagnosis too, and
where that is the predicted one every curve comes back to where it began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prima_ray.base import StrictConfig
from prima_ray.evaluation.statistics import mean_interval, verdict

Values = NDArray[np.float64]
_STEPS = 21


class ExplanationsConfig(StrictConfig):
    """Whether explanations are checked, and on how many exams; each is several hundred questions to the model."""

    enabled: bool = False
    """`--explanations` says true."""
    num_exams: int = Field(default=24, ge=1)
    """Of the scored exams, drawn by their names."""
    seed: int = 0
    cells: int = Field(default=6, ge=2)
    """A photo is taken away in so many cells each way."""
    share: float = Field(default=0.3, gt=0, le=1)
    """Of the deletion, from its beginning, that the figure is of."""
    random_orders: int = Field(default=8, ge=1)
    """That a map is held to, an exam."""
    permutations: int = Field(default=10, ge=1)
    """That the Shapley values are a mean of."""
    examples: int = Field(default=2, ge=0)
    """Exams of each kind (right, wrong, abstained) that are shown whole. They are patients' photos: 0 shows none."""


@dataclass(frozen=True)
class Deleted:
    """What came of one exam's deletions of one kind (photo cells, or attributes)."""

    patient: str
    curves: Mapping[str, Values]
    """Method -> (K + 1,) probability of the predicted class after 0 ... K were taken away."""
    random: Values
    """(O, K + 1) of random orders."""
    scores: Mapping[str, Values]
    """Method -> (K,) what it says of each."""


def order_of(scores: Values) -> NDArray[np.int64]:
    """What a method ranks highest first; ties by place."""
    return np.argsort(-scores, kind="stable")


def area(curve: Values, share: float) -> float:
    """Mean height of a piecewise linear curve (K + 1,) over the first share of what is taken away."""
    steps = len(curve) - 1
    inner = np.arange(steps + 1)[np.arange(steps + 1) < share * steps] / steps
    places = np.append(inner, share)
    heights = np.interp(places, np.linspace(0, 1, steps + 1), curve)
    return float(np.trapezoid(heights, places) / share)


def faithfulness_evidence(deleted: Sequence[Deleted], *, share: float, num_resamples: int, seed: int) -> dict[str, Any]:
    """Of one kind of deletions.

    Args:
        share: see `ExplanationsConfig`.

    Returns:
        `methods`: name -> `num_exams` (where it says something), `gain` (random's area less its own, with its interval
        over patients), `verdict` and `curve`; `random`: `curve`; `agreement`: Spearman's correlation of the first
        method with each other one, the mean over the exams where both say something.
    """
    again = {"num_resamples": num_resamples, "seed": seed}
    names = list(dict.fromkeys(name for item in deleted for name in item.curves))
    methods, agreement = {}, {}
    for name in names:
        mine = [item for item in deleted if name in item.curves]
        gains = [area(item.random.mean(axis=0), share) - area(item.curves[name], share) for item in mine]
        gain = mean_interval(np.array(gains), [item.patient for item in mine], **again)
        curve = np.mean([_resampled(item.curves[name]) for item in mine], axis=0)
        methods[name] = {
            "num_exams": len(mine),
            "gain": asdict(gain),
            "verdict": verdict(gain),
            "curve": curve.tolist(),
        }
        both = [item for item in mine if name != names[0] and names[0] in item.scores]
        if both:
            found = np.array([_spearman(item.scores[names[0]], item.scores[name]) for item in both])
            agreement[name] = asdict(mean_interval(found, [item.patient for item in both], **again))
    random = np.mean([_resampled(item.random.mean(axis=0)) for item in deleted], axis=0) if deleted else np.zeros(0)
    return {
        "num_exams": len(deleted),
        "num_patients": len({item.patient for item in deleted}),
        "methods": methods,
        "agreement": agreement,
        "random": {"curve": random.tolist()},
    }


def by_attribute(values: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Mean absolute Shapley value of every attribute over the exams that give it, the largest first."""
    found: dict[str, list[float]] = {}
    for exam in values:
        for name, value in exam.items():
            found.setdefault(name, []).append(abs(value))
    rows = [
        {"attribute": name, "mean_absolute": float(np.mean(sizes)), "num_exams": len(sizes)}
        for name, sizes in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["mean_absolute"], row["attribute"]))


def _resampled(curve: Values) -> Values:
    """At even shares, so that curves of different lengths have a mean."""
    shares = np.linspace(0, 1, _STEPS)
    return np.interp(shares, np.linspace(0, 1, len(curve)), curve)


def _spearman(first: Values, second: Values) -> float:
    """NaN where one of them says the same of everything."""
    from scipy.stats import rankdata

    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])
