"""Predict: the diagnosis of one exam, or of every exam of a shard folder."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prima_ray.base import PrimaError
from prima_ray.data.attributes import normalise_attributes
from prima_ray.data.plan import ExamIndex
from prima_ray.inference.predictor import Exam, Predictor

_log = logging.getLogger(__name__)


def run_predict(
    run_dir: str,
    *,
    shards: str | None = None,
    out: str | None = None,
    images: Sequence[str] = (),
    metadata: str | None = None,
    as_json: bool = False,
) -> int:
    """What `prima predict` does; returns the exit code.

    Raises:
        PrimaError: a mistake in the arguments, the photos or the attributes.
    """
    if (shards is None) == (not images):
        raise PrimaError("give --shards, or one --image or more", mend="See `prima predict --help`.")
    if shards is not None:
        if out is None:
            raise PrimaError("--shards needs --out, the Parquet file to write")
        predict_folder(run_dir, shards, Path(out))
        print(f"run: {out}")  # noqa: T201 - the command's answer
        return 0
    answer = predict_exam(run_dir, images, metadata)
    sys.stdout.write(json.dumps(answer, indent=2) + "\n" if as_json else _table(answer))
    return 0


def predict_exam(run_dir: str, images: Sequence[str], metadata: str | None) -> dict[str, Any]:
    """One exam from files: prediction, probabilities, and what was made of the attributes."""
    raw = read_metadata(metadata)
    predictor = Predictor.load(run_dir)
    attributes = normalise_attributes(predictor.data_set, raw)
    exam = Exam(images=tuple(_read(path) for path in images), attributes=attributes)
    probabilities = predictor.predict([exam])[0]
    names = predictor.data_set.class_names
    used = attributes if predictor.uses_attributes else {}
    return {
        "prediction": names[int(np.argmax(probabilities))],
        "probabilities": {name: float(value) for name, value in zip(names, probabilities, strict=True)},
        "attributes_used": used,
        "attributes_missing": [name for name in predictor.data_set.attribute_names if name not in used],
        "text": predictor.text(attributes),
    }


def read_metadata(metadata: str | None) -> dict[str, object]:
    """Attributes from JSON, or from a file that holds it; none where it is not given.

    Raises:
        PrimaError: it is neither, or no object.
    """
    if metadata is None:
        return {}
    text = metadata
    if not metadata.lstrip().startswith("{"):
        try:
            text = Path(metadata).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PrimaError(
                f"--metadata is neither a JSON object nor a file ({error})",
                mend="""Example: --metadata '{"age": 61, "itch": true}'""",
            ) from None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise PrimaError(f"--metadata: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise PrimaError(f"--metadata: expected an object of attributes, got a {type(found).__name__}")
    return found


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PrimaError(f"cannot be read ({error.strerror})", where=path) from None


def _table(answer: dict[str, Any]) -> str:
    ranked = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
    lines = [f"{name:>12} {value:6.1%}  {'#' * round(40 * value)}" for name, value in ranked]
    return "\n".join([f"prediction: {answer['prediction']}", *lines]) + "\n"


def predict_folder(run_dir: str, shards: str, out: Path) -> None:
    """Every exam of a shard folder, by Ray Data, into `predictions.parquet`'s columns.

    Raises:
        PrimaError: the shards describe other attributes or classes than the model knows.
    """
    from tqdm import tqdm

    from prima_ray.inference.batch import predict_shards
    from prima_ray.inference.bundle import read_bundle_config
    from prima_ray.stages.training import write_predictions
    from prima_ray.training.cluster import connect
    from prima_ray.training.config import RayContextConfig

    index = ExamIndex.read(shards)
    model = read_bundle_config(Path(run_dir) / "model").data_set
    if model.class_names != index.manifest.data_set.class_names:
        raise PrimaError(
            f"the shards' classes are {', '.join(index.manifest.data_set.class_names)}, the model's "
            f"{', '.join(model.class_names)}",
            where=shards,
        )
    connect(RayContextConfig(), num_workers=0)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    probabilities = np.zeros((len(index), len(model.classes)))
    with tqdm(total=len(index), desc="predict", unit="exam", file=sys.stderr, mininterval=1.0) as bar:
        run, folder = str(Path(run_dir).resolve()), shards if "://" in shards else str(Path(shards).resolve())
        for rows, found in predict_shards(run, folder, num_exams=len(index), progress=bar.update):
            probabilities[rows] = found
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = np.arange(len(index))
    write_predictions(out, index, rows, index.patient_fold, torch.from_numpy(probabilities))
    _log.info("%d exams predicted", len(index))
