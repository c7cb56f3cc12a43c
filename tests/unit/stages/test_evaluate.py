from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from prima_ray.base import PrimaError, hash_file, read_json, write_json
from prima_ray.cli import main
from prima_ray.config import load_config
from prima_ray.data.description import DataSetConfig
from prima_ray.data.plan import ExamIndex, split_roles
from prima_ray.data.schema import MANIFEST, read_manifest
from prima_ray.evaluation.baselines import metadata_baselines
from prima_ray.evaluation.operating import positive_classes
from prima_ray.evaluation.subgroups import find_subgroups
from prima_ray.inference.predictor import Predictor
from prima_ray.stages import evaluate
from prima_ray.stages import row_sets as row_sets_module
from prima_ray.stages.evaluate import EvaluateConfig, run_evaluate
from prima_ray.stages.ingest import IngestConfig
from prima_ray.stages.row_sets import photo_set, row_sets
from tests.conftest import describe_file, train_tiny

OURS = "PRIMA (photos and attributes)"


@pytest.fixture
def run(tiny_fuse: Path, tmp_path: Path) -> Path:
    """A run of one's own, to damage. It is another folder than the run was trained in."""
    return Path(shutil.copytree(tiny_fuse, tmp_path / "moved"))


def test_figures_of_a_moved_run(run: Path, labelled_shards: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "prima_ray")
    assert run_evaluate(str(run), config=EvaluateConfig(num_resamples=50)) == run / "evaluation"
    found = json.loads((run / "evaluation" / "metrics.json").read_text())
    index = ExamIndex.read(labelled_shards)
    test = np.flatnonzero((index.patient_fold == 0) & (index.labels >= 0))
    assert found["stage"] == "fuse"
    assert found["model"] == OURS
    assert (found["fold"], found["num_folds"], found["split"], found["level"]) == (0, 4, "patient", 0.95)
    assert found["num_resamples"] == 50
    assert found["shards_hash"] == index.manifest.content_hash
    assert found["classes"] == ["BCC", "NEV", "SEK"]
    assert list(found["sets"]) == ["all", "complete", "masked"]
    # Against scikit-learn, from the run's own predictions.
    rows = {row["exam_id"]: row for row in pq.read_table(run / "predictions.parquet").to_pylist()}
    mine = [rows[exam] for exam in index.exam_ids[test]]
    truth, predicted = [row["label"] for row in mine], [row["prediction"] for row in mine]
    whole = found["sets"]["all"]
    assert (whole["num_exams"], whole["num_patients"]) == (len(test), len(set(index.patient_ids[test])))
    figures = whole["models"][OURS]
    assert figures["accuracy"]["value"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert figures["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(truth, predicted))
    assert figures["macro_f1"]["value"] == pytest.approx(sk.f1_score(truth, predicted, average="macro"))
    assert figures["accuracy"]["low"] <= figures["accuracy"]["value"] <= figures["accuracy"]["high"]
    assert found["confusion"] == sk.confusion_matrix(truth, predicted, labels=found["classes"]).tolist()
    assert [row["num_exams"] for row in found["per_class"]] == [truth.count(name) for name in found["classes"]]
    complete = [("age" in dict(row)) for row in index.attributes.take(pa.array(test)).to_pylist()]
    assert found["sets"]["complete"]["num_exams"] == sum(complete)
    assert found["per_photo"]["num_exams"] == index.num_images[test].sum()
    for name, rival in whole["models"].items():
        if name != OURS:
            gap = whole["differences"][name]["accuracy"]["value"]
            assert gap == pytest.approx(figures["accuracy"]["value"] - rival["accuracy"]["value"])
    assert list(found["baselines"]) == list(whole["differences"])
    html = (run / "evaluation" / "report.html").read_text()
    assert "Test fold 0 of 4" in html
    assert "photos and attributes" in html
    assert "All exams: 10 exams of 5 patients" in caplog.text


@pytest.fixture(scope="module")
def evidence(tiny_fuse: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """`metrics.json` and the page of an evaluation with everything in it."""
    config = EvaluateConfig.model_validate(
        {
            "num_resamples": 20,
            "positive": ["BCC", "SEK"],
            "coverages": [0.5, 1.0],
            "subgroups": {"attributes": ["itch", "age"], "bands": {"age": [30]}, "min_exams": 4},
            "robustness": {"enabled": True, "drop_rates": [0.5], "blur": [], "darken": [0.25], "crop": [], "jpeg": []},
        }
    )
    target = run_evaluate(str(tiny_fuse), out=str(tmp_path_factory.mktemp("evidence") / "report"), config=config)
    return read_json(Path(target) / "metrics.json"), (Path(target) / "report.html").read_text()


def test_a_group_of_classes_against_the_rest(evidence: tuple[dict[str, Any], str], tiny_fuse: Path) -> None:
    found, html = evidence
    rows = [row for row in pq.read_table(tiny_fuse / "predictions.parquet").to_pylist() if row["label"]]
    test, val = ([row for row in rows if row["fold"] == fold] for fold in (0, 1))
    truth, scores = [row["label"] != "NEV" for row in test], [row["prob_BCC"] + row["prob_SEK"] for row in test]
    whole = found["sets"]["all"]["operating"]
    assert (found["positive"], whole["num_positive"]) == (["BCC", "SEK"], sum(truth))
    assert whole["models"][OURS]["auroc"]["value"] == pytest.approx(sk.roc_auc_score(truth, scores))
    assert found["per_photo"]["operating"]["models"][OURS]["auroc"]["low"] is not None
    # Of the validation fold, whose NEV are all below the threshold: there are fewer than ten of them.
    limit = max(row["prob_BCC"] + row["prob_SEK"] for row in val if row["label"] == "NEV")
    threshold = whole["thresholds"][0]
    assert threshold["score"] == pytest.approx(limit)
    caught = [score > limit for score, right in zip(scores, truth, strict=True) if right]
    assert threshold["sensitivity"]["value"] == pytest.approx(np.mean(caught))
    assert "BCC, SEK against the rest" in html


def test_calibration_is_what_training_measured(evidence: tuple[dict[str, Any], str], tiny_fuse: Path) -> None:
    """Training scored the logits; here the temperature is undone from what was written."""
    found, html = evidence[0]["calibration"], evidence[1]
    wanted = read_json(tiny_fuse / "metrics.json")["calibration"]["test"]
    for model, moment in ((OURS, "after"), ("before the temperature", "before")):
        for figure, value in wanted[moment].items():
            assert found["figures"]["models"][model][figure]["value"] == pytest.approx(value)
    assert found["sets"]["coverage"]["value"] == pytest.approx(wanted["sets"]["coverage"])
    assert found["sets"]["mean_set_size"]["value"] == pytest.approx(wanted["sets"]["mean_set_size"])
    accuracy = evidence[0]["sets"]["all"]["models"][OURS]["accuracy"]["value"]
    assert found["figures"]["models"][OURS]["accuracy_at_1"]["value"] == pytest.approx(accuracy)
    assert found["curve"]["risk"][-1] == pytest.approx(1 - accuracy)
    assert "Can the probabilities be believed?" in html


def test_subgroups_are_counted_and_small_ones_not_judged(
    evidence: tuple[dict[str, Any], str], labelled_shards: str
) -> None:
    found, html = evidence
    index = ExamIndex.read(labelled_shards)
    rows = index.attribute_rows(np.flatnonzero((index.patient_fold == 0) & (index.labels >= 0)))
    groups = {(item["attribute"], item["value"]): item for item in found["subgroups"]}
    assert groups["itch", "yes"]["num_exams"] == sum(row["itch"] == "true" for row in rows)
    assert groups["age", "below 30 years"]["num_exams"] == sum(float(row.get("age", 99)) < 30 for row in rows)
    assert groups["metadata", "a block is missing"]["num_exams"] == sum("age" not in row for row in rows)
    for item in found["subgroups"]:
        assert (item["figures"] is None) == (item["num_exams"] < 4)
    assert "too few" in html


def test_exams_are_altered(evidence: tuple[dict[str, Any], str], tiny_fuse: Path, labelled_shards: str) -> None:
    found, html = evidence
    conditions = {item["name"]: item for item in found["robustness"]["conditions"]}
    assert list(conditions) == ["as they are", "drop_0.5", "pattern", "no_attributes", "darken_0.25", "no_photos"]
    whole = found["sets"]["all"]["models"][OURS]
    assert conditions["as they are"]["figures"] == whole
    index, roles = parts(tiny_fuse, labelled_shards)
    tables = row_sets_module.shard_tables(index, roles.test)
    names = index.manifest.data_set.attribute_names
    bare = Predictor.load(tiny_fuse).predict_tables(tables, masked=names)
    wanted = sk.accuracy_score(index.labels[roles.test], bare.argmax(axis=1))
    assert conditions["no_attributes"]["figures"]["accuracy"]["value"] == pytest.approx(wanted)
    assert "photos with 25% of their light" in html


def test_a_planted_leak_is_caught(run: Path, labelled_shards: str, tmp_path: Path) -> None:
    """A patient of the test fold has an exam in another fold as well."""
    shards = Path(shutil.copytree(labelled_shards, tmp_path / "shards"))
    table = pq.read_table(shards / "folds.parquet").to_pylist()
    # Patients p000 and p004 are in fold 0, each with two exams.
    for row in table:
        if row["exam_id"] in ("e001", "e009"):
            row["patient"] = 2
    pq.write_table(pa.Table.from_pylist(table, pq.read_schema(shards / "folds.parquet")), shards / "folds.parquet")
    manifest = read_json(shards / MANIFEST)
    manifest["side_files"][0] |= describe_file(shards, "folds.parquet", len(table)).model_dump()
    write_json(shards / MANIFEST, manifest)
    assert message(on_other_shards(run, str(shards))) == (
        f"{run}: a leak: 2 patients (p000, p004) among those that it is scored on and among those that it was trained "
        "on\n  Its figures say nothing about new patients. Make the folds anew and train again."
    )


def test_the_shipped_config_fits_its_data_set() -> None:
    folder = Path(__file__).parents[3] / "jobs/configs/pad_ufes_20"
    config = load_config(EvaluateConfig, folder / "evaluate.yaml")
    data_set = load_config(IngestConfig, folder / "ingest.yaml").data_set
    rows = [{"age": "61", "fitspatrick": "2", "gender": "FEMALE"}, {"age": "39"}]
    groups = find_subgroups(rows, [], data_set, config.subgroups)
    found = {(item.attribute, item.value): item.members.tolist() for item in groups}
    assert found["fitspatrick", "II"] == [True, False]
    assert found["age", "below 40 years"] == [False, True]
    assert found["metadata", "complete"] == [True, False]
    names = data_set.class_names
    assert [names[place] for place in positive_classes(data_set, config.positive)] == ["BCC", "MEL", "SCC"]


def test_wrong_keys_are_told_before_the_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "row_sets", None)
    wrong = EvaluateConfig.model_validate({"subgroups": {"attributes": ["regoin"]}})
    said = "subgroups.attributes: toy has no attribute 'regoin'\n  Did you mean 'region'?"
    assert message(run, config=wrong) == said
    assert message(run, config=EvaluateConfig(positive=("MEL",))).startswith("positive: toy has no class 'MEL'")


def parts(run: Path, shards: str) -> tuple[ExamIndex, Any]:
    index = ExamIndex.read(shards)
    roles = split_roles(index, fold=0, val_fold=None, split="patient")
    labelled = type(roles)(*(rows[index.labels[rows] >= 0] for rows in (roles.train, roles.val, roles.test)))
    return index, labelled


def test_baselines_learn_on_everything_but_the_test_fold(tiny_fuse: Path, labelled_shards: str) -> None:
    index, roles = parts(tiny_fuse, labelled_shards)
    whole = row_sets(tiny_fuse, index, roles, model="ours", load=lambda: Predictor.load(tiny_fuse))[0]
    others = np.setdiff1d(np.flatnonzero(index.labels >= 0), roles.test)
    for baseline in metadata_baselines(index.manifest.data_set):
        wanted = baseline.fit_predict(
            index.attribute_rows(others), index.labels[others], index.attribute_rows(roles.test), 3
        )
        assert whole.probabilities[baseline.title] == pytest.approx(wanted)


def test_the_masked_set_hides_the_block_from_everybody(tiny_fuse: Path, labelled_shards: str) -> None:
    """What an exam without the block gets in `all`, it gets in `masked` too; the others lose it."""
    index, roles = parts(tiny_fuse, labelled_shards)
    whole, complete, masked = row_sets(tiny_fuse, index, roles, model="ours", load=lambda: Predictor.load(tiny_fuse))
    without = np.array(["age" not in row for row in index.attribute_rows(roles.test)])
    assert 0 < without.sum() < len(without)
    assert (complete.rows == roles.test[~without]).all()
    for name, found in whole.probabilities.items():
        assert masked.probabilities[name][without] == pytest.approx(found[without], abs=1e-6)
        assert (complete.probabilities[name] == found[~without]).all()
    assert (np.abs(masked.probabilities["ours"] - whole.probabilities["ours"])[~without].max(axis=1) > 1e-6).all()
    blind = "logistic regression, without the blocks"
    assert masked.probabilities[blind] == pytest.approx(whole.probabilities[blind])


def test_photo_by_photo(tiny_fuse: Path, labelled_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, roles = parts(tiny_fuse, labelled_shards)
    predictor = Predictor.load(tiny_fuse)
    whole = row_sets(tiny_fuse, index, roles, model="ours", load=lambda: predictor)[0]
    photos = photo_set(whole, index, model="ours", load=lambda: predictor)
    assert photos is not None
    counts = index.num_images[roles.test]
    assert photos.rows.tolist() == np.repeat(roles.test, counts).tolist()
    single = np.repeat(counts, counts) == 1
    assert photos.probabilities["ours"][single] == pytest.approx(whole.probabilities["ours"][counts == 1], abs=1e-6)
    assert photos.probabilities["ours"].shape == (counts.sum(), 3)
    rows = whole.rows[counts == 1]
    alone = row_sets_module.RowSet("all", "", "", rows, {"ours": whole.probabilities["ours"][counts == 1]})
    assert photo_set(alone, index, model="ours", load=lambda: predictor) is None


def test_photos_alone_are_not_touched_by_the_mask(tiny_finetune: Path, tmp_path: Path) -> None:
    target = run_evaluate(str(tiny_finetune), out=str(tmp_path / "report"), config=EvaluateConfig(num_resamples=5))
    assert target == tmp_path / "report"
    assert not (tiny_finetune / "evaluation").exists()
    found = read_json(target / "metrics.json")
    assert found["model"] == "photos alone"
    assert found["sets"]["masked"]["models"]["photos alone"] == found["sets"]["all"]["models"]["photos alone"]


# ---------------------------------------------------------------------------------------------------- odd data


def relabelled(shards: str, folder: Path, label: Mapping[int, str | None], **data_set: Any) -> str:
    """The shards with other labels by row, one patient a fold, and perhaps another description."""
    import hashlib

    shutil.copytree(shards, folder)
    manifest = read_json(folder / MANIFEST)
    manifest["data_set"] = DataSetConfig.model_validate({**manifest["data_set"], **data_set}).model_dump(mode="json")
    start = 0
    for file in manifest["files"]:
        table = pq.read_table(folder / file["path"])
        labels = table["label"].to_pylist()
        labels = [label.get(start + position, name) for position, name in enumerate(labels)]
        column = table.schema.get_field_index("label")
        table = table.set_column(column, "label", pa.array(labels, pa.string()))
        pq.write_table(table, folder / file["path"], row_group_size=3)
        data = (folder / file["path"]).read_bytes()
        file.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        start += file["rows"]
    write_json(folder / MANIFEST, manifest)
    return str(folder)


def on_other_shards(run: Path, shards: str) -> Path:
    record = read_json(run / "run.json")
    record["inputs"]["shards"] = {"path": shards, "hash": read_manifest(shards).content_hash}
    write_json(run / "run.json", record)
    return run


def test_a_test_fold_without_a_class_and_without_labels(run: Path, labelled_shards: str, tmp_path: Path) -> None:
    index = ExamIndex.read(labelled_shards)
    test = np.flatnonzero(index.patient_fold == 0)
    gone = {int(row): None for row in test if index.labels[row] == 2}
    on_other_shards(run, relabelled(labelled_shards, tmp_path / "shards", gone))
    found = read_json(run_evaluate(str(run), config=EvaluateConfig(num_resamples=10)) / "metrics.json")
    assert found["sets"]["all"]["num_exams"] == int(np.isin(index.labels[test], [0, 1]).sum())
    row = found["per_class"][2]
    assert (row["num_exams"], row["recall"], row["f1"], row["auroc"]) == (0, None, None, None)
    html = (run / "evaluation" / "report.html").read_text()
    assert "The test fold has no exam of SEK: averages run over the other classes." in html
    nobody = {int(row): None for row in test}
    shards = relabelled(labelled_shards, tmp_path / "nobody", nobody)
    with pytest.raises(PrimaError) as caught:
        run_evaluate(str(on_other_shards(run, shards)))
    assert str(caught.value) == f"{shards}: no exam of the test fold 0 has a diagnosis"


def test_one_patient_of_one_class_and_no_attributes(run: Path, labelled_shards: str, tmp_path: Path) -> None:
    index = ExamIndex.read(labelled_shards)
    others = {int(row): None for row in np.flatnonzero(index.patient_fold == 0)[1:]}
    shards = relabelled(labelled_shards, tmp_path / "shards", others, attributes=[], blocks=[])
    found = read_json(
        run_evaluate(str(on_other_shards(run, shards)), config=EvaluateConfig(num_resamples=10)) / "metrics.json"
    )
    whole = found["sets"]["all"]
    assert (list(found["sets"]), found["baselines"], whole["num_exams"]) == (["all"], {}, 1)
    assert whole["models"][OURS]["accuracy"]["value"] in (0, 1)
    assert whole["models"][OURS]["accuracy"]["low"] is None
    assert whole["models"][OURS]["auroc"]["value"] is None
    html = (run / "evaluation" / "report.html").read_text()
    assert "There is no metadata-only baseline to compare with." in html
    assert "All exams are of one patient: there is nothing to draw intervals from." in html


# ---------------------------------------------------------------------------------------------------- mistakes


def message(run: Path | str, **options: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        run_evaluate(str(run), **options)
    return str(caught.value)


def test_a_model_of_every_fold_has_nothing_to_be_scored_on(
    labelled_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_tiny("finetune", labelled_shards, tmp_path / "final", fold="none", max_steps=2)
    metrics = read_json(run / "metrics.json")
    assert "test" not in metrics
    assert "val" in metrics
    assert pq.read_table(run / "predictions.parquet").num_rows == 0
    Predictor.load(run)
    assert main(["evaluate", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-2:] == [
        f"prima: {run}: this run trained on every fold (fold: none): no exam is held out to score it on",
        "  Score a run of the same config with a test fold; the data it saw says nothing about new patients.",
    ]


def test_replaced_shards_are_told_and_moved_ones_found(run: Path, labelled_shards: str, tmp_path: Path) -> None:
    other = relabelled(labelled_shards, tmp_path / "other", {0: "NEV"})
    hashes = [read_manifest(item).content_hash[:12] for item in (other, labelled_shards)]
    replaced = (
        f"{other}: these are not the shards that the run was trained on: content hash {hashes[0]}, the run's record "
        f"says {hashes[1]}\n  Their folds may differ, so test exams may have been trained on. "
        "Name the right ones with --shards."
    )
    assert message(run, shards=other) == replaced
    record = read_json(run / "run.json")
    gone = str(tmp_path / "gone")
    record["inputs"]["shards"]["path"] = gone
    write_json(run / "run.json", record)
    assert message(run) == f"{gone}: the run's shards are no longer here\n  Say where they are: --shards FOLDER."
    assert message(run, shards=gone).startswith(f"{gone}: no finished shard folder here")
    assert run_evaluate(str(run), shards=labelled_shards, config=EvaluateConfig(num_resamples=2)).is_dir()


def test_a_missing_file_is_named(run: Path) -> None:
    for name in ("predictions.parquet", "model/fusion/model.safetensors", "model/config.json"):
        aside = (run / name).rename(run / "aside")
        assert (
            message(run) == f"{run / name}: this file of the run is missing\n  Copy the run again, or train it again."
        )
        aside.rename(run / name)
    (run / "config.yaml").unlink()
    assert message(run) == f"{run / 'config.yaml'}: no such config file"
    (run / "config.yaml").write_text("fold: 0\n")
    assert message(run) == f"{run / 'config.yaml'}: damaged: it has no key 'val_fold'"
    (run / "run.json").unlink()
    assert message(run).startswith(f"{run}: this is not finished (run.json is missing)")
    assert not (run / "evaluation").exists()


def test_damaged_predictions_are_told(run: Path) -> None:
    path = run / "predictions.parquet"
    table = pq.read_table(path)

    def said() -> str:
        """By a run whose record names the file as it is."""
        record = read_json(run / "run.json")
        record["outputs"][path.name] = hash_file(path)
        write_json(run / "run.json", {**record, "sizes": {}})
        return message(run)

    pq.write_table(table.slice(0, 1), path)
    assert said().startswith(f"{path}: ")
    assert "exams of the test fold have no prediction" in said()
    pq.write_table(table.drop_columns(["prob_NEV"]), path)
    assert said() == f"{path}: has no column prob_NEV"
    column = table.schema.get_field_index("prob_NEV")
    pq.write_table(table.set_column(column, "prob_NEV", pa.array([math.nan] * len(table))), path)
    assert said().startswith(f"{path}: holds probabilities that are not numbers (NaN)")
    path.write_bytes(b"x" * 100)
    assert said().startswith(f"{path}: cannot be read as Parquet (")


@pytest.mark.parametrize("name", ["predictions.parquet", "model/image_tower/model.safetensors", "model/config.json"])
def test_one_other_byte_is_noticed(run: Path, name: str) -> None:
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run / name).write_bytes(data)
    said = "is not the file that the run wrote (checksum)\n  Copy the run again, or train it again."
    assert message(run) == f"{run / name}: {said}"


def test_damaged_notes_of_the_training_are_told(run: Path) -> None:
    mend = "\n  Copy the run again, or train it again."
    with (run / "steps.jsonl").open("a") as file:
        file.write("[1]\n")
    assert message(run, config=EvaluateConfig(num_resamples=2)).startswith(f"{run / 'steps.jsonl'}: damaged: line ")
    record = read_json(run / "run.json")
    write_json(run / "run.json", {**record, "inputs": {}})
    assert message(run) == f"{run / 'run.json'}: damaged: its inputs do not name the shards{mend}"


def test_only_an_earlier_report_is_overwritten(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mend = "\n  Name a new folder, or the one of an earlier report."
    metrics = (run / "metrics.json").read_bytes()
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "metrics.json").write_text('{"mine": 1}')
    own = "--out is the run itself, whose metrics.json is another"
    foreign = "--out holds something that is no report of `prima evaluate`:"
    first_model_file = min(item.name for item in (run / "model").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "row_sets", None)  # refused before the work
        for out, what in (
            (run, own),
            (run / "model" / "..", own),
            (run / "model", f"{foreign} {first_model_file}"),
            (thesis, f"{foreign} metrics.json"),
            (run / "run.json", "--out is a file, not a folder"),
            (run / "run.json" / "x", "--out cannot be made (its folder is a file)"),
        ):
            assert message(run, out=str(out)) == f"{out}: {what}{mend}"
        assert main(["evaluate", str(run), "--out", str(run)]) == 2
    capsys.readouterr()
    assert (run / "metrics.json").read_bytes() == metrics
    assert [item.name for item in thesis.iterdir()] == ["metrics.json"]
    for out in (tmp_path / "new" / "report", tmp_path / "new" / "report"):
        assert run_evaluate(str(run), out=str(out), config=EvaluateConfig(num_resamples=2)) == out


def test_a_stage_that_does_not_diagnose_is_refused(run: Path) -> None:
    record = read_json(run / "run.json")
    write_json(run / "run.json", {**record, "stage": "ingest"})
    assert message(run) == f"{run}: a run of ingest does not diagnose\n  Name a run of `prima fuse`."
