"""What a run carries beside its weights: made by the stages, from the right rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prima_ray.base import PrimaError, hash_key, read_json
from prima_ray.data.plan import ExamIndex, split_roles
from prima_ray.data.reader import RowReader
from prima_ray.evaluation.reliability import nll
from prima_ray.inference.calibration import CalibrationConfig, fit_calibration, fit_levels
from prima_ray.inference.diagnosis import Diagnoser, Diagnosis
from prima_ray.inference.predictor import Exam, Predictor
from prima_ray.inference.readiness import check_known_exam
from prima_ray.inference.reference import attribute_variables
from prima_ray.inference.scarcity import SHARES
from prima_ray.stages.answers import corpus_of
from prima_ray.stages.row_sets import read_predictions, shard_tables
from tests.conftest import train_tiny

NAMES = ("BCC", "NEV", "SEK")


@pytest.fixture(scope="module")
def calibrated(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of finetune whose eight validation exams are enough for a temperature."""
    return train_tiny(
        "finetune",
        labelled_shards,
        tmp_path_factory.mktemp("calibrated") / "run",
        calibration={"coverage": 0.8, "min_exams": 4, "answered": 0.75},
        max_steps=20,
    )


def roles_of(run: Path, shards: str) -> tuple[ExamIndex, dict[str, np.ndarray]]:
    index = ExamIndex.read(shards)
    roles = split_roles(index, fold=0, val_fold=None, split="patient")
    known = {name: getattr(roles, name) for name in ("train", "val", "test")}
    return index, {name: rows[index.labels[rows] >= 0] for name, rows in known.items()}


def test_every_probability_is_the_calibrated_one(calibrated: Path, labelled_shards: str) -> None:
    """The run's file, the predictor and the answer agree, and the validation fold alone decided."""
    index, roles = roles_of(calibrated, labelled_shards)
    recorded = {row["exam_id"]: row for row in pq.read_table(calibrated / "predictions.parquet").to_pylist()}
    table = RowReader(
        labelled_shards, index.manifest, columns=("exam_id", "patient_id", "images", "attributes", "label")
    )
    rows = np.concatenate([roles["val"], roles["test"]])
    read = table.read(rows, 0)
    predictor = Predictor.load(calibrated)
    assert predictor.calibration.temperature != 1.0
    found = predictor.predict_tables([read])
    wanted = np.array([[recorded[name][f"prob_{one}"] for one in NAMES] for name in index.exam_ids[rows]])
    assert found == pytest.approx(wanted, abs=1e-5)
    exams = [Exam(tuple(photo["bytes"] for photo in row["images"]), {}) for row in read.to_pylist()]
    answers = [item for item in Diagnoser.load(calibrated).diagnose(exams) if isinstance(item, Diagnosis)]
    assert np.array([list(item.probabilities.values()) for item in answers]) == pytest.approx(found, abs=1e-5)
    # Fitted again on the validation rows' own scores it is the same.
    scores = np.log(found[: len(roles["val"])]) * predictor.calibration.temperature
    config = CalibrationConfig(coverage=0.8, min_exams=4, answered=0.75)
    again = fit_calibration(scores, index.labels[roles["val"]], NAMES, config)
    assert again.temperature == pytest.approx(predictor.calibration.temperature, rel=1e-3)
    assert again.set_threshold == pytest.approx(predictor.calibration.set_threshold, abs=1e-4)
    figures = read_json(calibrated / "metrics.json")["calibration"]
    assert figures["temperature"] == predictor.calibration.temperature
    for role in ("val", "test"):
        labels = index.labels[roles[role]]
        mine = np.array([[recorded[name][f"prob_{one}"] for one in NAMES] for name in index.exam_ids[roles[role]]])
        assert figures[role]["after"]["nll"] == pytest.approx(nll(labels, mine))
        held = predictor.calibration.sets(mine)[np.arange(len(labels)), labels]
        assert figures[role]["sets"]["coverage"] == pytest.approx(held.mean())
    assert figures["val"]["after"]["nll"] <= figures["val"]["before"]["nll"]
    assert figures["val"]["sets"]["coverage"] >= 0.8


