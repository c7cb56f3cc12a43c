"""Folds: stratified by diagnosis, grouped so that no patient (or no lesion) is in two of them, seeded."""

from __future__ import annotations

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
    for name in sorted(set(truth.tolist())):
        num_exams = int((truth == name).sum())
        num_groups = len(set(group[known][truth == name].tolist()))
        if min(num_exams, num_groups) < num_folds:
            raise PrimaError(
                f"class {name} has {num_exams} exams of {num_groups} patients, fewer than the {num_folds} folds",
                mend="Lower folds.count, gather more exams, or leave the class out (its rows go to quarantine).",
            )
    folds = np.full(len(group), -1, dtype=np.int32)
    if not known.any():
        return folds
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    positions = np.flatnonzero(known)
    for fold, (_, members) in enumerate(splitter.split(truth, truth, group[known].astype(str))):
        folds[positions[members]] = fold
    of_group = {group[position]: folds[position] for position in positions}
    for position in np.flatnonzero(~known):
        folds[position] = of_group.get(group[position], -1)
    return folds
