"""A whole study of tiny runs, in this process: what it writes, what it keeps, what a failure costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from prima_ray.base import PrimaError, read_json
from prima_ray.cli import main
from prima_ray.config import load_config
from prima_ray.data.plan import ExamIndex
from prima_ray.evaluation.metrics import headline
from prima_ray.stages.row_sets import read_predictions
from prima_ray.studies.answers import Answers, late_fusion_answers, metadata_answers
from prima_ray.studies.cells import plan_study
from prima_ray.studies.config import LateFusionVariant, MetadataVariant, StudyConfig
from prima_ray.studies.folds import FoldData, labelled_roles
from prima_ray.studies.run import run_study
from tests.unit.studies.conftest import write_study

Make = Callable[..., StudyConfig]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, labelled_shards: str) -> StudyConfig:
    """A finished study: do not write into it."""
    folder = tmp_path_factory.mktemp("study")
    path = write_study(folder, labelled_shards, claims=[["prima", "photos", "reading the attributes"]])
    found = load_config(StudyConfig, path)
    run_study(found)
    return found


def cell_of(study: StudyConfig, variant: str, fold: int) -> Any:
    cells, asked = plan_study(study, ExamIndex.read(str(study.inputs.shards)))
    return cells[asked[variant, 0, fold, 0]]


def test_a_figure_is_the_mean_over_the_folds_of_the_runs_own(study: StudyConfig) -> None:
    metrics = read_json(Path(study.out) / "metrics.json")
    index = ExamIndex.read(str(study.inputs.shards))
    by_fold = []
    for fold in (0, 1):
        rows = labelled_roles(index, split="patient", fold=fold).test
        found = read_predictions(cell_of(study, "prima", fold).folder, index, rows)
        by_fold.append(headline(index.labels[rows], found)["macro_f1"])
    told = metrics["sets"]["all"]["headline"]
    assert told["models"]["prima"]["macro_f1"]["value"] == pytest.approx(np.mean(by_fold))
    assert told["over_folds"]["prima"]["macro_f1"]["sd"] == pytest.approx(np.std(by_fold, ddof=1))
    assert list(metrics["sets"]) == ["all", "complete", "masked", "photos"]
    assert [row["chosen"] for row in metrics["choices"]["metadata"]] != []
    (claim,) = metrics["claims"]
    gap = told["models"]["prima"]["macro_f1"]["value"] - told["models"]["photos"]["macro_f1"]["value"]
    assert claim["sets"]["all"]["differences"]["macro_f1"]["value"] == pytest.approx(gap)
    assert metrics["runs"]["photos"]["runs"] == 2


def test_the_page_names_every_variant_and_how_to_make_it_again(study: StudyConfig) -> None:
    page = (Path(study.out) / "report.html").read_text()
    for text in ("PRIMA", "photos alone", "attributes alone", "added up", "prima study", "reading the attributes"):
        assert text in page, text
    assert "http" not in page.replace("http://www.w3.org", "")


def test_nothing_finished_is_run_again(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell_of(study, "prima", 0).folder / "run.json"
    stamp = before.stat().st_mtime_ns
    monkeypatch.setattr("prima_ray.studies.schedule.run_cell", lambda *_: pytest.fail("a finished run was run again"))
    run_study(study)
    assert before.stat().st_mtime_ns == stamp


def test_a_finished_run_keeps_no_checkpoints(study: StudyConfig, make_study: Make) -> None:
    """They are most of what it takes; the model answers as before, and a study that wants them keeps them."""
    for variant in ("prima", "photos"):
        assert not (cell_of(study, variant, 0).folder / "checkpoints").exists()
    kept = make_study(keep_checkpoints=True)
    figures = read_json(run_study(kept) / "metrics.json")["sets"]
    assert figures == read_json(Path(study.out) / "metrics.json")["sets"]
    folders = [cell_of(kept, "prima", fold).folder / "checkpoints" for fold in (0, 1)]
    assert all(list(folder.iterdir()) for folder in folders)
    # Taken up by one that does not want them: of runs that were finished before, too.
    run_study(make_study())
    assert not any(folder.exists() for folder in folders)


def test_some_variants_come_first_and_the_others_another_time(make_study: Make) -> None:
    """In the same folder; the page says what waits, and how it was made."""
    claims = [["prima", "photos", "reading the attributes"], ["prima", "late", "fusion by a language model"]]
    for only, variants, told in (
        (["metadata"], ["metadata", "prima"], "photos alone; added up wait for another sitting"),
        (["late"], ["late", "metadata", "photos", "prima"], ""),
        (None, ["late", "metadata", "photos", "prima"], ""),
    ):
        found = make_study(claims=claims, only=only)
        metrics = read_json(run_study(found) / "metrics.json")
        assert sorted(metrics["variants"]) == variants
        assert [claim["what"] for claim in metrics["claims"]] == [what for _, one, what in claims if one in variants]
        page = (Path(found.out) / "report.html").read_text()
        assert told in page
        assert ("wait for another sitting" in page) == bool(told)
        assert ("only=[" in page) == (only is not None)
        assert yaml.safe_load((Path(found.out) / "config.yaml").read_text())["only"] is None
    with pytest.raises(PrimaError, match="only: photo is no variant; known: prima"):
        make_study(only=["photo"])


def test_a_study_grows_in_its_folder_and_does_not_become_another(make_study: Make) -> None:
    raw = make_study().model_dump(mode="json")
    variants = raw["variants"]
    first = make_study(variants={"prima": variants["prima"], "metadata": variants["metadata"]}, folds=[0])
    run_study(first)
    finished = {path: path.stat().st_mtime_ns for path in (Path(first.out).parent / "cells").glob("*/run.json")}
    assert len(finished) == 3
    grown = make_study(claims=[["prima", "photos", "reading the attributes"]])
    metrics = read_json(run_study(grown) / "metrics.json")
    assert metrics["folds"] == [0, 1]
    assert sorted(metrics["variants"]) == sorted(variants)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    kept = yaml.safe_load((Path(grown.out) / "config.yaml").read_text())
    assert kept["claims"] == [["prima", "photos", "reading the attributes"]]
    for key, value in (("ours", "photos"), ("split", "lesion"), ("scored_on", "validation")):
        with pytest.raises(PrimaError, match=f"another config; it differs in {key}"):
            run_study(make_study(**{key: value}))


def test_a_run_that_fails_takes_no_other_with_it_and_is_named(make_study: Make, capfd: Any) -> None:
    raw = make_study().model_dump(mode="json")
    # Too few steps is no failure; a learning rate that diverges is.
    raw["variants"]["prima"]["candidates"] = [{"optimizer.lr": 1e12, "optimizer.clip_norm": None}]
    broken = make_study(variants=raw["variants"], ours="photos")
    with pytest.raises(PrimaError) as error:
        run_study(broken)
    said = "2 of 8 runs failed, and 2 that need them were not run; the first, both (fold 0, seed 0): "
    assert said in str(error.value)
    metrics = read_json(Path(broken.out) / "metrics.json")
    assert metrics["variants"]["prima"]["missing"] == [[0, 0], [1, 0]]
    assert "prima" not in metrics["sets"]["all"]["headline"]["models"]
    page = (Path(broken.out) / "report.html").read_text()
    assert "No answer in fold 0, fold 1: PRIMA. All variants are compared on what they share." in page


def test_a_missing_parent_keeps_its_children_from_running(make_study: Make) -> None:
    raw = make_study().model_dump(mode="json")
    raw["recipes"]["photos"]["change"] = {"max_steps": 2, "optimizer.lr": 1e12, "optimizer.clip_norm": None}
    with pytest.raises(PrimaError, match=r"2 of 8 runs failed, and 6 that need them were not run; the first, photos"):
        run_study(make_study(recipes=raw["recipes"]))


def test_a_search_looks_at_no_test_fold(study: StudyConfig, tmp_path: Path) -> None:
    index = ExamIndex.read(str(study.inputs.shards))
    search = study.model_copy(
        update={
            "out": str(tmp_path / "search"),
            "cells": str(Path(study.out).parent / "cells"),
            "scored_on": "validation",
        }
    )
    run_study(search)
    metrics = read_json(tmp_path / "search" / "metrics.json")
    assert list(metrics["sets"]) == ["validation"]
    record = metrics["sets"]["validation"]
    by_fold = [item["scores"][item["chosen"]] for item in metrics["choices"]["prima"]]
    assert record["headline"]["over_folds"]["prima"]["macro_f1"]["values"] == pytest.approx(by_fold)
    assert record["num_exams"] == sum(len(labelled_roles(index, split="patient", fold=fold).val) for fold in (0, 1))
    assert "no test fold was looked at" in (tmp_path / "search" / "report.html").read_text()
    assert metrics["claims"][0]["sets"]["validation"]["verdicts"]


def test_the_command_line(tmp_path: Path, labelled_shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    variants = {
        "one": {"kind": "metadata", "title": "one"},
        "two": {"kind": "metadata", "title": "two", "model": "gradient_boosting"},
    }
    path = write_study(tmp_path / "given", labelled_shards, variants=variants, ours="one")
    assert main(["study", str(path), "--set", f"out={tmp_path / 'there'}"]) == 0
    assert capsys.readouterr().out == f"run: {tmp_path / 'there'}\n"
    assert main(["study", str(path), "--set", f"out={tmp_path / 'there'}", "--set", "split=lesion"]) == 2
    assert "it differs in split" in capsys.readouterr().err
    raw = json.dumps({"one": {**variants["one"], "candidates": [{"c": 1}]}, "two": variants["two"]})
    assert main(["study", str(path), "--set", f"out={tmp_path / 'other'}", "--set", f"variants={raw}"]) == 2
    assert "logistic_regression has no option 'c'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": 1.0}, "logistic_regression has no option 'c'"),
        ({"C": -1.0}, r"variants.metadata: logistic_regression with {'C': -1.0}: The 'C' parameter"),
    ],
)
def test_options_that_no_classifier_takes_are_told_before_anything_is_trained(
    make_study: Make, options: dict[str, float], message: str
) -> None:
    variants = make_study().model_dump(mode="json")["variants"]
    variants["metadata"]["candidates"] = [{}, options]
    study = make_study(variants=variants)
    with pytest.raises(PrimaError, match=message):
        run_study(study)
    assert not (Path(study.out).parent / "cells").exists()


@pytest.fixture
def data(labelled_shards: str) -> FoldData:
    index = ExamIndex.read(labelled_shards)
    return FoldData(index, labelled_roles(index, split="patient", fold=0), 0, "macro_f1")


def test_late_fusion_adds_log_probabilities_by_the_weights_that_are_best_on_validation(data: FoldData) -> None:
    rng = np.random.default_rng(0)

    def said(sharp: float) -> Answers:
        def of(rows: Any) -> Any:
            scores = sharp * np.eye(3)[data.index.labels[rows]] + rng.normal(size=(len(rows), 3))
            return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)

        test = of(data.roles.test)
        return Answers(of(data.roles.val), test, test, test[data.photo_rows], 0, ())

    right, noise = said(9.0), said(0.0)
    variant = LateFusionVariant(title="late", of=("a", "b"), candidates=((0, 1), (1, 0.5)))
    found = late_fusion_answers(variant, [right, noise], data)
    assert (found.chosen, found.scores[1]) == (1, 1.0)
    wanted = right.test * np.sqrt(noise.test)
    np.testing.assert_allclose(found.test, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("refit", [True, False])
def test_a_classifier_of_attributes_is_chosen_on_validation_and_learns_from_it_afterwards(
    data: FoldData, refit: bool
) -> None:
    variant = MetadataVariant(title="lr", candidates=({"C": 1e-6}, {"C": 1.0}), refit=refit)
    found = metadata_answers(variant, data)
    assert found.scores[found.chosen] == max(found.scores)
    from prima_ray.evaluation.baselines import metadata_baseline

    learned = np.sort(np.concatenate([data.roles.train, data.roles.val])) if refit else data.roles.train
    model = metadata_baseline("", data.index.manifest.data_set, options=variant.candidates[found.chosen])
    assert model is not None
    index = data.index
    test = index.attribute_rows(data.roles.test)
    wanted = model.fit_predict(index.attribute_rows(learned), index.labels[learned], test, 3)
    np.testing.assert_allclose(found.test, wanted)
    assert found.photos.shape == (int(index.num_images[data.roles.test].sum()), 3)
