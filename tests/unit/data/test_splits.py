from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prima_ray.base import PrimaError
from prima_ray.data.splits import assign_folds

exams = st.lists(st.tuples(st.sampled_from(["A", "B", None]), st.integers(0, 30)), min_size=1, max_size=120)


@settings(deadline=None, max_examples=30)
@given(exams=exams, num_folds=st.integers(2, 5), seed=st.integers(0, 9))
def test_a_group_is_never_split_and_every_diagnosed_exam_has_a_fold(
    exams: list[tuple[str | None, int]], num_folds: int, seed: int
):
    labels, groups = [label for label, _ in exams], [f"p{group}" for _, group in exams]
    patients = {name: {group for label, group in zip(labels, groups, strict=True) if label == name} for name in "AB"}
    if any(0 < len(members) < num_folds for members in patients.values()):
        with pytest.raises(PrimaError, match="fewer than the"):
            assign_folds(labels, groups, num_folds=num_folds, seed=seed)
        return
    folds = assign_folds(labels, groups, num_folds=num_folds, seed=seed)
    assert folds.dtype == np.int32
    for group in set(groups):
        assert len({int(fold) for fold, name in zip(folds, groups, strict=True) if name == group}) == 1
    known = np.array([label is not None for label in labels])
    if known.any():
        assert set(folds[known].tolist()) == set(range(num_folds))
    assert np.array_equal(folds, assign_folds(labels, groups, num_folds=num_folds, seed=seed))


def test_folds_are_stratified_and_seeded():
    labels = ["A"] * 60 + ["B"] * 30
    groups = [str(number) for number in range(90)]
    folds = assign_folds(labels, groups, num_folds=3, seed=0)
    assert np.bincount(folds[:60]).tolist() == [20, 20, 20]
    assert np.bincount(folds[60:]).tolist() == [10, 10, 10]
    assert not np.array_equal(folds, assign_folds(labels, groups, num_folds=3, seed=1))


def test_exams_without_a_diagnosis_follow_their_patient_or_stay_out():
    labels = ["A", "A", "B", "B", None, None]
    groups = ["p", "q", "r", "s", "p", "t"]
    folds = assign_folds(labels, groups, num_folds=2, seed=0)
    assert folds[4] == folds[0]
    assert folds[5] == -1
    assert assign_folds([None, None], ["p", "q"], num_folds=2, seed=0).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("labels", "groups", "what"),
    [
        (["A"] * 5 + ["B"] * 4, "abcdefghi", "class B has 4 exams of 4 patients, fewer than the 5 folds"),
        (["A"] * 5 + ["B"] * 6, "abcdefffff" + "f", "class B has 6 exams of 1 patient, fewer than the 5 folds"),
        (["A"] * 5 + ["B"], "abcdef", "class B has 1 exam of 1 patient, fewer than the 5 folds"),
    ],
)
def test_a_class_smaller_than_the_folds(labels: list[str], groups: str, what: str):
    with pytest.raises(PrimaError) as caught:
        assign_folds(labels, list(groups), num_folds=5, seed=0)
    assert str(caught.value) == (
        f"{what}\n  Lower folds.count, gather more exams, or leave the class out (its rows go to quarantine)."
    )
