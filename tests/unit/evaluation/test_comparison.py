from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prima_ray.base import PrimaError
from prima_ray.evaluation.comparison import PredictionTable, check_unseen, compare, pool_folds, share_exams
from prima_ray.evaluation.metrics import headline
from prima_ray.evaluation.statistics import resampled


def table(seed: int, *, knows: float = 0.6, fold: int = 0, count: int = 60, start: int = 0) -> PredictionTable:
    labels = np.random.default_rng(9).integers(0, 3, 500)[start : start + count]
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(3), count) + knows * np.eye(3)[labels]
    numbers = np.arange(start, start + count)
    return PredictionTable(
        exam_ids=np.array([f"e{number}" for number in numbers], dtype=object),
        patient_ids=np.array([f"p{number // 2}" for number in numbers], dtype=object),
        labels=labels,
        probabilities=probabilities / probabilities.sum(axis=1, keepdims=True),
        folds=np.full(count, fold),
    )


def message(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(PrimaError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return str(caught.value)


def test_tables_are_cut_to_the_exams_that_all_have() -> None:
    first, other = table(0), table(1)
    rows = np.array([40, 3, 7, 59])
    cut = share_exams({"a": first, "b": other.take(rows)})
    assert cut["a"].exam_ids.tolist() == ["e3", "e7", "e40", "e59"]
    assert cut["b"].exam_ids.tolist() == cut["a"].exam_ids.tolist()
    assert (cut["b"].probabilities == other.probabilities[[3, 7, 40, 59]]).all()


def test_a_better_model_is_called_better_and_a_copy_is_not() -> None:
    ours, plain = table(1, knows=2.0), table(0, knows=0.2)
    found = compare({"ours": ours, "copy": ours, "plain": plain}, num_resamples=200)
    assert found["ours"].differences == {}
    assert set(found["copy"].verdicts.values()) == {"not distinguishable"}
    assert found["copy"].differences["macro_f1"].low == 0
    assert found["plain"].verdicts["macro_f1"] == "better"
    assert compare({"plain": plain, "ours": ours}, num_resamples=200)["ours"].verdicts["macro_f1"] == "worse"
    labels = plain.labels
    gap = headline(labels, ours.probabilities)["macro_f1"] - headline(labels, plain.probabilities)["macro_f1"]
    assert found["plain"].differences["macro_f1"].value == pytest.approx(gap)
    assert found["ours"].over_folds == {}
    loss = resampled(lambda labels, probabilities: {"loss": -float((probabilities.argmax(1) == labels).mean())})
    tables = {"ours": ours, "plain": plain}
    assert compare(tables, figures=loss, losses=["loss"], num_resamples=100)["plain"].verdicts == {"loss": "better"}


def test_folds_are_pooled_and_their_spread_told() -> None:
    pooled = pool_folds([table(seed, fold=seed, start=60 * seed) for seed in range(3)])
    assert len(pooled) == 180
    found = compare({"all": pooled}, num_resamples=20)["all"]
    parts = [
        headline(pooled.labels[pooled.folds == fold], pooled.probabilities[pooled.folds == fold])["accuracy"]
        for fold in range(3)
    ]
    assert found.over_folds["accuracy"] == pytest.approx((np.mean(parts), np.std(parts, ddof=1)))
    assert found.intervals["accuracy"].value == pytest.approx(np.mean(parts))
    assert message(pool_folds, [table(0), table(1, fold=1, start=58)]) == (
        "2 exams (e58, e59) in the test rows of more than one fold\n  Pool runs of different test folds of one split."
    )


def test_tables_that_contradict_each_other_are_refused() -> None:
    first = table(0)
    other = replace(first, labels=np.where(np.arange(60) < 4, (first.labels + 1) % 3, first.labels))
    assert (
        message(share_exams, {"a": first, "b": other}) == "b: another diagnosis than in a of 4 exams (e0, e1, e2, ...)"
    )
    moved = replace(first, patient_ids=np.array(["p9", *first.patient_ids[1:]], dtype=object))
    assert message(share_exams, {"a": first, "b": moved}) == "b: another patient than in a of 1 exam (e0)"
    assert message(share_exams, {"a": first, "b": table(0, start=100)}) == (
        "a, b have no test exam in common\n  Compare runs of the same test fold and split, or pool all folds of each."
    )


def test_a_leak_is_counted() -> None:
    check_unseen(["a", "b"], ["c"], what="patient", where="RUN")
    assert message(check_unseen, ["a", "b", "c", "d"], ["d", "c", "e"], what="patient", where="RUN") == (
        "RUN: a leak: 2 patients (c, d) among those that it is scored on and among those that it was trained on\n"
        "  Its figures say nothing about new patients. Make the folds anew and train again."
    )
