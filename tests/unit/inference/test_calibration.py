from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax

from prima_ray.evaluation.reliability import nll
from prima_ray.inference.calibration import (
    Calibration,
    CalibrationConfig,
    calibration_figures,
    confidence_threshold,
    conformal_threshold,
    fit_calibration,
    fit_temperature,
)

NAMES = ("A", "B", "C")


def draws(count: int, *, temperature: float, seed: int = 0, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature): the truth that a fit must find."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(count, num_classes))
    shares = np.exp(log_softmax(logits / temperature, axis=1))
    labels = (rng.random((count, 1)) > shares.cumsum(axis=1)).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.5])
def test_the_temperature_of_the_data_is_found(truth: float) -> None:
    logits, labels = draws(20_000, temperature=truth)
    found, note = fit_temperature(logits, labels)
    assert found == pytest.approx(truth, rel=0.05)
    assert note is None
    # No neighbour is better, and log-probabilities do as well as logits.
    losses = [nll(labels, np.exp(log_softmax(logits / (found * by), axis=1))) for by in (0.99, 1.0, 1.01)]
    assert losses[1] < min(losses[0], losses[2])
    assert fit_temperature(log_softmax(logits, axis=1), labels)[0] == pytest.approx(found, rel=1e-9)


def test_a_temperature_by_hand() -> None:
    """Two classes, logit gap log 9, right in three of four: the best p is 3/4, so T = log 9 / log 3 = 2."""
    logits = np.array([[math.log(9), 0.0]] * 4)
    assert fit_temperature(logits, np.array([0, 0, 0, 1]))[0] == pytest.approx(2.0, abs=1e-9)


def test_folds_that_tell_no_temperature() -> None:
    right = np.eye(3)[[0, 1, 2, 0]] * 4.0
    found, note = fit_temperature(right, np.array([0, 1, 2, 0]))
    assert found == 1.0
    assert note == "every validation exam is right, so that no finite temperature is the best: probabilities stay"
    assert fit_temperature(np.zeros((4, 3)), np.array([0, 1, 2, 0]))[0] == 1.0
    found, note = fit_temperature(right, np.array([1, 2, 0, 1]))
    assert found == 20.0
    assert note == "the temperature is at its limit, 20: the model's scores tell nothing of the validation fold"
    nearly = np.repeat([[0.1, 0.0, 0.0]], 400, axis=0)
    nearly[-1] = [1e-9, 0.0, 0.0]
    found, note = fit_temperature(nearly, np.array([0] * 399 + [1]))
    assert found == 0.05
    assert (
        note
        == "the temperature is at its limit, 0.05: the model's scores tell nearly everything of the validation fold"
    )


def test_the_order_of_classes_never_changes() -> None:
    logits, labels = draws(500, temperature=3.0)
    fitted = fit_calibration(logits, labels, NAMES, CalibrationConfig())
    assert fitted.temperature > 2
    assert (fitted.probabilities(logits).argsort(axis=1) == logits.argsort(axis=1)).all()
    assert fitted.probabilities(logits).sum(axis=1) == pytest.approx(np.ones(500))


def test_the_conformal_threshold_by_hand() -> None:
    scores = np.array([0.5, 0.1, 0.9, 0.3, 0.2, 0.4, 0.6, 0.8, 0.7])
    # k = ceil(10 * 0.8) = 8; 10 * 0.9 is exactly 9; 0.91 asks for a tenth of nine.
    assert conformal_threshold(scores, 0.8) == 0.8
    assert conformal_threshold(scores, 0.9) == 0.9
    assert conformal_threshold(scores, 0.91) is None


@pytest.mark.parametrize("coverage", [0.7, 0.9])
def test_sets_hold_the_truth_as_often_as_they_say(coverage: float) -> None:
    """Over many validation folds of 50: the mean coverage on new exams is k / 51, give or take its standard error."""
    held = []
    for seed in range(300):
        logits, labels = draws(250, temperature=2.0, seed=seed)
        config = CalibrationConfig(coverage=coverage, temperature=False)
        fitted = fit_calibration(logits[:50], labels[:50], NAMES, config)
        sets = fitted.sets(fitted.probabilities(logits[50:]))
        held.append(sets[np.arange(200), labels[50:]].mean())
    wanted = math.ceil(51 * coverage) / 51
    error = np.std(held) / math.sqrt(len(held))
    assert np.mean(held) >= coverage - 3 * error
    # The most probable class of an empty set adds a little.
    assert np.mean(held) <= wanted + 0.02 + 3 * error


