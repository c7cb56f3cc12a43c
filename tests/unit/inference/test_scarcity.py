from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import pytest

from prima_ray.evaluation.reliability import nll
from prima_ray.inference.calibration import Calibration, CalibrationConfig, fit_calibration, fit_levels
from prima_ray.inference.scarcity import SHARES, Level, Scarcity

READ = ("age", "region", "itch", "size")
CLASSES = ("a", "b", "c")
LEVEL = Level(completeness=0.0, temperature=1.0, set_threshold=None, min_confidence=0.5)


def by_definition(given: Collection[str], exams: Sequence[Collection[str]]) -> float:
    """The largest c such that |G & S| >= c |S| for one in twenty of the exams."""
    shares = sorted((len(set(given) & set(known)) / len(known) if known else 1.0 for known in exams), reverse=True)
    return shares[math.ceil(0.05 * len(exams)) - 1]


def test_completeness_is_what_is_usually_known() -> None:
    exams = [READ] * 60 + [("age", "region")] * 40
    found = Scarcity.learn(READ, exams, [LEVEL])
    assert found.patterns == {"1100": 40, "1111": 60}
    assert found.completeness(READ) == 1.0
    assert found.completeness(("age", "region")) == 1.0  # lacks what exams of the data lack
    assert found.completeness(("age", "itch", "size")) == 0.75
    assert found.completeness(("age",)) == 0.5
    assert found.completeness(("smoke",)) == found.completeness(()) == 0.0
    # A few exams of which nothing is known make a photo alone no usual thing; one in twenty does.
    assert Scarcity.learn(READ, [*exams[:96], *[()] * 4], [LEVEL]).completeness(()) == 0.0
    assert Scarcity.learn(READ, [*exams[:95], *[()] * 5], [LEVEL]).completeness(()) == 1.0
    assert Scarcity.learn(READ, [], [LEVEL]).completeness(()) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_completeness_against_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"a{number}" for number in range(6)]

    def some() -> list[str]:
        return [name for name in names if rng.random() < rng.random()]

    exams = [some() for _ in range(rng.integers(1, 400))]
    found = Scarcity.learn(names, exams, [LEVEL])
    again = Scarcity.model_validate_json(found.model_dump_json())
    for _ in range(10):
        given = some()
        assert found.completeness(given) == again.completeness(given) == pytest.approx(by_definition(given, exams))


def test_an_exam_takes_the_level_below_it() -> None:
    levels = [LEVEL.model_copy(update={"completeness": share}) for share in (0.0, 0.5)]
    found = Scarcity.learn(READ, [READ], levels)
    chosen = {share: found.level(share) for share in (0.0, 0.49, 0.5, 0.89, 0.9, 1.0)}
    assert [level and level.completeness for level in chosen.values()] == [0.0, 0.0, 0.5, 0.5, None, None]


def answers(rng: np.random.Generator, labels: np.ndarray, signal: float) -> np.ndarray:
    """Logits that are sure of themselves whether they know much or little."""
    return 3 * rng.normal(size=(len(labels), 3)) + signal * np.eye(3)[labels]


