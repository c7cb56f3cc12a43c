"""How far apart two trained models are in what they say: weights may differ where it makes no difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prima_ray.data.plan import ExamIndex
from prima_ray.inference.similarity import image_text_cosines

ANSWERS: Mapping[str, str] = {
    "align": "Cosines between photos and texts",
    "finetune": "Probabilities of the diagnoses",
    "fuse": "Probabilities of the diagnoses",
}
"""What is compared, by stage."""
_MAX_EXAMS = 256


def answer_difference(run: Path, other: Path, *, stage: str, shards: str) -> float:
    """Largest absolute difference of an answer: a probability of a held-out exam, or a cosine of `image_text_cosines`
    among up to 256 exams spread over the shards; infinite where the runs did not predict the same exams.
    """
    if stage != "align":
        return _prediction_difference(run, other)
    index = ExamIndex.read(shards)
    rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), _MAX_EXAMS), dtype=np.int64))
    mine, theirs = (image_text_cosines(folder, shards, index.manifest, rows) for folder in (run, other))
    return float((mine - theirs).abs().max())


def _prediction_difference(run: Path, other: Path) -> float:
    import pyarrow.parquet as pq

    mine, theirs = (pq.read_table(folder / "predictions.parquet").sort_by("exam_id") for folder in (run, other))
    if mine["exam_id"] != theirs["exam_id"]:
        return float("inf")
    names = [name for name in mine.column_names if name.startswith("prob_")]
    return max(float(np.abs(mine[name].to_numpy() - theirs[name].to_numpy()).max()) for name in names)
