from __future__ import annotations

import math

import numpy as np
import pytest

from prima_ray.evaluation.metrics import headline, headline_draws
from prima_ray.evaluation.statistics import (
    Interval,
    bootstrap,
    mean_sd,
    paired_differences,
    resample_patients,
    resample_weights,
    resampled,
    verdict,
)


@resampled
def share_right(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(np.mean(probabilities.argmax(axis=1) == labels))}


def answers(right: np.ndarray) -> np.ndarray:
    """Probabilities of two classes; the label is always 0."""
    return np.stack([right, ~right], axis=1).astype(float)


def test_resamples_take_patients_whole() -> None:
    patients = ["a", "b", "a", "c", "b", "a"]
    exams_of = {"a": [0, 2, 5], "b": [1, 4], "c": [3]}
    resamples = resample_patients(patients, num_resamples=200, seed=0)
    for rows in resamples:
        counts = np.bincount(rows, minlength=6)
        for exams in exams_of.values():
            assert len(set(counts[exams])) == 1
        assert sum(counts[exams[0]] for exams in exams_of.values()) == 3
    assert len({tuple(rows) for rows in resamples}) > 10
    again = resample_patients(patients, num_resamples=200, seed=0)
    assert all((one == other).all() for one, other in zip(resamples, again, strict=True))
    assert any(
        len(one) != len(other)
        for one, other in zip(resamples, resample_patients(patients, num_resamples=200, seed=1), strict=True)
    )


def test_exams_of_one_patient_are_no_independent_evidence() -> None:
    """Copies of an exam must not narrow the interval, and the interval is the binomial's."""
    right = np.arange(60) % 3 > 0
    patients = [str(number) for number in range(60)]
    once = bootstrap(share_right, np.zeros(60, int), {"m": answers(right)}, patients)["m"].intervals()["accuracy"]
    copied = bootstrap(
        share_right, np.zeros(300, int), {"m": answers(np.repeat(right, 5))}, list(np.repeat(patients, 5))
    )
    assert copied["m"].intervals()["accuracy"] == once
    half = 1.96 * math.sqrt(2 / 3 * 1 / 3 / 60)
    assert once.value == pytest.approx(2 / 3)
    assert (once.low, once.high) == pytest.approx((2 / 3 - half, 2 / 3 + half), abs=0.02)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(150):
        # 40 patients of 1 to 3 exams that are all right or all wrong together; 0.7 of the patients are right.
        sizes = rng.integers(1, 4, 40)
        right = np.repeat(rng.random(40) < 0.7, sizes)
        patients = [str(name) for name in np.repeat(np.arange(40), sizes)]
        found = bootstrap(
            share_right, np.zeros(len(right), int), {"m": answers(right)}, patients, num_resamples=200, seed=trial
        )
        interval = found["m"].intervals()["accuracy"]
        covered += interval.low <= 0.7 <= interval.high
    assert 0.88 <= covered / 150 <= 0.99


