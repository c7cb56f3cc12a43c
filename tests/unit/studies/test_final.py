"""The final model of a study: trained on every fold, calibrated on what the folds' models said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from prima_ray.base import PrimaError
from prima_ray.data.plan import ExamIndex
from prima_ray.data.run_record import check_outputs, read_record
from prima_ray.data.storage import Folder
from prima_ray.inference.bundle import read_calibration
from prima_ray.inference.calibration import CalibrationConfig, fit_calibration, fit_levels
from prima_ray.inference.predictor import Exam, Predictor
from prima_ray.inference.readiness import check_known_exam
from prima_ray.stages.evaluate import run_evaluate
from prima_ray.stages.row_sets import read_predictions
from prima_ray.stages.scarce import ask_with_less
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.final import check_final, train_final
from prima_ray.studies.run import run_study
from tests.conftest import jpeg

PHOTOS = {"stage": "finetune", "config": "finetune.yaml", "change": {"max_steps": 2}}
OURS = {"kind": "trained", "title": "photos", "recipe": "photos"}


@pytest.fixture
def study(make_study: Callable[..., StudyConfig]) -> StudyConfig:
    return make_study(folds=None, recipes={"photos": PHOTOS}, variants={"photos": OURS}, ours="photos")


def test_it_is_calibrated_on_what_each_model_said_of_its_own_test_fold(
    study: StudyConfig, labelled_shards: str, tmp_path: Path
) -> None:
    run_study(study)
    found = Path(train_final(study, str(tmp_path / "final")))
    index = ExamIndex.read(labelled_shards)
    config = yaml.safe_load((found / "config.yaml").read_text())
    assert config["fold"] == "none"
    check_outputs(found, read_record(found, stage="finetune"))

    labelled = np.flatnonzero(index.labels >= 0)
    scores = np.full((len(labelled), 3), np.nan)
    for fold in range(4):
        runs = [
            folder
            for folder in (tmp_path / "given" / "cells").glob("finetune-*")
            if folder.is_dir() and yaml.safe_load((folder / "config.yaml").read_text())["fold"] == fold
        ]
        (run,) = runs
        mine = index.folds("patient")[labelled] == fold
        calibration = read_calibration(run / "model")
        assert calibration is not None
        scores[mine] = np.log(calibration.undone(read_predictions(run, index, labelled[mine])))
    assert np.isfinite(scores).all()
    asked = CalibrationConfig.model_validate(config["calibration"])
    wanted = fit_calibration(scores, index.labels[labelled], index.manifest.data_set.class_names, asked)
    predictor = Predictor.load(found)
    assert predictor.calibration.temperature == pytest.approx(wanted.temperature, rel=1e-6)
    assert predictor.calibration.set_threshold == pytest.approx(wanted.set_threshold, rel=1e-6)
    assert predictor.calibration.num_exams == len(labelled)
    assert "4 models like this one, each of a fold that it did not learn from" in predictor.calibration.notes[-1]
    # What it is expected to do: each fold calibrated on the answers to the others.
    names, folds = index.manifest.data_set.class_names, index.folds("patient")[labelled]
    for fold in range(4):
        mine = folds == fold
        others = fit_calibration(scores[~mine], index.labels[labelled][~mine], names, asked)
        np.testing.assert_allclose(
            read_predictions(found, index, labelled[mine]), others.probabilities(scores[mine]), atol=1e-6
        )
    assert check_known_exam(predictor) is not None
    told = json.loads((found / "metrics.json").read_text())["cross_fitted"]
    assert told["num_exams"] == len(labelled)
    assert 0 <= told["headline"]["macro_f1"]["mean"] <= 1
    assert list(told["calibration_by_fold"]) == ["0", "1", "2", "3"]

    familiarity = predictor.bundle.familiarity
    assert familiarity is not None
    assert familiarity.record.num_val == len(labelled)
    assert all(limit is None or limit > 0 for limit in familiarity.record.limits.values())
    reference = predictor.bundle.reference
    assert reference is not None
    assert {"prediction", "confidence"} <= set(reference.variables)
    # It has seen every exam: nothing is left to score it on.
    with pytest.raises(PrimaError, match="trained on every fold"):
        run_evaluate(str(found))
    before = (found / "run.json").read_text()
    assert train_final(study, str(tmp_path / "final")) == found
    assert (found / "run.json").read_text() == before


def test_on_an_object_store_it_is_the_same_model(study: StudyConfig, bucket: str, tmp_path: Path) -> None:
    there = train_final(study, f"{bucket}/final")
    assert there == f"{bucket}/final"
    here = train_final(study, str(tmp_path / "final"))
    fetched, kept = Predictor.load(str(there)), Predictor.load(here)
    assert fetched.calibration == kept.calibration
    exam = Exam((jpeg(np.random.default_rng(0), 50, 40),), {})
    np.testing.assert_array_equal(fetched.predict([exam]), kept.predict([exam]))
    # Finished: the same command looks, and trains nothing.
    written = Folder.at(f"{bucket}/final").read("run.json")
    train_final(study, f"{bucket}/final")
    assert Folder.at(f"{bucket}/final").read("run.json") == written


def test_it_trains_as_long_as_the_models_of_single_folds_were_best_after(
    make_study: Callable[..., StudyConfig], labelled_shards: str, tmp_path: Path
) -> None:
    recipes = {
        "photos": {**PHOTOS, "change": {"max_steps": None, "epochs": 4}},
        "both": {
            "stage": "fuse", "config": "fuse.yaml", "parents": {"finetune": "photos"},
            "change": {"max_steps": None, "epochs": 3},
        },
    }  # fmt: skip
    ours = {"kind": "trained", "title": "both", "recipe": "both", "candidates": [{}, {"optimizer.lr": 1e-4}]}
    study = make_study(folds=None, recipes=recipes, variants={"both": ours}, ours="both")
    made_final = Path(train_final(study, str(tmp_path / "final")))
    final = yaml.safe_load((made_final / "config.yaml").read_text())
    by_fold: dict[int, Path] = {}
    best: dict[str, list[int]] = {"finetune": [], "fuse": []}
    on_all_folds = {}
    for folder in (tmp_path / "given" / "cells").iterdir():
        stage = folder.name.partition("-")[0]
        if stage not in best or not (folder / "run.json").exists():
            continue
        made = yaml.safe_load((folder / "config.yaml").read_text())
        if made["fold"] == "none":
            on_all_folds[stage] = made["epochs"]
        elif stage == "finetune" or made["optimizer"]["lr"] == final["optimizer"]["lr"]:
            if stage == "fuse":
                by_fold[made["fold"]] = folder
            step = json.loads((folder / "metrics.json").read_text())["best_step"]
            lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
            best[stage].append(next(line["epoch"] + 1 for line in lines if line["step"] == step))
    assert {stage: len(found) for stage, found in best.items()} == {"finetune": 4, "fuse": 4}
    assert on_all_folds == {stage: max(1, round(float(np.median(found)))) for stage, found in best.items()}
    assert final["epochs"] == on_all_folds["fuse"]
    check_scarcity(made_final, by_fold, ExamIndex.read(labelled_shards), CalibrationConfig(**final["calibration"]))


def check_scarcity(final: Path, by_fold: dict[int, Path], index: ExamIndex, config: CalibrationConfig) -> None:
    """Each fold's model was asked about the exams that it never saw, with fewer of their attributes."""
    calibration = read_calibration(final / "model")
    assert calibration is not None
    assert calibration.scarcity is not None
    labelled = np.flatnonzero(index.labels >= 0)
    found: dict[float, np.ndarray] = {}
    for fold, run in by_fold.items():
        mine = np.flatnonzero(index.folds("patient")[labelled] == fold)
        for share, logits in ask_with_less(Predictor.load(run), index, labelled[mine]).items():
            found.setdefault(share, np.full((len(labelled), 3), np.nan))[mine] = logits
    wanted = fit_levels(calibration, found.pop(1.0), found, index.labels[labelled], config)
    for level, other in zip(calibration.scarcity.levels, wanted, strict=True):
        assert level.temperature == pytest.approx(other.temperature, rel=1e-6)
        assert level.min_confidence == pytest.approx(other.min_confidence, abs=1e-6)
        assert level.set_threshold == pytest.approx(other.set_threshold, abs=1e-6)
    assert sum(calibration.scarcity.patterns.values()) == len(labelled)


