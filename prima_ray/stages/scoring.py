"""A set of exams -> its figures: the headline beside the baselines, class by class, and a group of classes against the
rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prima_ray.data.plan import ExamIndex
from prima_ray.evaluation.evidence import operating_evidence
from prima_ray.evaluation.metrics import (
    Labels,
    Probabilities,
    class_figures,
    confusion,
    headline_draws,
    per_class,
)
from prima_ray.evaluation.operating import SPECIFICITIES
from prima_ray.evaluation.report import Table
from prima_ray.evaluation.statistics import Interval, bootstrap, paired_differences, verdict
from prima_ray.stages.row_sets import RowSet


@dataclass(frozen=True)
class Scoring:
    """How every set is scored."""

    index: ExamIndex
    model: str
    """The name of ours."""
    positive: tuple[int, ...] = ()
    """Classes that are held against the rest; none: there is no such question."""
    specificities: tuple[float, ...] = SPECIFICITIES
    thresholds_from: tuple[Labels, Probabilities] | None = None
    """Labels and probabilities of exams that are not scored, to set thresholds on."""
    num_resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class ScoredSet:
    """A set of exams with its figures."""

    rows: RowSet
    table: Table
    differences: Mapping[str, Mapping[str, Interval]]
    """Baseline -> ours minus it."""
    per_class: Mapping[str, list[dict[str, Any]]]
    confusion: np.ndarray[Any, np.dtype[np.int64]]
    operating: Mapping[str, Any] | None


def score_set(item: RowSet, how: Scoring) -> ScoredSet:
    """The figures of a set; see `evaluate` for what they are."""
    labels, patients = how.index.labels[item.rows], list(how.index.patient_ids[item.rows])
    names, seed = how.index.manifest.data_set.class_names, how.seed
    scores = bootstrap(headline_draws, labels, item.probabilities, patients, num_resamples=how.num_resamples, seed=seed)
    operating = None
    if how.positive:
        operating = operating_evidence(
            labels,
            item.probabilities,
            patients,
            how.positive,
            specificities=how.specificities,
            thresholds_from=how.thresholds_from if item.name == "all" else None,
            num_resamples=how.num_resamples,
            seed=seed,
        )
    return ScoredSet(
        rows=item,
        table=Table(
            title=item.title,
            note=item.note,
            unit="photos" if item.name == "photos" else "exams",
            num_exams=len(labels),
            num_patients=len(set(patients)),
            rows={name: found.intervals() for name, found in scores.items()},
        ),
        differences={
            name: paired_differences(scores[how.model], found) for name, found in scores.items() if name != how.model
        },
        per_class={name: per_class(labels, found, names) for name, found in item.probabilities.items()},
        confusion=confusion(labels, item.probabilities[how.model]),
        operating=operating,
    )


def class_intervals(item: RowSet, how: Scoring) -> list[dict[str, Any]]:
    """`per_class` of ours, each with `intervals`: figure -> interval."""
    labels, patients = how.index.labels[item.rows], list(how.index.patient_ids[item.rows])
    names, ours = how.index.manifest.data_set.class_names, item.probabilities[how.model]
    figures = class_figures(names)
    scores = bootstrap(figures, labels, {how.model: ours}, patients, num_resamples=how.num_resamples, seed=how.seed)
    told = scores[how.model].intervals()
    return [
        {
            **row,
            "intervals": {
                figure: asdict(told[f"{row['class']}.{figure}"]) for figure in ("precision", "recall", "f1", "auroc")
            },
        }
        for row in per_class(labels, ours, names)
    ]


def plain_set(item: ScoredSet) -> dict[str, Any]:
    """For metrics.json."""

    def plain(models: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
        return {name: {key: asdict(value) for key, value in figures.items()} for name, figures in models.items()}

    return {
        "num_exams": item.table.num_exams,
        "num_patients": item.table.num_patients,
        "models": plain(item.table.rows),
        "differences": plain(item.differences),
        "verdicts": {name: {key: verdict(gap) for key, gap in gaps.items()} for name, gaps in item.differences.items()},
        "per_class": item.per_class,
        "confusion": item.confusion.tolist(),
        "operating": item.operating,
    }


def verdict_sentences(scored: Sequence[ScoredSet]) -> list[str]:
    """A sentence a set of exams, on macro F1 against the strongest baseline there."""
    found = [_sentence(item) for item in scored if item.rows.name != "photos" and item.differences]
    return found or ["There is no metadata-only baseline to compare with."]


def _sentence(item: ScoredSet) -> str:
    if not item.table.num_exams:
        return f"{item.table.title}: there are none in the test fold."
    best = max(item.differences, key=lambda name: item.table.rows[name]["macro_f1"].value)
    gap = item.differences[best]["macro_f1"]
    words = {"better": "better than", "worse": "worse than"}
    word, interval = words.get(verdict(gap), "not distinguishable from"), ""
    if verdict(gap) != "too few":
        interval = f", 95 % interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
    return (
        f"{item.table.title}: macro F1 is {word} the strongest metadata-only baseline ({best}). Difference "
        f"{100 * gap.value:+.1f} points{interval}, paired over patients."
    )