def test_differences_are_paired() -> None:
    """Two models that err on the same exams, but for two: the difference is far surer than either figure."""
    rng = np.random.default_rng(3)
    right = rng.random(80) < 0.6
    better = right.copy()
    better[np.flatnonzero(~right)[:6]] = True
    patients = [str(number) for number in range(80)]
    found = bootstrap(share_right, np.zeros(80, int), {"one": answers(better), "two": answers(right)}, patients)
    gap = paired_differences(found["one"], found["two"])["accuracy"]
    assert gap.value == pytest.approx(6 / 80)
    half = 1.96 * math.sqrt(6 / 80 * 74 / 80 / 80)
    assert (gap.low, gap.high) == pytest.approx((6 / 80 - half, 6 / 80 + half), abs=0.015)
    alone = found["one"].intervals()["accuracy"]
    assert gap.high - gap.low < 0.7 * (alone.high - alone.low)
    same = paired_differences(found["one"], found["one"])["accuracy"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_one_patient_gives_a_figure_and_no_interval() -> None:
    found = bootstrap(headline_draws, np.array([0, 1]), {"m": np.eye(2)}, ["a", "a"])["m"].intervals()
    assert found["accuracy"].value == 1
    assert math.isnan(found["accuracy"].low)
    assert math.isnan(found["accuracy"].high)
    none = bootstrap(headline_draws, np.empty(0, dtype=np.int64), {"m": np.empty((0, 2))}, [])["m"]
    assert math.isnan(none.intervals()["accuracy"].value)
    assert math.isnan(paired_differences(none, none)["auroc"].low)


def test_resamples_where_a_figure_is_not_defined_are_left_out() -> None:
    """With one exam of a class, a third of the resamples lack it and have no AUROC."""
    labels = np.array([0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    found = bootstrap(headline_draws, labels, {"m": probabilities}, ["a", "b", "c"])["m"]
    undefined = np.isnan(found.draws["auroc"])
    assert 0.2 < undefined.mean() < 0.5
    assert found.intervals()["auroc"].low == 1


def test_mean_and_sample_standard_deviation() -> None:
    assert mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt((16 + 1 + 25) / 9 / 2)))
    mean, deviation = mean_sd([0.5])
    assert mean == 0.5
    assert math.isnan(deviation)


def toy(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels of four classes, probabilities with ties that know something of them, patients of one to three exams."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    probabilities = rng.dirichlet(np.ones(4), count) + 0.6 * np.eye(4)[labels]
    probabilities = np.round(probabilities / probabilities.sum(axis=1, keepdims=True), 2)
    return labels, probabilities, [f"p{number}" for number in np.sort(rng.integers(0, count // 2, count))]


def test_weights_are_the_same_resamples() -> None:
    patients = ["a", "b", "a", "c", "b", "a"]
    rows = resample_patients(patients, num_resamples=50, seed=4)
    weights = np.concatenate(list(resample_weights(patients, num_resamples=50, seed=4)))
    assert weights.tolist() == [np.bincount(item, minlength=6).tolist() for item in rows]


def test_figures_at_once_are_the_figures_one_by_one() -> None:
    labels, probabilities, patients = toy(0)
    fast = bootstrap(headline_draws, labels, {"m": probabilities}, patients, num_resamples=40)["m"]
    slow = bootstrap(resampled(headline), labels, {"m": probabilities}, patients, num_resamples=40)["m"]
    for name, draws in slow.draws.items():
        assert fast.draws[name] == pytest.approx(draws, abs=1e-12)
        assert fast.values[name] == pytest.approx(slow.values[name])


def test_folds_are_scored_each_by_itself() -> None:
    """Mean over folds; patients drawn from all of them, on the same resamples for every model."""
    labels, probabilities, patients = toy(1)
    folds = np.array([int(name[1:]) % 3 for name in patients])
    models = {"one": probabilities, "other": np.roll(probabilities, 1, axis=0)}
    found = bootstrap(headline_draws, labels, models, patients, folds=folds, num_resamples=30, seed=2)
    by_hand = [headline(labels[folds == fold], probabilities[folds == fold])["macro_f1"] for fold in range(3)]
    assert found["one"].by_fold["macro_f1"] == pytest.approx(by_hand)
    assert found["one"].values["macro_f1"] == pytest.approx(np.mean(by_hand))
    rows = resample_patients(patients, num_resamples=30, seed=2)[7]
    drawn = [rows[folds[rows] == fold] for fold in range(3)]
    for name, given in models.items():
        wanted = np.mean([headline(labels[part], given[part])["macro_f1"] for part in drawn])
        assert found[name].draws["macro_f1"][7] == pytest.approx(wanted)
    whole = bootstrap(headline_draws, labels, models, patients, folds=np.zeros(60, int), num_resamples=30, seed=2)
    plain = bootstrap(headline_draws, labels, models, patients, num_resamples=30, seed=2)
    assert whole["one"].draws["auroc"] == pytest.approx(plain["one"].draws["auroc"])
    assert plain["one"].by_fold == {}


@pytest.mark.parametrize(
    ("gap", "word", "of_a_loss"),
    [
        (Interval(0.1, 0.02, 0.2), "better", "worse"),
        (Interval(-0.1, -0.2, -0.02), "worse", "better"),
        (Interval(0.1, 0.0, 0.2), "not distinguishable", "not distinguishable"),
        (Interval(0.1, math.nan, math.nan), "too few", "too few"),
    ],
)
def test_a_verdict_is_the_interval_in_a_word(gap: Interval, word: str, of_a_loss: str) -> None:
    assert verdict(gap) == word
    assert verdict(gap, lower_is_better=True) == of_a_loss


def test_two_equal_models_are_rarely_told_apart() -> None:
    """Of 95 % intervals about one in twenty misses the truth, which is that there is no difference."""
    told = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        right = rng.random((2, 80)) < 0.7
        models = {"one": answers(right[0]), "other": answers(right[1])}
        patients = [str(number // 2) for number in range(80)]
        found = bootstrap(headline_draws, np.zeros(80, int), models, patients, num_resamples=200, seed=trial)
        told += verdict(paired_differences(found["one"], found["other"])["accuracy"]) != "not distinguishable"
    assert told <= 12