def test_what_cannot_be_is_told_before_anything_is_trained(
    study: StudyConfig, make_study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    with pytest.raises(PrimaError, match="at which a search does not look"):
        check_final(study.model_copy(update={"scored_on": "validation"}), str(tmp_path / "final"))
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    with pytest.raises(PrimaError, match="no run directory"):
        check_final(study, str(occupied))
    patient = {**PHOTOS, "change": {"selection": {"metric": "loss", "mode": "min", "patience_epochs": 2}}}
    stopping = make_study(folds=None, recipes={"photos": patient}, variants={"photos": OURS}, ours="photos")
    with pytest.raises(PrimaError, match="patience_epochs needs a validation fold"):
        check_final(stopping, str(tmp_path / "final"))
    assert not (tmp_path / "given" / "cells").exists()


def test_folds_that_are_left_out_leave_exams_unanswered(make_study: Callable[..., StudyConfig], tmp_path: Path) -> None:
    study = make_study(recipes={"photos": PHOTOS}, variants={"photos": OURS}, ours="photos")
    with pytest.raises(PrimaError, match="leaves folds out"):
        train_final(study, str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_of_a_classifier_of_attributes_there_is_none(make_study: Callable[..., StudyConfig], tmp_path: Path) -> None:
    study = make_study(folds=None, variants={"ours": {"kind": "metadata", "title": "attributes"}}, ours="ours")
    with pytest.raises(PrimaError, match="ours is not trained"):
        train_final(study, str(tmp_path / "final"))
