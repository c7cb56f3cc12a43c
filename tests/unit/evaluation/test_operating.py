from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.evaluation.metrics import once
from prima_ray.evaluation.operating import (
    operating_figures,
    positive_classes,
    sensitivity_name,
    set_threshold,
    threshold_figures,
)
from tests.conftest import TOY

POSITIVE = (1, 2)


def exams(seed: int, count: int = 90) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    scores = rng.normal(size=(count, 5)) + 1.2 * np.eye(5)[labels]
    # Rounded, so that scores are tied.
    probabilities = np.exp(np.round(scores, 1))
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_scikit_learns(seed: int) -> None:
    labels, probabilities = exams(seed)
    truth, scores = np.isin(labels, POSITIVE), probabilities[:, list(POSITIVE)].sum(axis=1)
    found = once(operating_figures(POSITIVE, (0.8, 0.9, 0.95)), labels, probabilities)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    for specificity in (0.8, 0.9, 0.95):
        best = true[1 - false >= specificity - 1e-12].max()
        assert found[sensitivity_name(specificity)] == pytest.approx(best)


def test_a_weight_is_a_copy() -> None:
    labels, probabilities = exams(7)
    weights = np.random.default_rng(1).integers(0, 3, (6, len(labels)))
    figures = operating_figures(POSITIVE)
    found = figures(labels, probabilities, weights.astype(float))
    for draw, row in enumerate(weights):
        copies = np.repeat(np.arange(len(labels)), row)
        wanted = once(figures, labels[copies], probabilities[copies])
        assert {name: values[draw] for name, values in found.items()} == pytest.approx(wanted)


def test_a_threshold_of_other_exams_keeps_their_specificity() -> None:
    labels, probabilities = exams(3, 200)
    limit = set_threshold(labels, probabilities, POSITIVE, 0.9)
    assert limit is not None
    assert limit.num_negatives == (~np.isin(labels, POSITIVE)).sum()
    there = once(threshold_figures(POSITIVE, limit.score), labels, probabilities)
    assert there["specificity"] >= 0.9
    assert there["sensitivity"] == pytest.approx(once(operating_figures(POSITIVE), labels, probabilities)[
        sensitivity_name(0.9)
    ])  # fmt: skip
    others, theirs = exams(4, 200)
    called = theirs[:, list(POSITIVE)].sum(axis=1) > limit.score
    truth = np.isin(others, POSITIVE)
    found = once(threshold_figures(POSITIVE, limit.score), others, theirs)
    assert found["sensitivity"] == pytest.approx(called[truth].mean())
    assert found["specificity"] == pytest.approx((~called[~truth]).mean())


def test_a_side_without_exams_has_no_figures() -> None:
    labels, probabilities = exams(5)
    benign = ~np.isin(labels, POSITIVE)
    for rows in (benign, ~benign):
        found = once(operating_figures(POSITIVE), labels[rows], probabilities[rows])
        assert all(math.isnan(value) for value in found.values())
    assert set_threshold(labels[~benign], probabilities[~benign], POSITIVE, 0.9) is None
    none = once(operating_figures(POSITIVE), labels[:0], probabilities[:0])
    assert all(math.isnan(value) for value in none.values())


def test_positive_classes_are_declared_or_named() -> None:
    data_set = DataSetConfig.model_validate(TOY)
    assert positive_classes(data_set) == (0,)
    assert positive_classes(data_set, ["SEK", "BCC"]) == (0, 2)
    plain = {**TOY, "classes": [{**item, "malignant": None} for item in TOY["classes"]]}  # type: ignore[union-attr]
    assert positive_classes(DataSetConfig.model_validate(plain)) == ()
    with pytest.raises(PrimaError) as caught:
        positive_classes(data_set, ["MEL"])
    assert str(caught.value) == "positive: toy has no class 'MEL'\n  Classes: BCC, NEV, SEK."
    for named in ([], ["BCC", "NEV", "SEK"]):
        with pytest.raises(PrimaError) as caught:
            positive_classes(data_set, named)
        assert str(caught.value) == "positive: names all classes, or none\n  Name some of BCC, NEV, SEK."
