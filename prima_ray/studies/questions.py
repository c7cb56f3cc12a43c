"""What a finished run is asked beyond its own predictions: with the blocks masked, and photo by photo."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prima_ray.base import StrictConfig, write_atomic, write_json
from prima_ray.data.plan import ExamIndex
from prima_ray.data.run_record import RECORD
from prima_ray.evaluation.metrics import Probabilities
from prima_ray.inference.predictor import Predictor
from prima_ray.stages.row_sets import shard_tables, single_photos
from prima_ray.studies.folds import labelled_roles

FILE = "answers.npz"


class QuestionConfig(StrictConfig):
    """Further questions to a finished run, about its test fold."""

    out: str
    run: str
    shards: str
    split: str
    fold: int
    sets: tuple[str, ...]
    """`masked`, `photos` or both."""


def ask(config: QuestionConfig) -> Path:
    """Ask them; returns the folder of `answers.npz`: `masked` (N, C), and `photos` (P, C), in the order of the rows."""
    index = ExamIndex.read(config.shards)
    rows = labelled_roles(index, split=config.split, fold=config.fold).test
    predictor = Predictor.load(config.run)
    blocks = sorted(index.manifest.data_set.block_attributes)
    how: Mapping[str, Callable[[], Probabilities]] = {
        "masked": lambda: predictor.predict_tables(shard_tables(index, rows), masked=blocks),
        "photos": lambda: predictor.predict_tables(single_photos(table) for table in shard_tables(index, rows)),
    }
    found: dict[str, Any] = {name: how[name]() for name in config.sets}
    written = io.BytesIO()
    np.savez(written, **found)
    out = Path(config.out)
    write_atomic(out / FILE, written.getvalue())
    write_json(out / RECORD, {"stage": "answers", "run": config.run})
    return out