@pytest.fixture(params=range(5))
def asked(request: pytest.FixtureRequest) -> tuple[np.ndarray, dict[float, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(request.param)
    labels = rng.integers(0, 3, 300)
    return answers(rng, labels, 8.0), {share: answers(rng, labels, 8 * share) for share in SHARES}, labels


def test_with_less_known_no_more_of_what_is_answered_is_wrong(
    asked: tuple[np.ndarray, dict[float, np.ndarray], np.ndarray],
) -> None:
    logits, scarce, labels = asked
    config = CalibrationConfig()
    calibration = fit_calibration(logits, labels, CLASSES, config)
    levels = fit_levels(calibration, logits, scarce, labels, config)
    assert [level.completeness for level in levels] == list(SHARES)
    kept = calibration.answered(calibration.probabilities(logits))
    wrong = (logits.argmax(1) != labels) & kept
    most = (wrong.sum() + 1) / (kept.sum() + 1)
    full = calibration.model_copy(update={"scarcity": Scarcity.learn(READ, [READ], levels)})
    for share, given in scarce.items():
        completeness = np.full(len(labels), share)
        probabilities = full.probabilities(given, completeness)
        # As complete exams are calibrated, it would be far off.
        assert nll(labels, probabilities) < nll(labels, calibration.probabilities(given))
        assert full.undone(probabilities, completeness) == pytest.approx(Calibration.none().probabilities(given))
        answered = full.answered(probabilities, completeness)
        assert (given.argmax(1) != labels)[answered].mean() <= most if answered.any() else True
        held = full.sets(probabilities, completeness)[np.arange(len(labels)), labels]
        assert held.mean() >= calibration.coverage
        assert calibration.answered(calibration.probabilities(given)).mean() > answered.mean()
        # The sets are no larger than it takes: one exam fewer would not be enough.
        assert held.mean() <= calibration.coverage + 2 / len(labels)
    temperatures = [level.temperature for level in levels] + [calibration.temperature]
    assert temperatures == sorted(temperatures, reverse=True)
    assert min(level.min_confidence for level in levels) >= calibration.min_confidence


def test_levels_are_never_more_lenient_and_follow_the_config(
    asked: tuple[np.ndarray, dict[float, np.ndarray], np.ndarray],
) -> None:
    logits, _, labels = asked
    rng = np.random.default_rng(9)
    better = {share: answers(rng, labels, 20.0) for share in SHARES}
    calibration = fit_calibration(logits, labels, CLASSES, CalibrationConfig())
    for level in fit_levels(calibration, logits, better, labels, CalibrationConfig()):
        assert level.min_confidence == calibration.min_confidence
        assert level.temperature == calibration.temperature
    # Who wants every exam answered has every exam answered.
    everything = CalibrationConfig(answered=1.0)
    calibration = fit_calibration(logits, labels, CLASSES, everything)
    noise = {share: answers(rng, labels, 0.0) for share in SHARES}
    assert {level.min_confidence for level in fit_levels(calibration, logits, noise, labels, everything)} == {0.0}
    # With `max_error` that is what is kept; where nothing keeps it, nothing is answered.
    strict = CalibrationConfig(max_error=0.001)
    calibration = fit_calibration(logits, labels, CLASSES, strict)
    wrong = {share: answers(rng, labels, -99.0) for share in SHARES}
    assert all(level.min_confidence > 1 for level in fit_levels(calibration, logits, wrong, labels, strict))


def test_of_exams_side_by_side_each_has_its_own_limits() -> None:
    limits = {"temperature": 2.0, "set_threshold": 0.95, "min_confidence": 0.9}
    scarcity = Scarcity.learn(READ, [READ], [LEVEL.model_copy(update=limits)])
    calibration = Calibration(
        temperature=1.0, coverage=0.9, set_threshold=0.5, min_confidence=0.6, num_exams=50, scarcity=scarcity
    )
    same = np.array([[0.7, 0.2, 0.1]] * 2)
    completeness = calibration.completeness([READ, ()])
    assert completeness.tolist() == [1.0, 0.0]
    assert calibration.sets(same, completeness).tolist() == [[True, False, False], [True, True, True]]
    assert calibration.answered(same, completeness).tolist() == [True, False]
    assert calibration.sets(same).tolist() == [[True, False, False]] * 2
    assert calibration.answered(same).tolist() == [True, True]
    logits = np.array([[3.0, 1.0, 0.0]] * 2)
    plain = Calibration.none()
    assert calibration.probabilities(logits, completeness)[0] == pytest.approx(plain.probabilities(logits)[0])
    assert calibration.probabilities(logits, completeness)[1] == pytest.approx(plain.probabilities(logits / 2)[1])
    assert calibration.scaled(logits, completeness).tolist() == [[3.0, 1.0, 0.0], [1.5, 0.5, 0.0]]
    everything = calibration.model_copy(update={"scarcity": None})
    assert everything.completeness([(), READ]).tolist() == [1.0, 1.0]
    assert calibration.sets(np.zeros((0, 3))).shape == (0, 3)
    assert calibration.answered(np.zeros((0, 3))).shape == (0,)
