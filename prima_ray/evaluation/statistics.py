"""How sure a figure is: the bootstrap over patients, since the exams of one patient are no independent evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import hash_key
from prima_ray.evaluation.metrics import Labels, Probabilities

Figures = Callable[[Labels, Probabilities], dict[str, float]]


@dataclass(frozen=True)
class Interval:
    """A figure with its percentile interval."""

    value: float
    low: float
    high: float


def resample_patients(patients: Sequence[str], *, num_resamples: int, seed: int) -> list[NDArray[np.int64]]:
    """Row numbers of each resample: as many patients as there are, drawn with replacement, with all their exams."""
    names, group = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(names) + 1))
    rng = np.random.Generator(np.random.PCG64(hash_key(seed, "bootstrap")))
    drawn = rng.integers(0, len(names), size=(num_resamples, len(names)))
    return [np.concatenate([order[starts[name] : starts[name + 1]] for name in row]) for row in drawn]


def intervals(
    figures: Figures,
    labels: Labels,
    probabilities: Probabilities,
    patients: Sequence[str],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Every figure with its percentile interval over resampled patients."""
    found = figures(labels, probabilities)
    if not len(labels):
        return {name: Interval(value, float("nan"), float("nan")) for name, value in found.items()}
    draws = [
        figures(labels[rows], probabilities[rows])
        for rows in resample_patients(patients, num_resamples=num_resamples, seed=seed)
    ]
    return {
        name: Interval(value, *_percentiles([draw[name] for draw in draws], level)) for name, value in found.items()
    }


def paired_differences(
    figures: Figures,
    labels: Labels,
    first: Probabilities,
    second: Probabilities,
    patients: Sequence[str],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """First minus second on the same exams, with the interval of the difference over the same resamples."""
    one, two = figures(labels, first), figures(labels, second)
    draws: dict[str, list[float]] = {name: [] for name in one}
    for rows in resample_patients(patients, num_resamples=num_resamples, seed=seed):
        left, right = figures(labels[rows], first[rows]), figures(labels[rows], second[rows])
        for name, values in draws.items():
            values.append(left[name] - right[name])
    return {name: Interval(one[name] - two[name], *_percentiles(draws[name], level)) for name in one}


def _percentiles(values: Sequence[float], level: float) -> tuple[float, float]:
    tail = 50 * (1 - level)
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof = 1; NaN for fewer than two values)."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")
