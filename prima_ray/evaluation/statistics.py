"""How sure a figure is: the bootstrap over patients, since the exams of one patient are no independent evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import hash_key
from prima_ray.evaluation.metrics import Labels, Probabilities

Figures = Callable[[Labels, Probabilities], dict[str, float]]
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its percentile interval; the ends are NaN where one patient, or none, was there to draw from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """A model's figures on some exams, and the same figures on every resample of the patients."""

    values: Mapping[str, float]
    draws: Mapping[str, NDArray[np.float64]]

    def intervals(self, level: float = LEVEL) -> dict[str, Interval]:
        """Every figure with its interval."""
        return {name: Interval(value, *_percentiles(self.draws[name], level)) for name, value in self.values.items()}


def resample_patients(patients: Sequence[str], *, num_resamples: int, seed: int) -> list[NDArray[np.int64]]:
    """Row numbers of each resample: as many patients as there are, drawn with replacement, with all their exams."""
    names, group = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if not len(names):
        return [np.empty(0, dtype=np.int64)] * num_resamples
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(names) + 1))
    rng = np.random.Generator(np.random.PCG64(hash_key(seed, "bootstrap")))
    drawn = rng.integers(0, len(names), size=(num_resamples, len(names)))
    return [np.concatenate([order[starts[name] : starts[name + 1]] for name in row]) for row in drawn]


def bootstrap(
    figures: Figures,
    labels: Labels,
    models: Mapping[str, Probabilities],
    patients: Sequence[str],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Scores]:
    """Score several models on the same exams, and on the same resamples of their patients.

    Args:
        models: name -> (N, C) probabilities.
        patients: of every exam; fewer than two different ones give no intervals.
    """
    few = len(set(patients)) < 2
    resamples = [] if few else resample_patients(patients, num_resamples=num_resamples, seed=seed)
    found = {}
    for model, probabilities in models.items():
        values = figures(labels, probabilities)
        draws = [figures(labels[rows], probabilities[rows]) for rows in resamples]
        found[model] = Scores(
            values, {name: np.array([draw[name] for draw in draws], dtype=np.float64) for name in values}
        )
    return found


def paired_differences(first: Scores, second: Scores, level: float = LEVEL) -> dict[str, Interval]:
    """First minus second, with the interval of the difference: both saw the same resamples."""
    return {
        name: Interval(
            first.values[name] - second.values[name],
            *_percentiles(first.draws[name] - second.draws[name], level),
        )
        for name in first.values
    }


def _percentiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    tail = 50 * (1 - level)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof = 1; NaN for fewer than two values)."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")
