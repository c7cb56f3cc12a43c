"""What an evaluation says beside the headline: operating points, and whether probabilities and silence can be believed.

Functions of labels, probabilities and patients that give plain records, the same that `metrics.json` holds; `sections`
turns them into parts of a page. Shares are of 1, an interval is `value, low, high`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_ray.evaluation.metrics import Figures, Labels, Probabilities
from prima_ray.evaluation.operating import SPECIFICITIES, operating_figures, set_threshold, threshold_figures
from prima_ray.evaluation.reliability import reliability, reliability_bins, set_figures
from prima_ray.evaluation.selective import COVERAGES, risk_coverage, selective_figures
from prima_ray.evaluation.statistics import Scores, bootstrap, mean_sd, paired_differences, resampled, verdict

LOSSES = ("nll", "ece", "brier", "aurc", "excess_aurc", "mean_set_size")
"""Figures of which less is better."""
_CURVE_POINTS = 200
Models = Mapping[str, Probabilities]


def operating_evidence(
    labels: Labels,
    models: Models,
    patients: Sequence[str],
    positive: Sequence[int],
    *,
    specificities: Sequence[float] = SPECIFICITIES,
    thresholds_from: tuple[Labels, Probabilities] | None = None,
    folds: NDArray[np.int64] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """A group of classes against the rest.

    Args:
        models: ours first.
        positive: indices of the group's classes.
        thresholds_from: labels and our probabilities of other exams (the validation fold), to set thresholds on.
        folds: see `statistics.bootstrap`.

    Returns:
        `num_positive, num_negative`, and `models`, `differences` (ours minus it) and `verdicts` by figure; and
        `thresholds`: for each specificity asked for what a threshold of the other exams gives here.
    """
    draw = partial(bootstrap, folds=folds, num_resamples=num_resamples, seed=seed)
    truth = np.isin(labels, positive)
    scores = draw(operating_figures(positive, specificities), labels, models, patients)
    name, probabilities = next(iter(models.items()))
    thresholds = []
    for specificity in specificities if thresholds_from is not None else ():
        limit = set_threshold(*thresholds_from, positive, specificity) if thresholds_from is not None else None
        if limit is None:
            continue
        figures = threshold_figures(positive, limit.score)
        found = draw(figures, labels, {name: probabilities}, patients)[name].intervals()
        record = asdict(limit)
        asked = record.pop("specificity")
        plain = {figure: asdict(value) for figure, value in found.items()}
        thresholds.append({"asked": asked, **record, **plain})
    return {
        "num_positive": int(truth.sum()),
        "num_negative": int((~truth).sum()),
        **plain_scores(scores),
        "thresholds": thresholds,
    }


def plain_scores(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """`models` with intervals, and of all but the first `differences` (the first minus it) and `verdicts`; where folds
    were told, `over_folds`: figure -> mean, SD and the value of each.
    """
    ours = next(iter(scores))
    gaps = {name: paired_differences(scores[ours], found) for name, found in scores.items() if name != ours}
    several = bool(scores[ours].by_fold)
    return {
        "models": {
            name: {figure: asdict(value) for figure, value in found.intervals().items()}
            for name, found in scores.items()
        },
        "differences": {name: {figure: asdict(gap) for figure, gap in found.items()} for name, found in gaps.items()},
        "verdicts": {
            name: {figure: verdict(gap, lower_is_better=figure in LOSSES) for figure, gap in found.items()}
            for name, found in gaps.items()
        },
        **({"over_folds": {name: _over_folds(found) for name, found in scores.items()}} if several else {}),
    }


def _over_folds(scores: Scores) -> dict[str, Any]:
    told = {figure: (mean_sd(values), values) for figure, values in scores.by_fold.items()}
    return {figure: {"mean": mean, "sd": sd, "values": list(values)} for figure, ((mean, sd), values) in told.items()}


BEFORE = "before the temperature"


def belief_figures(coverages: Sequence[float] = COVERAGES) -> Figures:
    """NLL, ECE, Brier score, AURC and accuracies at coverages, together."""

    def plain(labels: Labels, probabilities: Probabilities) -> Mapping[str, float]:
        return {**reliability(labels, probabilities), **selective_figures(labels, probabilities, coverages)}

    return resampled(plain)


def calibration_evidence(
    labels: Labels,
    models: Models,
    before: Probabilities,
    sets: NDArray[np.bool_],
    patients: Sequence[str],
    *,
    class_names: Sequence[str],
    asked_coverage: float,
    coverages: Sequence[float] = COVERAGES,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether our probabilities, sets and confidence can be believed.

    Args:
        models: ours first, calibrated.
        before: (N, C) ours before calibration.
        sets: (N, C) prediction sets.
        asked_coverage: what the sets were to hold.

    Returns:
        `figures`: `models` (ours, ours before the temperature, the others) with NLL, ECE, Brier score, AURC and
        accuracies at coverages, `differences` and `verdicts` against ours; `bins` before and after, of reliability
        diagrams; `sets`; `curve`, risk by coverage, of ours.
    """
    draw = partial(bootstrap, num_resamples=num_resamples, seed=seed)
    ours = next(iter(models))
    probabilities = models[ours]

    @resampled
    def held(labels: Labels, sets: Probabilities) -> Mapping[str, float]:
        found = set_figures(labels, sets > 0)
        return {name: found[name] for name in ("coverage", "mean_set_size", "single_share")}

    asked = {ours: probabilities, BEFORE: before, **{name: item for name, item in models.items() if name != ours}}
    scores = draw(belief_figures(coverages), labels, asked, patients)
    whole = draw(held, labels, {ours: sets.astype(np.float64)}, patients)[ours].intervals()
    by_class = set_figures(labels, sets)
    coverage, risk = risk_coverage(labels, probabilities)
    shown = np.unique(np.linspace(0, len(coverage) - 1, min(_CURVE_POINTS, len(coverage))).astype(int))
    return {
        "figures": plain_scores(scores),
        "bins": {"before": reliability_bins(labels, before), "after": reliability_bins(labels, probabilities)},
        "sets": {
            "asked": asked_coverage,
            **{name: asdict(value) for name, value in whole.items()},
            "by_class": [
                {
                    "class": name,
                    "num_exams": int((labels == index).sum()),
                    "coverage": by_class["coverage_by_class"][index],
                    "mean_set_size": by_class["set_size_by_class"][index],
                }
                for index, name in enumerate(class_names)
            ],
        },
        "curve": {"coverage": coverage[shown].tolist(), "risk": risk[shown].tolist()},
    }
