"""The frame of training stages around a toy task, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.data.plan import ExamIndex
from prima_ray.data.views import ViewConfig
from prima_ray.inference.bundle import Bundle, save_bundle
from prima_ray.models.image_tower import ImageTowerConfig
from prima_ray.stages import training as training_module
from prima_ray.stages.rundir import finish_run, open_run
from prima_ray.stages.training import Plan, Trained, check_pixels, feature_root, predict_held_out, run_training
from prima_ray.training.checkpoint import load_best
from prima_ray.training.config import TrainingConfig
from tests.conftest import write_toy_shards
from tests.unit.training.toys import Classify, Net, make_config, read_lines


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five folds: every class trains."""
    return write_toy_shards(tmp_path_factory.mktemp("five") / "shards", num_folds=5)


def run(config: TrainingConfig, shards: str, *, labelled: bool = True, fail: bool = False) -> Path:
    def save(trained: Trained) -> dict[str, Any]:
        if fail:
            raise RuntimeError("the disk is full")
        assert isinstance(trained.model, Net)
        assert not trained.model.training
        chosen, _ = load_best(trained.plan.run.path / "checkpoints")
        torch.testing.assert_close(trained.model.first.weight.data, chosen["param/first.weight"], rtol=0, atol=0)
        return dict(predict_held_out(trained, config).figures)

    def make_task(plan: Plan) -> Classify:
        return Classify(plan.index.manifest.data_set)

    return run_training(
        config, stage="toy", shards=shards, inputs={}, make_task=make_task, save=save, labelled=labelled
    )


def config_at(out: Path, **keys: Any) -> TrainingConfig:
    return make_config(out=str(out), split="lesion", context={"kind": "local", "device": "cpu"}, **keys)


def test_a_run_directory_holds_what_its_readers_want(tmp_path: Path, shards: str):
    config = config_at(tmp_path / "run", fold=1)
    path = run(config, shards)
    metrics = json.loads((path / "metrics.json").read_text())
    assert metrics.keys() == {"stage", "best_step", "val", "test"}
    assert metrics["stage"] == "toy"
    assert metrics["test"].keys() == {"loss", "weighted_loss", "accuracy", "balanced_accuracy", "macro_f1"}
    record = json.loads((path / "run.json").read_text())
    assert record["inputs"].keys() == {"shards"}
    assert record["seed"] == 0
    table = pq.read_table(path / "predictions.parquet")
    assert table.column_names == [
        *("exam_id", "label", "fold", "prediction", "prob_BCC", "prob_NEV", "prob_SEK")
    ]  # fmt: skip
    # The fold after the test fold validates; exams without a diagnosis are left out.
    folds = table["fold"].to_pylist()
    assert set(folds) == {1, 2}
    assert None not in table["label"].to_pylist()
    right = [
        label == guess
        for label, guess, fold in zip(table["label"].to_pylist(), table["prediction"].to_pylist(), folds, strict=True)
        if fold == 1
    ]
    assert metrics["test"]["accuracy"] == pytest.approx(sum(right) / len(right))
    sums = sum(table[f"prob_{name}"].to_numpy() for name in ("BCC", "NEV", "SEK"))
    assert sums == pytest.approx(1.0, abs=1e-6)


def test_a_finished_run_is_returned_and_another_config_is_refused(tmp_path: Path, shards: str):
    config = config_at(tmp_path / "run", max_steps=2)
    run(config, shards)
    assert run(config, shards, fail=True) == tmp_path / "run"
    # Where and how fast it runs may change, what it trains may not.
    assert run(config_at(tmp_path / "run", max_steps=2, micro_batch=2), shards, fail=True) == tmp_path / "run"
    with pytest.raises(PrimaError) as caught:
        run(config_at(tmp_path / "run", max_steps=3), shards)
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: `out` holds a run of another config; it differs in max_steps\n"
        "  Choose another `out`, or delete the folder if the run is not needed."
    )


def test_a_finished_run_that_lost_a_file_is_not_called_finished(tmp_path: Path, shards: str):
    config = config_at(tmp_path / "run", max_steps=2)
    path = run(config, shards)
    aside = (path / "predictions.parquet").rename(path / "aside")
    with pytest.raises(PrimaError) as caught:
        run(config, shards)
    assert str(caught.value) == (
        f"{path / 'predictions.parquet'}: this file of the run is missing\n"
        "  Copy the run again, or delete the folder and run its stage again."
    )
    aside.rename(path / "predictions.parquet")
    (path / "run.json").write_text("{")
    with pytest.raises(PrimaError, match="not valid JSON"):
        run(config, shards)


def test_a_parent_whose_weights_were_replaced_is_refused(tmp_path: Path):
    config = config_at(tmp_path / "run", max_steps=2)
    parent = open_run(config, out=str(tmp_path / "align"), stage="align")
    weights = parent.path / "model" / "image_tower" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    finish_run(parent, seed=0, inputs={})
    weights.write_bytes(b"weightz")
    with pytest.raises(PrimaError) as caught:
        training_module.run_training(
            config,
            stage="fuse",
            shards="never read",
            inputs={"align": str(parent.path)},
            make_task=lambda plan: pytest.fail(str(plan)),
            save=lambda trained: {},
            labelled=True,
        )
    assert str(caught.value) == (
        f"{weights}: is not the file that the run wrote (checksum)\n  Copy the run again, or train it again."
    )


def test_what_failed_after_training_is_made_up_for_without_training(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch
):
    config = config_at(tmp_path / "run", max_steps=2)
    with pytest.raises(RuntimeError, match="the disk is full"):
        run(config, shards, fail=True)
    assert not (tmp_path / "run" / "run.json").exists()

    def launch(job: object) -> None:
        raise AssertionError("training was over")

    monkeypatch.setattr(training_module, "launch", launch)
    assert (run(config, shards) / "run.json").exists()


