"""Whether a loaded model answers as it did when it was trained (see `known_exam`)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prima_ray.base import PrimaError
from prima_ray.inference.known_exam import KnownExam
from prima_ray.inference.predictor import Exam, Predictor

TOLERANCE = 0.005
"""Nats of a class's log-probability, and a share of the length of a tower's features. Processors differ by a hundredth
of it, TF32 on a GPU keeps a thousandth, other weights differ by more."""


def make_known_exam(predictor: Predictor) -> KnownExam:
    """Make the exam of the model's data set and ask the model."""
    known = KnownExam.of(predictor.data_set, side=predictor.config.views.image_size)
    features, log_probabilities = _ask(predictor, known)
    return known.model_copy(
        update={
            "features": {name: tuple(float(f"{value:.7g}") for value in found) for name, found in features.items()},
            "log_probabilities": log_probabilities,
        }
    )


def _ask(predictor: Predictor, known: KnownExam) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
    """The towers' global features, and log-probabilities by class before any calibration."""
    exam = Exam((known.photo,), known.attributes, exam_id="known exam")
    encoded = predictor.encode(predictor.collate(predictor.exam_table(exam)))
    given: dict[str, Tensor | None] = {"image": encoded.image_cls, "text": encoded.text_cls}
    features = {name: value[0].double().cpu().numpy().ravel() for name, value in given.items() if value is not None}
    logits = predictor.logits(encoded)[0]
    shifted = logits - logits.max()
    found = (shifted - np.log(np.exp(shifted).sum())).tolist()
    return features, dict(zip(predictor.data_set.class_names, found, strict=True))


def check_known_exam(predictor: Predictor, *, tolerance: float = TOLERANCE) -> float | None:
    """Ask the model for its known exam.

    Returns:
        the largest deviation from training time, see `TOLERANCE`; None where the folder has no known exam (it was
        written before there were any).

    Raises:
        PrimaError: it answers otherwise, or not at all.
    """
    known = predictor.bundle.known_exam
    if known is None:
        return None
    features, answers = _ask(predictor, known)
    deviations = {
        **{f"the features of its {name}": _apart(found, known.features.get(name)) for name, found in features.items()},
        **{
            f"log p({name})": abs(value - known.log_probabilities.get(name, math.inf))
            for name, value in answers.items()
        },
    }
    worst = max(deviations, key=lambda name: deviations[name])
    if not deviations[worst] <= tolerance:
        raise PrimaError(
            f"the known exam is not answered as at training time: {worst} differs by {deviations[worst]:.3g} "
            f"(tolerance {tolerance:g})",
            where=predictor.run,
            mend="Its weights or the libraries have changed: copy the run again, or train it again.",
        )
    return deviations[worst]


def _apart(found: NDArray[np.float64], known: tuple[float, ...] | None) -> float:
    """The distance as a share of the known one's length."""
    if known is None or len(known) != len(found):
        return math.inf
    before = np.asarray(known)
    return float(np.linalg.norm(found - before) / max(float(np.linalg.norm(before)), 1e-12))
