"""Whether a loaded model answers as it did when it was trained (see `known_exam`)."""

from __future__ import annotations

import math

import numpy as np

from prima_ray.base import PrimaError
from prima_ray.inference.known_exam import KnownExam
from prima_ray.inference.predictor import Exam, Predictor

TOLERANCE = 0.02
"""Nats of a class's log-probability; other devices and libraries differ by far less, other weights by more."""


def make_known_exam(predictor: Predictor) -> KnownExam:
    """Make the exam of the model's data set and ask the model."""
    known = KnownExam.of(predictor.data_set, side=predictor.config.views.image_size)
    return known.model_copy(update={"log_probabilities": _ask(predictor, known)})


def _ask(predictor: Predictor, known: KnownExam) -> dict[str, float]:
    exam = Exam((known.photo,), known.attributes, exam_id="known exam")
    logits = predictor.logits(predictor.encode(predictor.collate(predictor.exam_table(exam))))[0]
    shifted = logits - logits.max()
    found = (shifted - np.log(np.exp(shifted).sum())).tolist()
    return dict(zip(predictor.data_set.class_names, found, strict=True))


def check_known_exam(predictor: Predictor, *, tolerance: float = TOLERANCE) -> float | None:
    """Ask the model for its known exam.

    Returns:
        the largest deviation of a log-probability from training time, in nats; None where the folder has no known exam
        (it was written before there were any).

    Raises:
        PrimaError: it answers otherwise, or not at all.
    """
    known = predictor.bundle.known_exam
    if known is None:
        return None
    found = _ask(predictor, known)
    worst = max(found, key=lambda name: abs(found[name] - known.log_probabilities.get(name, math.inf)))
    deviation = abs(found[worst] - known.log_probabilities.get(worst, math.inf))
    if not deviation <= tolerance:
        raise PrimaError(
            f"the known exam is not answered as at training time: log p({worst}) is {found[worst]:.4f}, it was "
            f"{known.log_probabilities.get(worst, math.nan):.4f} (tolerance {tolerance:g})",
            where=predictor.run,
            mend="Its weights or the libraries have changed: copy the run again, or train it again.",
        )
    return deviation