def test_fold_none_trains_on_every_fold_and_predicts_none(tmp_path: Path, shards: str):
    path = run(config_at(tmp_path / "run", fold="none", epochs=1, log_exam_ids=True), shards)
    seen = [exam for line in read_lines(path / "steps.jsonl") for exam in line["exam_ids"]]
    assert len(seen) == len(set(seen)) == 20  # 23 exams, three without a diagnosis
    assert json.loads((path / "metrics.json").read_text()) == {"stage": "toy", "best_step": 4, "val": {}}
    assert pq.read_table(path / "predictions.parquet").num_rows == 0


def test_exams_without_a_diagnosis_train_where_no_label_is_needed(tmp_path: Path, shards: str):
    config = config_at(tmp_path / "run", epochs=1, fold="none", log_exam_ids=True)
    path = run(config, shards, labelled=False)
    assert len([exam for line in read_lines(path / "steps.jsonl") for exam in line["exam_ids"]]) == 23


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fold": 5}, "{shards}: fold: there is no fold 5\n  Folds are 0 to 4."),
        ({"fold": 0, "val_fold": 7}, "{shards}: val_fold: there is no fold 7\n  Folds are 0 to 4."),
    ],
)
def test_a_fold_that_is_not_there(tmp_path: Path, shards: str, keys: dict[str, Any], message: str):
    with pytest.raises(PrimaError) as caught:
        run(config_at(tmp_path / "run", **keys), shards)
    assert str(caught.value) == message.format(shards=shards)
    # The mended config finds no run of another one.
    assert not (tmp_path / "run").exists()


def test_a_metric_that_the_task_does_not_report_is_found_before_training(tmp_path: Path, shards: str):
    with pytest.raises(PrimaError) as caught:
        run(config_at(tmp_path / "run", selection={"metric": "acuracy", "mode": "max"}), shards)
    assert str(caught.value) == (
        "selection.metric is 'acuracy', which classify does not report\n"
        "  It reports accuracy, balanced_accuracy, loss, macro_f1, weighted_loss."
    )
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there(tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PrimaError) as caught:
        run(make_config(out=str(tmp_path / "run"), context={"kind": "local", "device": "cuda"}), shards)
    assert str(caught.value) == ("context.device is cuda, but torch finds no GPU here\n  Set it to auto or cpu.")
    assert not (tmp_path / "run").exists()


def test_a_validation_fold_without_exams_is_refused(tmp_path: Path):
    # Two exams, one fold each, and the third fold empty.
    shards = write_toy_shards(tmp_path / "shards", num_exams=2, num_folds=3)
    with pytest.raises(PrimaError) as caught:
        run(config_at(tmp_path / "run", fold=1), shards)
    assert str(caught.value) == f"{shards}: the validation fold holds no exams\n  Choose another `val_fold`."


def test_features_lie_beside_the_run_or_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert feature_root(make_config(out="runs/a")) == str(tmp_path / "runs" / "features")
    assert feature_root(make_config(out="runs/a", feature_cache="cache")) == str(tmp_path / "cache")
    assert feature_root(make_config(out="runs/a", feature_cache="s3://bucket/cache")) == "s3://bucket/cache"
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(PrimaError) as caught:
            feature_root(make_config(out="runs/a", feature_cache=name))
        assert str(caught.value) == (
            f"{tmp_path / 'file'}: feature_cache: this is a file\n  Name a folder in feature_cache."
        )


def test_pixels_are_normalised_as_the_parent_run_had_them(tmp_path: Path, shards: str):
    model = tmp_path / "align" / "model"
    model.mkdir(parents=True)
    data_set = ExamIndex.read(shards).manifest.data_set
    views = ViewConfig(mean=(0.5, 0.5, 0.5))
    save_bundle(
        model,
        Bundle.of(kind="align", data_set=data_set, text=None, views=views, features="projected", components={}),
    )
    check_pixels(views, parents=[str(tmp_path / "align")])
    with pytest.raises(PrimaError) as raised:
        check_pixels(ViewConfig(), parents=[str(tmp_path / "align")])
    assert str(raised.value) == (
        f"{tmp_path / 'align'}: views.mean [0.485, 0.456, 0.406] and views.std [0.229, 0.224, 0.225] are not those of "
        "this run, [0.5, 0.5, 0.5] and [0.229, 0.224, 0.225]\n  Set them alike."
    )


def test_pixels_unlike_those_of_published_weights_are_told(caplog: pytest.LogCaptureFixture):
    # Published with mean and deviation 0.5.
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    check_pixels(ViewConfig(), tower=ImageTowerConfig(name=name))
    half = (0.5, 0.5, 0.5)
    check_pixels(ViewConfig(mean=half, std=half), tower=ImageTowerConfig(name=name, pretrained=True))
    assert caplog.messages == []
    check_pixels(ViewConfig(), tower=ImageTowerConfig(name=name, pretrained=True))
    assert caplog.messages == [
        f"warning: {name} was trained on pixels of mean [0.5, 0.5, 0.5] and deviation [0.5, 0.5, 0.5]: "
        "set views.mean and views.std to them"
    ]


def test_predictions_that_cannot_be_written_leave_nothing(tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch):
    def full(table: Any, where: Any) -> None:
        del table
        if isinstance(where, str | Path):
            Path(where).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        run(config_at(tmp_path / "run", fold=1), shards)
    assert not list((tmp_path / "run").glob("*predictions*"))
