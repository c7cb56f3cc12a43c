"""Asks validation exams anew with fewer of their attributes, so that a model knows when it is told too little."""

from __future__ import annotations

from collections.abc import Mapping

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
    """Logits (N, C) of some exams as they are (key 1) and with each share of their attributes; empty where the model
    reads none.

    Photos pass the tower once. What a share leaves out, a smaller one does too.
    """
    read = predictor.read_attributes
    if not read:
        return {}
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


def with_scarcity(
    calibration: Calibration,
    asked: Mapping[float, Matrix],
    index: ExamIndex,
    rows: Rows,
    config: CalibrationConfig,
    *,
    read: tuple[str, ...],
    learned: Rows,
) -> Calibration:
    """Add what is fitted to exams of which less is known; nothing where there are too few.

    Args:
        asked: of `ask_with_less`, about the exams ``rows``.
        read: the attributes that the model reads.
        learned: exams that it learned from.
    """
    if not asked or len(rows) < config.min_exams:
        return calibration
    scarce = {share: logits for share, logits in asked.items() if share < 1}
    levels = fit_levels(calibration, asked[1.0], scarce, index.labels[rows], config)
    scarcity = Scarcity.learn(read, index.attribute_rows(learned), levels)
    return calibration.model_copy(update={"scarcity": scarcity})
