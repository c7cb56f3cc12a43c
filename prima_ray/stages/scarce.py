"""Asks validation exams anew with fewer of their attributes, so that a model knows when it is told too little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prima_ray.data.plan import ExamIndex
from prima_ray.data.reader import Rows
from prima_ray.evaluation.robustness import drop_attributes
from prima_ray.inference.calibration import Calibration, CalibrationConfig, Matrix, fit_levels
from prima_ray.inference.contributions import ask
from prima_ray.inference.predictor import Predictor
from prima_ray.inference.scarcity import SHARES, Scarcity
from prima_ray.stages.row_sets import shard_tables


def ask_with_less(predictor: Predictor, index: ExamIndex, rows: Rows) -> dict[float, Matrix]:
    """Logits (N, C) of some exams as they are (key 1) and with each share of their attributes.

    Photos pass the tower once. What a share leaves out, a smaller one does too.
    """
    read = predictor.read_attributes
    found: dict[float, list[Matrix]] = {share: [] for share in (*SHARES, 1.0)}
    for table in shard_tables(index, rows):
        encoded = predictor.encode(predictor.collate(table))
        exams = list(zip(table["exam_id"].to_pylist(), table["attributes"].to_pylist(), strict=True))
        for share, logits in found.items():
            asked = [
                (row, drop_attributes({name: value for name, value in known or () if name in read}, 1.0 - share, exam))
                for row, (exam, known) in enumerate(exams)
            ]
            logits.append(ask(predictor, encoded, asked))
    num_classes = len(index.manifest.data_set.classes)
    return {share: np.concatenate([np.zeros((0, num_classes)), *logits]) for share, logits in found.items()}


def fit_scarcity(
    calibration: Calibration,
    asked: Sequence[dict[float, Matrix]],
    index: ExamIndex,
    config: CalibrationConfig,
    *,
    read: Sequence[str],
    learned: Rows,
    rows: Rows,
) -> Calibration:
    """With limits for exams of which less is known, of `ask_with_less`; as it is where there are too few exams.

    Args:
        asked: of one model or several, together the exams ``rows``.
        read: the attributes that the model reads; none: as it is.
        learned: the exams that the model learned from.
    """
    if not read or len(rows) < config.min_exams:
        return calibration
    logits = {share: np.concatenate([found[share] for found in asked]) for share in asked[0]}
    whole = logits.pop(1.0)
    levels = fit_levels(calibration, whole, logits, index.labels[rows], config)
    scarcity = Scarcity.learn(read, index.attribute_rows(learned), levels)
    return calibration.model_copy(update={"scarcity": scarcity})
