"""What an attribute does to the answer: the change when it alone is left out of the text (leave one covariate out).

Of A attributes that is A more texts and A more passes of the fusion model; photos are not read again. It is no Shapley
value: where two attributes say the same, leaving out either changes little, and the changes need not sum to that of
leaving out all. An attribute that is left out counts as missing, which the model may itself hold to mean something.
Both answers go through the temperature of the whole exam: a change is the model's, and not one of calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.inference.predictor import Predictor

Matrix = NDArray[np.float64]
_BATCH = 64


@dataclass(frozen=True)
class Contribution:
    """What one attribute did for the predicted class."""

    attribute: str
    value: str
    log_odds: float
    """Log-odds with it, less those without it: above zero it speaks for the predicted class."""
    probability: float
    """The same of the calibrated probability."""


@dataclass(frozen=True)
class Contributions:
    """Of one exam."""

    items: tuple[Contribution, ...]
    """The largest change first."""
    without_attributes: Mapping[str, float]
    """Probabilities by class when every attribute is left out."""


def leave_one_out(
    predictor: Predictor, encoded: ImageTextBatch, attributes: Sequence[Mapping[str, str]], logits: Matrix
) -> list[Contributions]:
    """Of N exams.

    Args:
        encoded: of `Predictor.encode`: N exams.
        attributes: canonical values that the model reads, an exam a mapping.
        logits: (N, C) with all of them.
    """
    variants: list[tuple[int, dict[str, str]]] = []
    for exam, values in enumerate(attributes):
        variants.append((exam, {}))
        variants += [(exam, {key: value for key, value in values.items() if key != name}) for name in values]
    found = np.concatenate(
        [ask(predictor, encoded, variants[start : start + _BATCH]) for start in range(0, len(variants), _BATCH)]
    )
    # A change is measured on the scale of the whole answer; what is left of it without attributes on its own.
    scale = predictor.calibration.completeness(attributes)
    scales = scale[[exam for exam, _ in variants]]
    probabilities = predictor.calibration.probabilities(found, scales)
    odds = log_odds(predictor.calibration.scaled(found, scales))
    whole = predictor.calibration.probabilities(logits, scale)
    whole_odds = log_odds(predictor.calibration.scaled(logits, scale))
    nothing = predictor.calibration.completeness([()])
    answers, place = [], 0
    for exam, values in enumerate(attributes):
        top = int(whole[exam].argmax())
        items = [
            Contribution(
                attribute=name,
                value=value,
                log_odds=float(whole_odds[exam, top] - odds[place + number, top]),
                probability=float(whole[exam, top] - probabilities[place + number, top]),
            )
            for number, (name, value) in enumerate(values.items(), start=1)
        ]
        (alone,) = predictor.calibration.probabilities(found[[place]], nothing)
        bare = dict(zip(predictor.data_set.class_names, alone.tolist(), strict=True))
        answers.append(Contributions(tuple(sorted(items, key=lambda item: -abs(item.log_odds))), bare))
        place += 1 + len(values)
    return answers


def log_odds(scores: Matrix) -> Matrix:
    """(N, C) logits -> log p / (1 - p) of each class, also where p rounds to 1."""
    found = np.empty_like(scores)
    for index in range(scores.shape[1]):
        others = np.delete(scores, index, axis=1)
        top = others.max(axis=1, keepdims=True)
        found[:, index] = scores[:, index] - (top[:, 0] + np.log(np.exp(others - top).sum(axis=1)))
    return found


def ask(predictor: Predictor, encoded: ImageTextBatch, variants: Sequence[tuple[int, Mapping[str, str]]]) -> Matrix:
    """Logits (M, C) of some exams' photos with other attributes.

    Args:
        encoded: of `Predictor.encode`.
        variants: (row of the batch, canonical values), M of them.
    """
    rows = [
        {"exam_id": "", "patient_id": None, "images": [], "attributes": sorted(values.items()), "label": None}
        for _, values in variants
    ]
    texts = predictor.collate(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), part="text")
    exams = torch.tensor([exam for exam, _ in variants], device=predictor.device)
    if encoded.image_cls is None or encoded.image_seq is None:
        raise ValueError("the batch is not encoded")
    batch = replace(
        texts,
        image_cls=encoded.image_cls[exams],
        image_seq=encoded.image_seq[exams],
        photo_logits=None if encoded.photo_logits is None else encoded.photo_logits[exams],
        image_mask=None if encoded.image_mask is None else encoded.image_mask[exams],
    )
    return predictor.logits(predictor.encode_texts(batch))
