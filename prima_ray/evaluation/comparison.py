"""Models beside each other: tables of predictions on the same exams, paired differences, a verdict a claim.

A table is what one model, or one a fold, said of some exams; where it came from is not known here. `prima compare` and
whatever runs many variants use the same functions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import PrimaError
from prima_ray.evaluation.metrics import Figures, Labels, Probabilities, headline_draws
from prima_ray.evaluation.statistics import (
    LEVEL,
    Interval,
    Scores,
    Verdict,
    bootstrap,
    mean_sd,
    paired_differences,
    verdict,
)

_SHOWN = 3


@dataclass(frozen=True)
class PredictionTable:
    """What a model said of N exams that it had not seen."""

    exam_ids: NDArray[np.object_]
    patient_ids: NDArray[np.object_]
    labels: Labels
    """(N,) class indices, none negative."""
    probabilities: Probabilities
    """(N, C)"""
    folds: NDArray[np.int64]
    """(N,) the test fold that each exam was in."""

    def __len__(self) -> int:
        return len(self.exam_ids)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Some of the exams, in the order given."""
        return replace(
            self,
            exam_ids=self.exam_ids[rows],
            patient_ids=self.patient_ids[rows],
            labels=self.labels[rows],
            probabilities=self.probabilities[rows],
            folds=self.folds[rows],
        )


@dataclass(frozen=True)
class Compared:
    """A model among others."""

    scores: Scores
    intervals: Mapping[str, Interval]
    over_folds: Mapping[str, tuple[float, float]]
    """Mean and SD (ddof = 1) over folds; empty of one fold."""
    differences: Mapping[str, Interval]
    """Ours minus this one; empty for ours."""
    verdicts: Mapping[str, Verdict]
    """Figure -> what the difference says of ours."""


def pool_folds(tables: Sequence[PredictionTable]) -> PredictionTable:
    """One table of several folds' models.

    Raises:
        PrimaError: an exam stands in two of them: then it was no test exam of one.
    """
    ids, counts = np.unique(np.concatenate([table.exam_ids for table in tables]).astype(str), return_counts=True)
    twice = ids[counts > 1].tolist()
    if twice:
        raise PrimaError(
            f"{some(twice, 'exam')} in the test rows of more than one fold",
            mend="Pool runs of different test folds of one split.",
        )
    names = ("exam_ids", "patient_ids", "labels", "probabilities", "folds")
    return PredictionTable(**{name: np.concatenate([getattr(table, name) for table in tables]) for name in names})


def share_exams(tables: Mapping[str, PredictionTable]) -> dict[str, PredictionTable]:
    """The tables cut to the exams that all of them have, in the order of the first.

    Raises:
        PrimaError: there are none, or the tables do not agree on an exam's label or patient.
    """
    first = next(iter(tables.values()))
    places = {name: {exam: row for row, exam in enumerate(table.exam_ids)} for name, table in tables.items()}
    ids = [exam for exam in first.exam_ids if all(exam in rows for rows in places.values())]
    if not ids:
        raise PrimaError(
            f"{', '.join(tables)} have no test exam in common",
            mend="Compare runs of the same test fold and split, or pool all folds of each.",
        )
    cut = {name: table.take(np.array([places[name][exam] for exam in ids])) for name, table in tables.items()}
    reference = next(iter(cut.values()))
    for name, table in cut.items():
        for what, mine, other in (
            ("diagnosis", table.labels, reference.labels),
            ("patient", table.patient_ids, reference.patient_ids),
        ):
            differing = table.exam_ids[mine != other].tolist()
            if differing:
                raise PrimaError(f"{name}: another {what} than in {next(iter(cut))} of {some(differing, 'exam')}")
    return cut


def check_unseen(trained: Collection[str], tested: Collection[str], *, what: str, where: str) -> None:
    """A leak, as an error: none of ``tested`` may be among ``trained``.

    Args:
        what: "patient" or "exam".
        where: the run, for the message.

    Raises:
        PrimaError: some are; they are counted, and the first named.
    """
    seen = sorted(set(tested) & set(trained))
    if seen:
        raise PrimaError(
            f"a leak: {some(seen, what)} among those that it is scored on and among those that it was trained on",
            where=where,
            mend="Its figures say nothing about new patients. Make the folds anew and train again.",
        )


def compare(
    tables: Mapping[str, PredictionTable],
    *,
    figures: Figures = headline_draws,
    losses: Collection[str] = (),
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Compared]:
    """Several models on the exams that they share; the first is ours.

    Figures are means over the folds, intervals are over patients, and all models see the same resamples.

    Args:
        losses: figures of which less is better.

    Raises:
        PrimaError: see `share_exams`.
    """
    cut = share_exams(tables)
    first = next(iter(cut.values()))
    several = len(np.unique(first.folds)) > 1
    scores = bootstrap(
        figures,
        first.labels,
        {name: table.probabilities for name, table in cut.items()},
        list(first.patient_ids),
        folds=first.folds if several else None,
        num_resamples=num_resamples,
        seed=seed,
    )
    ours = next(iter(cut))
    found = {}
    for name, mine in scores.items():
        gaps = paired_differences(scores[ours], mine, level) if name != ours else {}
        found[name] = Compared(
            scores=mine,
            intervals=mine.intervals(level),
            over_folds={figure: mean_sd(values) for figure, values in mine.by_fold.items()},
            differences=gaps,
            verdicts={figure: verdict(gap, lower_is_better=figure in losses) for figure, gap in gaps.items()},
        )
    return found


def some(names: Sequence[str], noun: str) -> str:
    """`3 patients (a, b, c)`, `1 exam (a)`: a count, and the first names."""
    shown = ", ".join(map(str, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({shown})"
