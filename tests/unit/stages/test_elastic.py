from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prima_ray.cli import main
from prima_ray.config import load_config
from prima_ray.stages.align import AlignConfig
from prima_ray.stages.elastic import ElasticConfig
from tests.conftest import write_toy_shards

TRAINING: dict[str, Any] = {
    "global_batch": 7,
    "max_steps": 6,
    "split": "lesion",
    "views": {"image_size": 32, "num_views": 1},
    "image_tower": {"name": "resnet10t", "image_size": 32},
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    shards = write_toy_shards(tmp_path / "shards", num_folds=5)

    def write(events: list[dict[str, Any]], training: dict[str, Any] | None = None, **keys: Any) -> Path:
        inner = {"out": "unused", "inputs": {"shards": shards}, **TRAINING, **(training or {})}
        (tmp_path / "training.yaml").write_text(yaml.safe_dump(inner))
        outer = {
            "out": str(tmp_path / "out"),
            "stage": "finetune",
            "inputs": {"training": "training.yaml"},
            "schedule": {"kind": "listed", "events": events},
            **keys,
        }
        path = tmp_path / "elastic.yaml"
        path.write_text(yaml.safe_dump(outer))
        return path

    return write


def test_mistakes_are_said_before_anything_starts(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    event = {"at_step": 3, "event": "kill_worker"}
    assert main(["elastic", str(write([{**event, "event": "kill_wroker"}]))]) == 2
    assert capsys.readouterr().err == (
        f"prima: {tmp_path}/elastic.yaml: schedule.events.0.event: input should be 'add_node', 'remove_node', "
        "'kill_worker', 'drain_node' or 'kill_driver' (got 'kill_wroker')\n"
    )
    assert main(["elastic", str(write([]))]) == 2
    assert capsys.readouterr().err == (
        "prima: schedule.events is empty: nothing would happen\n  Name at least one event.\n"
    )
    assert main(["elastic", str(write([{**event, "at_step": 6}]))]) == 2
    assert capsys.readouterr().err == (
        "prima: schedule.events[0] (kill_worker at step 6) is after the end: the run has 6 steps\n"
        "  Lower at_step, or train longer.\n"
    )
    assert main(["elastic", str(write([event], num_workers=[3, 2]))]) == 2
    assert capsys.readouterr().err == (
        f"prima: {tmp_path}/elastic.yaml: num_workers: expected [min, max] from 1, got [3, 2]\n"
    )
    assert main(["elastic", str(write([event], training={"optimizer": {"lrr": 1}}))]) == 2
    assert "unknown key 'optimizer.lrr', did you mean 'optimizer.lr'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_preset_loads_and_its_training_too(monkeypatch: pytest.MonkeyPatch):
    from prima_ray.stages.elastic import _training_config

    config = load_config(ElasticConfig, Path(__file__).parents[3] / "jobs/configs/phantoms/elastic.yaml")
    training = _training_config(config)
    assert training.worker_range == config.num_workers
    assert training.log_exam_ids
    assert training.context.kind == "ray"
    assert training.context.cpus_per_worker == 1.5


def test_changes_of_the_training_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from prima_ray.stages.elastic import _training_config

    monkeypatch.chdir(tmp_path)
    path = Path(__file__).parents[3] / "jobs/configs/phantoms/elastic.yaml"
    training = _training_config(load_config(ElasticConfig, path, ["changes.inputs.shards=shards"]))
    assert isinstance(training, AlignConfig)
    assert (training.inputs.shards, training.inputs.corpus) == (str(tmp_path / "shards"), None)
