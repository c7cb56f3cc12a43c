"""Folds: stratified by diagnosis, grouped so that no patient (or no lesion) is in two of them, seeded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prima_ray.base import PrimaError


def assign_folds(
    labels: Sequence[str | None], groups: Sequence[str], *, num_folds: int, seed: int
) -> NDArray[np.int32]:
    """The fold of every exam, (N,) int32.

    Exams without a diagnosis go with their group where it has diagnosed exams, else they get -1: they train only.

    Args:
        labels: one a exam, None without a diagnosis.
        groups: exams of one group share a fold.

    Raises:
        PrimaError: a class has fewer exams, or occurs in fewer groups, than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    known = np.array([label is not None for label in labels])
    truth = np.array([label for label in labels if label is not None])
    group = np.array(groups, dtype=object)
    check_classes(labels, groups, num_folds=num_folds)
    folds = np.full(len(group), -1, dtype=np.int32)
    if not known.any():
        return folds
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    positions = np.flatnonzero(known)
    for fold, (_, rows) in enumerate(splitter.split(truth, truth, group[known].astype(str))):
        folds[positions[rows]] = fold
    of_group = {group[position]: folds[position] for position in positions}
    for position in np.flatnonzero(~known):
        folds[position] = of_group.get(group[position], -1)
    return folds


def check_classes(labels: Sequence[str | None], groups: Sequence[str], *, num_folds: int) -> None:
    """Every class that occurs must reach into every fold.

    Raises:
        PrimaError: a class has fewer exams, or occurs in fewer groups, than there are folds.
    """
    members: dict[str, set[str]] = defaultdict(set)
    for label, group in zip(labels, groups, strict=True):
        if label is not None:
            members[label].add(group)
    for name in sorted(members):
        if len(members[name]) < num_folds:
            raise PrimaError(
                f"class {name} has {_count(labels.count(name), 'exam')} of {_count(len(members[name]), 'patient')}, "
                f"fewer than the {num_folds} folds",
                mend="Lower folds.count, gather more exams, or leave the class out (its rows go to quarantine).",
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
