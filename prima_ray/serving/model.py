"""A loaded run that answers batches of exams, in whatever process it is needed. No Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prima_ray.base import PrimaError, hash_file, hash_json, read_json
from prima_ray.data.attributes import normalise_attributes
from prima_ray.data.fetched import RUN_RECORD, local_copy
from prima_ray.inference.predictor import Predictor
from prima_ray.serving.config import ReplicaConfig
from prima_ray.serving.engine import Answer, Question, Served, timed
from prima_ray.serving.schemas import ModelCard

UNCALIBRATED = "this run holds no calibration: its prediction set is every diagnosis"


class Model:
    """See `engine.Answering`."""

    def __init__(self, run: str, replica: ReplicaConfig | None = None) -> None:
        """Raises:
        PrimaError: no such run, or a damaged one.
        """
        replica = replica or ReplicaConfig()
        if replica.device == "cpu":
            torch.set_num_threads(max(1, int(replica.num_cpus)))
        self._predictor = Predictor.load(run, device=replica.device)
        self.served = Served(
            card=model_card(run, self._predictor),
            data_set=self._predictor.data_set,
            read_attributes=self._predictor.read_attributes,
        )

    def answer(self, questions: Sequence[Question]) -> list[Answer | PrimaError]:
        """See `engine.Answering.answer`."""
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        found: list[Answer | PrimaError | Any] = []
        for question in questions:
            try:
                found.append(self._predictor.exam_table(question.exam))
            except PrimaError as error:
                found.append(error)
        started = timed(seconds, "decode", started)
        good = [at for at, item in enumerate(found) if not isinstance(item, PrimaError)]
        if good:
            probabilities = self._predictor.predict([questions[at].exam for at in good], batch_size=len(good))
            timed(seconds, "predict", started)
            for at, row in zip(good, probabilities, strict=True):
                fields = self._fields(questions[at], row)
                found[at] = Answer(fields, self.served.card, seconds, len(good))
        return found

    def check(self) -> None:
        """See `engine.Engine.check`."""

    def _fields(self, question: Question, row: np.ndarray[Any, Any]) -> dict[str, Any]:
        names, read = self._predictor.data_set.class_names, self.served.read_attributes
        known = normalise_attributes(self._predictor.data_set, question.exam.attributes)
        return {
            "prediction": names[int(row.argmax())],
            "probabilities": dict(zip(names, map(float, row), strict=True)),
            "prediction_set": list(names),
            "coverage": 1.0,
            "abstained": False,
            "reasons": [],
            "attributes_used": {name: known[name] for name in read if name in known},
            "attributes_missing": [name for name in read if name not in known],
            "attributes_ignored": [name for name in known if name not in read],
            "text": self._predictor.text(known),
            "warnings": [UNCALIBRATED, *self._predictor.warnings(known)],
        }


def model_card(run: str, predictor: Predictor) -> ModelCard:
    """Name and versions of a run's model."""
    folder = local_copy(run)
    files = sorted(item for item in (folder / "model").rglob("*") if item.is_file())
    hashes = {item.relative_to(folder).as_posix(): hash_file(item) for item in files}
    record = read_json(folder / RUN_RECORD) if Path(folder / RUN_RECORD).exists() else {}
    shards = record.get("inputs", {}).get("shards", {}).get("hash")
    return ModelCard(
        name=f"{predictor.data_set.name}-{predictor.config.kind}",
        version=hash_json(hashes)[:16],
        data_version=str(shards)[:16] if shards else None,
        unvetted=bool(record.get("unvetted", False)),
    )
