"""Calibration: a temperature, prediction sets, and a threshold of confidence, all fitted on the validation fold.

**Temperature** (Guo et al. 2017, "On Calibration of Modern Neural Networks"). p = softmax(logits / T) with the T that
minimises the mean negative log-likelihood of the validation exams. With b = 1 / T the NLL of an exam is logsumexp(b z)
- b z_y, convex in b, so its minimum is the root of the derivative, mean(E_p[z] - z_y), which grows with b. T is one
number above zero, so the order of the classes never changes.

**Prediction sets** by split conformal prediction (Vovk et al. 2005; Sadinle et al. 2019, score 1 - p_y). Let s_i = 1 -
p_i(y_i) be the scores of the n validation exams, k = ceil((n + 1) * coverage), and q the k-th smallest of them
(infinite where k > n). The set of an exam x is {c: 1 - p_x(c) <= q}. *Proof* that it holds the truth y with probability
at least ``coverage``: let the n exams and x be exchangeable and the score a fixed function. Then the rank of s(x, y)
among the n + 1 scores, ties broken at random, is uniform on 1 ... n + 1, so P(rank <= k) = min(k, n + 1) / (n + 1) >=
coverage. If the rank is at most k, fewer than k of the n scores are smaller than s(x, y); so their k-th smallest, q, is
not smaller, and y is in the set. The most probable class is added to a set that would be empty, which can only raise
the coverage.

What the proof asks and a clinic does not give: exams like those of the validation fold, and a score that knew nothing
of them. Here the validation fold also chose the checkpoint and T, and exams of one patient are alike. Therefore
`metrics.json` says what came of it on the test fold. The promise is on the average of all exams, not for every class:
see `coverage_by_class` there.

**Confidence** is the largest probability; below `threshold` the answer abstains.

All three are others where less is known of an exam than of those that the model learned from, see `scarcity`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prima_ray.base import StrictConfig
from prima_ray.evaluation.reliability import reliability, set_figures
from prima_ray.inference.scarcity import Level, Scarcity

_TEMPERATURES = (0.05, 20.0)
Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]
Values = NDArray[np.float64]


class CalibrationConfig(StrictConfig):
    """How the answers of a run are made credible; fitted on the validation fold when training is over."""

    temperature: bool = True
    """False: probabilities stay as the model gives them."""
    coverage: float = Field(default=0.9, gt=0.0, lt=1.0)
    """Share of exams whose prediction set is to hold the true diagnosis."""
    answered: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of validation exams that are answered; on the least confident rest it abstains. 1: on none."""
    max_error: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Instead of `answered`: as many as keep the share of wrong ones among the answered at or below this."""
    min_exams: int = Field(default=30, ge=1)
    """Of fewer validation exams neither temperature nor threshold is estimated."""


class Calibration(StrictConfig):
    """`model/calibration.json`: what was fitted."""

    temperature: float = Field(gt=0.0)
    coverage: float
    set_threshold: float | None
    """q: the largest 1 - p that is in a set; null: every class is."""
    min_confidence: float
    """Below it the answer abstains; 0: never for this reason."""
    num_exams: int
    """Validation exams it was fitted on."""
    notes: tuple[str, ...] = ()
    """What could not be fitted, and why."""
    scarcity: Scarcity | None = None
    """Where little is known of an exam; null: the same as everywhere."""

    @classmethod
    def none(cls, *, coverage: float = 0.9, notes: Sequence[str] = ()) -> Self:
        """Nothing is known of how far probabilities can be believed: they stay, sets hold every class."""
        return cls(
            temperature=1.0, coverage=coverage, set_threshold=None, min_confidence=0.0, num_exams=0, notes=tuple(notes)
        )

    def figures(self) -> dict[str, Any]:
        """For metrics.json: all but what is known of which exams."""
        return self.model_dump(mode="json", exclude={"scarcity": {"attributes", "patterns"}})

    def probabilities(self, logits: NDArray[np.floating], completeness: Values | None = None) -> Matrix:
        """Calibrated probabilities (N, C), float64.

        Args:
            logits: (N, C), or log-probabilities.
            completeness: (N,); None: all are complete.
        """
        return _softmax(self.scaled(logits, completeness))

    def scaled(self, logits: NDArray[np.floating], completeness: Values | None = None) -> Matrix:
        """Logits over their temperatures, (N, C): log-probabilities up to a constant of each exam; see
        `probabilities`."""
        found: Matrix = np.asarray(logits, dtype=np.float64) / self._temperatures(len(logits), completeness)
        return found

    def undone(self, probabilities: Matrix, completeness: Values | None = None) -> Matrix:
        """The model's own probabilities (N, C) of calibrated ones, softmax(z / T): p^T, normalised."""
        temperatures = self._temperatures(len(probabilities), completeness)
        with np.errstate(divide="ignore"):
            return _softmax(temperatures * np.log(np.asarray(probabilities, dtype=np.float64)))

    def completeness(self, exams: Iterable[Collection[str]]) -> Values:
        """(N,) of exams, each the names of the attributes that are known; 1 where the model does not tell."""
        scarcity = self.scarcity
        return np.array([scarcity.completeness(known) if scarcity else 1.0 for known in exams], dtype=np.float64)

    def sets(self, probabilities: Matrix, completeness: Values | None = None) -> NDArray[np.bool_]:
        """(N, C): the classes of each exam's prediction set; see `probabilities`."""
        levels = self._levels(len(probabilities), completeness)
        limits = [math.inf if level.set_threshold is None else level.set_threshold for level in levels]
        found: NDArray[np.bool_] = 1.0 - probabilities <= np.array(limits, dtype=np.float64)[:, None]
        found[np.arange(len(found)), probabilities.argmax(axis=1)] = True
        return found

    def answered(self, probabilities: Matrix, completeness: Values | None = None) -> NDArray[np.bool_]:
        """(N,) whether an answer is not too uncertain; see `probabilities`."""
        least = [level.min_confidence for level in self._levels(len(probabilities), completeness)]
        found: NDArray[np.bool_] = probabilities.max(axis=1, initial=0.0) >= np.array(least, dtype=np.float64)
        return found

    def least_confidence(self, completeness: float) -> float:
        """Below it an answer abstains."""
        return self._level(completeness).min_confidence

    def _temperatures(self, count: int, completeness: Values | None) -> Matrix:
        """(N, 1)"""
        levels = self._levels(count, completeness)
        return np.array([level.temperature for level in levels], dtype=np.float64).reshape(count, 1)

    def _levels(self, count: int, completeness: Values | None) -> list[Calibration | Level]:
        if completeness is None:
            return [self] * count
        return [self._level(value) for value in completeness.tolist()]

    def _level(self, completeness: float) -> Calibration | Level:
        return (self.scarcity.level(completeness) if self.scarcity else None) or self


