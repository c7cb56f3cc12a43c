from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.training.config import TrackingConfig
from prima_ray.training.tracking import Tracker, absolute_uri
from tests.unit.training.toys import read_lines

PARAMS: dict[str, Any] = {"task": "toy", "optimizer": {"lr": 0.1, "betas": [0.9, 0.999]}, "options": {}}


def track(run: Path, steps: range, *, uri: str | None = None, fail: bool = False) -> Tracker:
    """Figures of some steps, a validation after every second."""
    run.mkdir(exist_ok=True)
    with Tracker(run, TrackingConfig(mlflow_uri=uri), params=PARAMS, resume_step=steps.start - 1) as tracker:
        for step in steps:
            tracker.step({"step": step, "epoch": 0, "loss": 1.0 / step, "exam_ids": ["a"]})
            if step % 2 == 0:
                tracker.validation({"accuracy": step / 10}, step)
        if fail:
            raise KeyboardInterrupt
    return tracker


def read_board(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_every_figure_stands_in_the_event_files(tmp_path: Path):
    track(tmp_path, range(1, 5))
    board = read_board(tmp_path)
    assert board.keys() == {"train/loss", "val/accuracy"}
    assert board["train/loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 5)]
    assert board["val/accuracy"] == [(2, pytest.approx(0.2)), (4, pytest.approx(0.4))]
    assert read_lines(tmp_path / "steps.jsonl")[0] == {"step": 1, "epoch": 0, "loss": 1.0, "exam_ids": ["a"]}


def test_a_resumed_run_drops_the_steps_that_it_takes_again(tmp_path: Path):
    track(tmp_path, range(1, 5))
    assert track(tmp_path, range(3, 7)).num_replayed == 2
    assert [line["step"] for line in read_lines(tmp_path / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in read_board(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_half_a_line_is_dropped(tmp_path: Path):
    track(tmp_path, range(1, 3))
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write("[1]\n")
        file.write(json.dumps({"step": 3, "loss": 1})[:-3])
    track(tmp_path, range(3, 4))
    assert [line["step"] for line in read_lines(tmp_path / "steps.jsonl")] == [1, 2, 3]


def test_mlflow_has_config_and_figures_and_a_resumed_run_goes_on_in_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = absolute_uri("mlruns")
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        track(run, range(1, 5), uri=uri, fail=True)
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_run((run / "mlflow_run_id").read_text())
    assert found.info.status == "FAILED"
    track(run, range(5, 7), uri=uri)
    experiment = client.get_experiment_by_name("prima_ray")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params == {
        "task": "toy", "optimizer.lr": "0.1", "optimizer.betas": "[0.9, 0.999]", "options": "{}",
    }  # fmt: skip
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(item.step, item.value) for item in history] == [(step, 1 / step) for step in range(1, 7)]
    assert found.data.metrics["val/accuracy"] == 0.6


def test_an_mlflow_that_does_not_take_the_run_is_the_users_mistake(tmp_path: Path):
    pytest.importorskip("mlflow")
    with pytest.raises(PrimaError) as caught:
        track(tmp_path / "run", range(1, 2), uri="nonsense://server")
    assert caught.value.what.startswith("MLflow does not take the run (")
    assert caught.value.where == "nonsense://server"
    assert caught.value.mend == "Check tracking.mlflow_uri, or set it to null."


def test_a_stores_address_means_the_same_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert absolute_uri("mlruns") == f"{tmp_path}/mlruns"
    for same in ("sqlite:////a/b.db", "http://server:5000", "file:///a", "databricks"):
        assert absolute_uri(same) == same
