"""The folds of a study: which exams train, choose and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prima_ray.data.plan import ExamIndex, Roles, split_roles
from prima_ray.evaluation.metrics import Probabilities, headline
from prima_ray.studies.cells import folds_of
from prima_ray.studies.config import StudyConfig


@dataclass(frozen=True)
class FoldData:
    """A test fold."""

    index: ExamIndex
    roles: Roles
    fold: int
    choose_by: str

    @property
    def num_classes(self) -> int:
        return len(self.index.manifest.data_set.classes)

    @property
    def photo_rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(P,) the place of each photo's exam among the test exams."""
        return np.repeat(np.arange(len(self.roles.test)), self.index.num_images[self.roles.test])

    def score(self, probabilities: Probabilities) -> float:
        """Of the validation fold."""
        return headline(self.index.labels[self.roles.val], probabilities)[self.choose_by]


def labelled_roles(index: ExamIndex, *, split: Any, fold: int) -> Roles:
    """The roles of a test fold, of the exams that have a diagnosis."""
    roles = split_roles(index, fold=fold, val_fold=None, split=split)
    return Roles(*(rows[index.labels[rows] >= 0] for rows in (roles.train, roles.val, roles.test)))


def fold_data(study: StudyConfig, index: ExamIndex) -> dict[int, FoldData]:
    """Every test fold of a study."""
    return {
        fold: FoldData(index, labelled_roles(index, split=study.split, fold=fold), fold, study.choose_by)
        for fold in folds_of(study, index)
    }