def fit_calibration(
    logits: NDArray[np.floating], labels: Labels, class_names: Sequence[str], config: CalibrationConfig
) -> Calibration:
    """Fit on the validation fold.

    Args:
        logits: (N, C) logits or log-probabilities.
        labels: (N,) class indices, none negative.
    """
    count = len(labels)
    if not count:
        return Calibration.none(
            coverage=config.coverage,
            notes=["no validation fold: probabilities are not calibrated, and prediction sets hold every class"],
        )
    scores = np.asarray(logits, dtype=np.float64)
    notes = _absent(labels, class_names)
    temperature, confidence, few = 1.0, 0.0, count < config.min_exams
    if few:
        notes.append(
            f"{count} validation exams are too few (calibration.min_exams is {config.min_exams}): probabilities are "
            "not calibrated, and no answer is called too uncertain"
        )
    elif config.temperature:
        temperature, note = fit_temperature(scores, labels)
        notes += [note] if note else []
    probabilities = _softmax(scores / temperature)
    threshold = conformal_threshold(1.0 - probabilities[np.arange(count), labels], config.coverage)
    if threshold is None:
        notes.append(
            f"{count} validation exams are too few for sets of coverage {config.coverage:g}: they hold every class"
        )
    if not few:
        confidence, note = confidence_threshold(probabilities, labels, config)
        notes += [note] if note else []
    return Calibration(
        temperature=temperature,
        coverage=config.coverage,
        set_threshold=threshold,
        min_confidence=confidence,
        num_exams=count,
        notes=tuple(notes),
    )


def fit_levels(
    calibration: Calibration,
    logits: Matrix,
    scarce: Mapping[float, Matrix],
    labels: Labels,
    config: CalibrationConfig,
) -> list[Level]:
    """For exams of which less is known: a temperature, sets of the same coverage, and the least confidence at which no
    more of what is answered is wrong than where everything is known.

    Args:
        calibration: fitted on these exams.
        logits: (N, C) of the validation exams as they are.
        scarce: share of the attributes -> (N, C) of the same exams with that share.
        labels: (N,) class indices.

    Returns:
        a level a share, the least first. None is surer than the ones above it, and none asks for less confidence than
        an exam of which everything is known. Sets are as large as it takes.
    """
    probabilities = calibration.probabilities(logits)
    kept = calibration.answered(probabilities)
    wrong = int((probabilities.argmax(axis=1) != labels)[kept].sum())
    # One more wrong in one more exam: that none of a few is wrong is no reason to ask for as much.
    bearable = config.model_copy(update={"max_error": config.max_error or (wrong + 1) / (int(kept.sum()) + 1)})
    levels: list[Level] = []
    temperature = calibration.temperature
    for share in sorted(scarce, reverse=True):
        if config.temperature:
            temperature = max(temperature, fit_temperature(scarce[share], labels)[0])
        found = _softmax(scarce[share] / temperature)
        threshold = conformal_threshold(1.0 - found[np.arange(len(labels)), labels], calibration.coverage)
        confidence = calibration.min_confidence
        if config.max_error is not None or config.answered < 1.0:
            confidence = max(confidence, confidence_threshold(found, labels, bearable)[0])
        level = Level(completeness=share, temperature=temperature, set_threshold=threshold, min_confidence=confidence)
        levels.insert(0, level)
    return levels