def test_validation_exams_are_asked_with_fewer_attributes(labelled_shards: str, tmp_path: Path) -> None:
    """A model that reads attributes has limits for exams that lack them, fitted to what the predictor says of these."""
    asked = {"coverage": 0.5, "min_exams": 4, "answered": 0.75}
    run = train_tiny("fuse", labelled_shards, tmp_path / "run", calibration=asked, max_steps=20)
    index, roles = roles_of(run, labelled_shards)
    predictor = Predictor.load(run)
    calibration = predictor.calibration
    assert calibration.scarcity is not None
    assert calibration.scarcity.attributes == predictor.read_attributes
    assert sum(calibration.scarcity.patterns.values()) == len(roles["train"])
    reader = RowReader(labelled_shards, index.manifest, columns=("exam_id", "images", "attributes"))
    rows, labels = reader.read(roles["val"], 0).to_pylist(), index.labels[roles["val"]]
    found: dict[float, np.ndarray] = {}
    for share in (*SHARES, 1.0):
        exams = []
        for row in rows:
            kept = [pair for pair in row["attributes"] if hash_key(row["exam_id"], pair[0]) / 2**64 >= 1 - share]
            exams.append(Exam(tuple(photo["bytes"] for photo in row["images"]), dict(kept)))
        completeness = calibration.completeness([exam.attributes.keys() for exam in exams])
        found[share] = np.log(calibration.undone(predictor.predict(exams), completeness))
    whole = found.pop(1.0)
    wanted = fit_levels(calibration, whole, found, labels, CalibrationConfig.model_validate(asked))
    for level, other in zip(calibration.scarcity.levels, wanted, strict=True):
        assert level.completeness == other.completeness
        assert level.temperature == pytest.approx(other.temperature, rel=1e-3)
        assert level.min_confidence == pytest.approx(other.min_confidence, abs=1e-4)
        assert level.set_threshold == pytest.approx(other.set_threshold, abs=1e-4)
    # A photo alone is held to them.
    answer = Diagnoser(predictor, version="").diagnose_one(Exam((rows[0]["images"][0]["bytes"],), {}))
    least = calibration.scarcity.levels[0].min_confidence
    assert [item.cause for item in answer.reasons if item.cause == "uncertain"] == ["uncertain"] * (
        answer.confidence < least
    )
    assert "of the exams that it learned from more was known" in answer.warnings[-1]
    # What the run's file and metrics say went the same way.
    held = np.sort(np.concatenate([roles["val"], roles["test"]]))
    asked_again = predictor.predict_tables(shard_tables(index, held))
    assert read_predictions(run, index, held) == pytest.approx(asked_again, abs=1e-5)
    figures = read_json(run / "metrics.json")["calibration"]
    assert figures["scarcity"] == {"levels": [level.model_dump() for level in calibration.scarcity.levels]}


def test_attributes_are_counted_on_training_rows(tiny_fuse: Path, labelled_shards: str) -> None:
    index, roles = roles_of(tiny_fuse, labelled_shards)
    found = Predictor.load(tiny_fuse).bundle.reference
    assert found is not None
    assert (found.num_train, found.num_val) == (len(roles["train"]), len(roles["val"]))
    wanted = attribute_variables(index.attribute_rows(roles["train"]), index.manifest.data_set)
    assert {name: found.variables[name] for name in wanted} == wanted
    figures = read_json(tiny_fuse / "metrics.json")["familiarity"]
    assert figures["val"] == {"strange": 0.0, "unusable": 0.0}


def test_a_run_that_holds_nothing_out_says_what_it_cannot_promise(labelled_shards: str, tmp_path: Path) -> None:
    run = train_tiny("finetune", labelled_shards, tmp_path / "run", fold="none", max_steps=2)
    diagnoser = Diagnoser.load(run)
    assert check_known_exam(diagnoser.predictor) is not None
    reader = RowReader(labelled_shards, ExamIndex.read(labelled_shards).manifest, columns=("exam_id", "images"))
    photos = reader.read(np.array([0]), 0).to_pylist()[0]["images"]
    found = diagnoser.diagnose_one(Exam((photos[0]["bytes"],), {}))
    assert set(found.prediction_set) == set(NAMES)
    assert (found.abstained, found.novelty) == (False, None)
    assert found.warnings == (
        "no validation fold: probabilities are not calibrated, and prediction sets hold every class",
        "0 validation exams are too few to tell strange photos (familiar: 0.6)",
    )


def test_a_corpus_that_is_gone_is_told_and_a_named_one_must_be_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = {"stage": "align", "seed": 0, "inputs": {"corpus": {"path": str(tmp_path / "gone"), "hash": "0"}},
              "outputs": {}, "versions": {}, "git_commit": None}  # fmt: skip
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "run.json").write_text(json.dumps(record))
    assert corpus_of(None, None) is None
    assert corpus_of(str(tmp_path / "align"), None) is None
    assert caplog.messages[0].startswith(
        f"warning: answers will show no evidence: the corpus that {tmp_path / 'align'} read: {tmp_path / 'gone'}: "
    )
    with pytest.raises(PrimaError, match="no such corpus"):
        corpus_of(str(tmp_path / "align"), str(tmp_path / "gone"))
