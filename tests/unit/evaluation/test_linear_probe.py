from __future__ import annotations

import numpy as np
import pytest

from prima_ray.evaluation.linear_probe import probe, probe_figures


def test_a_linear_rule_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels, folds = np.arange(300) % 3, np.arange(300) // 60
    features = rng.normal(size=(300, 5)).astype(np.float32)
    guessed = probe_figures(probe(features, labels, folds), labels, folds)
    features[:, 1] += 4 * (labels == 1)
    features[:, 2] += 4 * (labels == 2)
    known = probe_figures(probe(features, labels, folds), labels, folds)
    assert known["balanced_accuracy"]["mean"] > 0.9
    assert known["macro_f1"]["mean"] > 0.9
    assert guessed["balanced_accuracy"]["mean"] == pytest.approx(1 / 3, abs=0.1)
    assert len(known["macro_f1"]["folds"]) == 5
    assert known["num_exams"] == 300


def test_a_fold_is_predicted_without_having_been_seen():
    # What tells the class is another feature in every fold: nothing can be learned for the one that is left out.
    labels, folds = np.array([0, 1] * 20), np.repeat([0, 1], 20)
    features = np.zeros((40, 2), dtype=np.float32)
    features[np.arange(40), folds] = np.where(labels == 1, 1.0, -1.0)
    assert len(set(probe(features, labels, folds)[:20].tolist())) == 1


def test_figures_by_hand():
    labels, folds = np.array([0, 0, 1, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1])
    figures = probe_figures(np.array([0, 1, 1, 0, 1, 2]), labels, folds)
    assert figures["balanced_accuracy"]["folds"] == pytest.approx([0.75, 0.75])
    assert figures["macro_f1"]["folds"] == pytest.approx([(2 / 3 + 2 / 3) / 2, (1 + 2 / 3) / 2])
    assert figures["macro_f1"]["sd"] == pytest.approx(np.std([2 / 3, 5 / 6], ddof=1))


@pytest.mark.parametrize(
    ("labels", "folds", "message"),
    [([0, 1], [0, 0], "two folds"), ([0, 0, 1, 1], [0, 0, 1, 1], "outside of fold 0 there is only one class")],
)
def test_what_cannot_be_probed(labels: list[int], folds: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        probe(np.zeros((len(labels), 2), dtype=np.float32), np.array(labels), np.array(folds))