def _absent(labels: Labels, class_names: Sequence[str]) -> list[str]:
    absent = [name for index, name in enumerate(class_names) if not (labels == index).any()]
    return [f"no validation exam is {', '.join(absent)}: nothing was learned of how these are missed"] if absent else []


def fit_temperature(scores: Matrix, labels: Labels) -> tuple[float, str | None]:
    """The temperature of least NLL, and what there is to say of it.

    Args:
        scores: (N, C) logits or log-probabilities, float64.
        labels: (N,) class indices.

    Returns:
        T. Where no finite one is the best (every exam is right with room to spare) 1: a fold that says nothing of
        mistakes is no reason to be surer. Where the scores tell nothing the largest that is allowed.
    """
    from scipy.optimize import brentq

    mine = scores[np.arange(len(labels)), labels]
    if (mine >= scores.max(axis=1)).all():
        return 1.0, "every validation exam is right, so that no finite temperature is the best: probabilities stay"

    def slope(inverse: float) -> float:
        return float(((_softmax(inverse * scores) * scores).sum(axis=1) - mine).mean())

    coldest, hottest = _TEMPERATURES
    at_limit = "the temperature is at its limit, {:g}: the model's scores tell {} of the validation fold"
    if slope(1 / hottest) > 0:
        return hottest, at_limit.format(hottest, "nothing")
    if slope(1 / coldest) < 0:
        return coldest, at_limit.format(coldest, "nearly everything")
    return 1.0 / float(brentq(slope, 1 / hottest, 1 / coldest, xtol=1e-12, rtol=1e-12)), None


def conformal_threshold(scores: NDArray[np.float64], coverage: float) -> float | None:
    """The k-th smallest of n scores, k = ceil((n + 1) * coverage); None where k > n, so that the set holds
    everything."""
    # (n + 1) * coverage of 9.000000000000002 is 9: floats must not ask for one exam more.
    rank = math.ceil(round((len(scores) + 1) * coverage, 9))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else None


def confidence_threshold(probabilities: Matrix, labels: Labels, config: CalibrationConfig) -> tuple[float, str | None]:
    """The confidence from which on exams are answered.

    Returns:
        with `answered`, the largest threshold that leaves at least that share of the exams; with `max_error`, the
        smallest one at and above which at most that share is wrong. Exams of equal confidence go together.
    """
    confidence = probabilities.max(axis=1)
    ordered = np.sort(confidence)[::-1]
    if config.max_error is None:
        keep = math.ceil(round(config.answered * len(ordered), 9))
        return (float(ordered[keep - 1]) if keep < len(ordered) else 0.0), None
    wrong = probabilities.argmax(axis=1) != labels
    best, best_error = None, 1.0
    for level in np.unique(confidence):
        kept = confidence >= level
        error = float(wrong[kept].mean())
        best_error = min(best_error, error)
        if error <= config.max_error:
            best = float(level)
            break
    if best is None:
        note = (
            f"no threshold of confidence keeps the error at {config.max_error:g} on the validation fold "
            f"(least: {best_error:.3f}): nothing is answered"
        )
        return math.nextafter(1.0, 2.0), note
    return (0.0 if best == ordered[-1] else best), None


def calibration_figures(
    calibration: Calibration, scores: Matrix, labels: Labels, completeness: Values | None = None
) -> dict[str, Any]:
    """What calibration was worth on some exams.

    Args:
        scores: (N, C) logits or log-probabilities, as the model gives them.
        labels: (N,) class indices, none negative.
        completeness: (N,) of these exams; None: all are complete.

    Returns:
        `before` and `after`: NLL, ECE and Brier score; `sets`: see `set_figures`; `answered`: the share that is not too
        uncertain, and the accuracy there and over all.
    """
    probabilities = calibration.probabilities(scores, completeness)
    right = probabilities.argmax(axis=1) == labels
    kept = calibration.answered(probabilities, completeness)
    return {
        "before": reliability(labels, _softmax(np.asarray(scores, dtype=np.float64))),
        "after": reliability(labels, probabilities),
        "sets": set_figures(labels, calibration.sets(probabilities, completeness)),
        "answered": {
            "share": float(kept.mean()),
            "accuracy": float(right[kept].mean()) if kept.any() else float("nan"),
            "accuracy_of_all": float(right.mean()),
        },
    }


def _softmax(scores: Matrix) -> Matrix:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    found: Matrix = shifted / shifted.sum(axis=-1, keepdims=True)
    return found