def test_a_set_is_never_empty_and_unknown_thresholds_hold_everything() -> None:
    fitted = Calibration.none().model_copy(update={"set_threshold": 0.3})
    sets = fitted.sets(np.array([[0.5, 0.4, 0.1], [0.75, 0.2, 0.05]]))
    assert sets.tolist() == [[True, False, False], [True, False, False]]
    assert Calibration.none().sets(np.array([[0.98, 0.01, 0.01]])).all()


def test_the_least_confident_are_not_answered() -> None:
    probabilities = np.array([[value, 1 - value] for value in (0.55, 0.6, 0.7, 0.8, 0.9)])
    labels = np.array([1, 0, 1, 0, 0])
    assert confidence_threshold(probabilities, labels, CalibrationConfig(answered=0.8)) == (0.6, None)
    assert confidence_threshold(probabilities, labels, CalibrationConfig(answered=1.0)) == (0.0, None)
    # Wrong at 0.55 and 0.7: of all 2/5, from 0.6 on 1/4, from 0.8 on none.
    for error, threshold in ((0.4, 0.0), (0.3, 0.6), (0.1, 0.8)):
        assert confidence_threshold(probabilities, labels, CalibrationConfig(max_error=error)) == (threshold, None)
    threshold, note = confidence_threshold(probabilities, 1 - labels, CalibrationConfig(max_error=0.1))
    assert threshold > 1
    assert note == (
        "no threshold of confidence keeps the error at 0.1 on the validation fold (least: 0.600): nothing is answered"
    )


def test_folds_that_are_small_or_lack_a_class_are_told() -> None:
    logits, labels = draws(12, temperature=1.0)
    fitted = fit_calibration(logits, np.minimum(labels, 1), NAMES, CalibrationConfig(coverage=0.95))
    assert (fitted.temperature, fitted.set_threshold, fitted.min_confidence, fitted.num_exams) == (1.0, None, 0.0, 12)
    assert fitted.notes == (
        "no validation exam is C: nothing was learned of how these are missed",
        "12 validation exams are too few (calibration.min_exams is 30): probabilities are not calibrated, and no "
        "answer is called too uncertain",
        "12 validation exams are too few for sets of coverage 0.95: they hold every class",
    )
    nothing = fit_calibration(logits[:0], labels[:0], NAMES, CalibrationConfig())
    assert nothing.notes == (
        "no validation fold: probabilities are not calibrated, and prediction sets hold every class",
    )
    assert nothing.sets(nothing.probabilities(logits)).all()


def test_what_it_was_worth() -> None:
    logits, labels = draws(4000, temperature=2.5)
    fitted = fit_calibration(logits[:2000], labels[:2000], NAMES, CalibrationConfig(answered=0.8))
    found = calibration_figures(fitted, logits[2000:], labels[2000:])
    assert found["after"]["nll"] < found["before"]["nll"]
    assert found["after"]["ece"] < 0.04 < found["before"]["ece"]
    assert found["after"]["brier"] < found["before"]["brier"]
    assert found["sets"]["coverage"] == pytest.approx(0.9, abs=0.03)
    assert found["answered"]["share"] == pytest.approx(0.8, abs=0.03)
    assert found["answered"]["accuracy"] > found["answered"]["accuracy_of_all"]


def test_a_temperature_can_be_undone() -> None:
    rng = np.random.default_rng(2)
    logits = 5 * rng.normal(size=(40, 4))
    mine = Calibration.none().model_copy(update={"temperature": 1.7})
    assert mine.undone(mine.probabilities(logits)) == pytest.approx(Calibration.none().probabilities(logits))
    sure = np.array([[1.0, 0.0], [0.5, 0.5]])
    assert mine.undone(sure) == pytest.approx(sure)
