"""How sure a figure is: the bootstrap over patients, since the exams of one patient are no independent evidence.

Everything here takes labels, probabilities and patients, never files: one run, two runs and a study of many use the
same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import hash_key
from prima_ray.evaluation.metrics import Draws, Figures, Labels, Probabilities, Weights

LEVEL = 0.95
Verdict = Literal["better", "not distinguishable", "worse", "too few"]
_BLOCK = 4_000_000
"""Weights held at once: a thousand resamples of 4000 exams."""


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
    by_fold: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Each figure's value in every fold, where folds were told: `mean_sd` of them goes beside the interval."""

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
    drawn = _draw(len(names), num_resamples, seed)
    return [np.concatenate([order[starts[name] : starts[name + 1]] for name in row]) for row in drawn]


def resample_weights(patients: Sequence[str], *, num_resamples: int, seed: int) -> Iterator[Weights]:
    """The same resamples as weights (B, N), in blocks of some of them: how often each exam was drawn."""
    names, group = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if not len(names):
        yield np.zeros((num_resamples, 0))
        return
    drawn, size = _draw(len(names), num_resamples, seed), max(1, _BLOCK // len(patients))
    for start in range(0, num_resamples, size):
        counts = [np.bincount(row, minlength=len(names)) for row in drawn[start : start + size]]
        yield np.array(counts, dtype=np.float64)[:, group]


def _draw(num_patients: int, num_resamples: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.Generator(np.random.PCG64(hash_key(seed, "bootstrap")))
    return rng.integers(0, num_patients, size=(num_resamples, num_patients))


def resampled(plain: Callable[[Labels, Probabilities], Mapping[str, float]]) -> Figures:
    """Any function of labels and probabilities as `Figures`: it is called once a resample."""

    def figures(labels: Labels, probabilities: Probabilities, weights: Weights) -> Draws:
        places = [np.repeat(np.arange(len(labels)), row.astype(np.int64)) for row in weights]
        found = [plain(labels[rows], probabilities[rows]) for rows in places]
        return {name: np.array([item[name] for item in found], dtype=np.float64) for name in found[0]}

    return figures


def bootstrap(
    figures: Figures,
    labels: Labels,
    models: Mapping[str, Probabilities],
    patients: Sequence[str],
    *,
    folds: Sequence[int] | NDArray[np.int64] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Scores]:
    """Score several models on the same exams, and on the same resamples of their patients.

    Args:
        figures: see `metrics`; `resampled` makes them of a plain function.
        models: name -> (N, C) probabilities.
        patients: of every exam; fewer than two different ones give no intervals.
        folds: (N,) the test fold that each exam was in, where several models of one kind, one a fold, answered. Figures
            are then means over the folds, each fold by itself: models of different folds share no scale. Patients are
            drawn from all folds together, so one in two folds (a split by lesion) is drawn with both.
    """
    few = len(set(patients)) < 2
    parts = None if folds is None else [np.asarray(folds) == fold for fold in np.unique(np.asarray(folds))]
    blocks = [] if few else list(resample_weights(patients, num_resamples=num_resamples, seed=seed))
    found = {}
    for model, probabilities in models.items():
        by_fold = _by_fold(figures, labels, probabilities, np.ones((1, len(labels))), parts)
        drawn = [_by_fold(figures, labels, probabilities, block, parts) for block in blocks]
        found[model] = Scores(
            values={name: float(_mean_of_folds(values)[0]) for name, values in by_fold.items()},
            draws={
                name: np.concatenate([np.empty(0), *(_mean_of_folds(block[name]) for block in drawn)])
                for name in by_fold
            },
            by_fold={name: values[:, 0].tolist() for name, values in by_fold.items()} if parts else {},
        )
    return found


def _by_fold(
    figures: Figures,
    labels: Labels,
    probabilities: Probabilities,
    weights: Weights,
    parts: Sequence[NDArray[np.bool_]] | None,
) -> dict[str, NDArray[np.float64]]:
    """Figure -> (F, B)."""
    if not parts:
        return {name: values[None] for name, values in figures(labels, probabilities, weights).items()}
    found = [figures(labels[part], probabilities[part], weights[:, part]) for part in parts]
    return {name: np.stack([item[name] for item in found]) for name in found[0]}


def _mean_of_folds(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B,) of (F, B); a fold where the figure is not defined is left out."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    mean: NDArray[np.float64] = np.where(finite, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)


def paired_differences(first: Scores, second: Scores, level: float = LEVEL) -> dict[str, Interval]:
    """First minus second, with the interval of the difference: both saw the same resamples."""
    return {
        name: Interval(
            first.values[name] - second.values[name],
            *_percentiles(first.draws[name] - second.draws[name], level),
        )
        for name in first.values
    }


def verdict(gap: Interval, *, lower_is_better: bool = False) -> Verdict:
    """What an interval of a difference (ours minus theirs) lets one say in a word; "too few" where there is none."""
    if not (math.isfinite(gap.low) and math.isfinite(gap.high)):
        return "too few"
    above, below = gap.low > 0, gap.high < 0
    if lower_is_better:
        above, below = below, above
    return "better" if above else "worse" if below else "not distinguishable"


def mean_interval(
    values: NDArray[np.float64], patients: Sequence[str], *, num_resamples: int, seed: int, level: float = LEVEL
) -> Interval:
    """The mean of a figure that every exam has by itself, over resamples of the patients.

    Args:
        values: (N,); NaN where an exam has none, which is left out.
        patients: of every exam.
    """
    known = np.isfinite(values)
    numbers, names = values[known], [name for name, there in zip(patients, known, strict=True) if there]
    if not len(numbers):
        return Interval(float("nan"), float("nan"), float("nan"))
    if len(set(names)) < 2:
        return Interval(float(numbers.mean()), float("nan"), float("nan"))
    blocks = resample_weights(names, num_resamples=num_resamples, seed=seed)
    draws = np.concatenate([(block @ numbers) / block.sum(axis=1) for block in blocks])
    return Interval(float(numbers.mean()), *_percentiles(draws, level))


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
