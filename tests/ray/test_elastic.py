"""`prima elastic` as a user calls it: real nodes, a real SIGKILL, 2 -> 1 -> 2 workers. And a shard that is damaged."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import write_toy_shards

pytest.importorskip("ray")
pytest.importorskip("deepspeed")

TOWER = {"name": "resnet10t", "image_size": 32}
STEPS, BATCH, PER_EPOCH = 75, 16, 3
EVENTS = [
    {"at_step": 5, "event": "remove_node"},
    {"at_step": 15, "event": "add_node"},
    {"at_step": 30, "event": "kill_worker", "after_checkpoint": 8},
]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config that `benchmarks/worker_grid.py` trains align by: LoRA and its dropout, augmentation, drop paths, a
    learnable temperature, clipping; phantoms, of which the last batch of an epoch is ragged."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    grid = importlib.import_module("worker_grid")
    folder = tmp_path_factory.mktemp("training")
    raw = grid.raw_config("align", grid.make_shards(folder), grid.make_models(folder), folder)
    del raw["context"]
    raw |= {
        "fold": 0,
        "global_batch": BATCH,
        "micro_batch": 3,
        "max_steps": STEPS,
        "checkpoint_every_steps": 25,
        "engine": {"kind": "deepspeed", "zero_stage": 1},
        # Training is stable at this rate; near its limit it magnifies rounding a thousandfold (docs/exactness.md).
        "optimizer": {"lr": 1e-3, "clip_norm": 0.5},
    }
    path = folder / "align.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.timeout(900)
def test_two_workers_one_and_two_again_and_a_kill_train_what_two_workers_train(training: Path, tmp_path: Path):
    out = tmp_path / "elastic"
    config = {
        "out": str(out),
        "inputs": {"training": str(training)},
        "num_workers": [1, 2],
        "schedule": {"kind": "listed", "events": EVENTS},
    }
    (tmp_path / "elastic.yaml").write_text(yaml.safe_dump(config))
    answer = subprocess.run(
        [sys.executable, "-m", "prima_ray.cli", "elastic", str(tmp_path / "elastic.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == f"run: {out}\n"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["world_sizes"] == [2, 1, 2, 2]
    assert metrics["engine"] == {"kind": "deepspeed", "zero_stage": 1, "world_size": 2}
    assert metrics["largest_loss_difference"] < 1e-4
    assert metrics["largest_answer_difference"] < 1e-3
    found = [json.loads((out / run / "metrics.json").read_text())["val"] for run in ("elastic", "fixed")]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert metrics["same_batches"]
    steps = read_lines(out / "elastic" / "steps.jsonl")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    ends = [sum(line["loss"] for line in part) / len(part) for part in (steps[:3], steps[-3:])]
    assert ends[1] < 0.7 * ends[0], "equal curves of a model that stands still would say nothing"
    # In each of the whole epochs each exam came once.
    exams = set(steps[0]["exam_ids"]).union(*(line["exam_ids"] for line in steps[:PER_EPOCH]))
    assert BATCH * (PER_EPOCH - 1) < len(exams) < BATCH * PER_EPOCH
    for epoch in range(STEPS // PER_EPOCH):
        seen = [exam for line in steps if line["epoch"] == epoch for exam in line["exam_ids"]]
        assert len(seen) == len(exams)
        assert set(seen) == exams
    assert (metrics["exams_lost"], metrics["exams_doubled"]) == (0, 0)
    events = {row["event"]: row for row in metrics["events"]}
    assert events["add node"]["replayed"] == 0, "a group that is resized saves first"
    assert events["kill worker"]["replayed"] >= 5
    assert metrics["steps_replayed"] == len(read_lines(out / "elastic" / "replayed.jsonl"))
    page = (out / "report.html").read_text()
    assert "The same training: the loss curves differ by at most" in page
    assert page.count("data:image/png;base64,") == 3


def test_a_shard_that_is_damaged_while_it_trains_ends_the_run_and_names_the_file(cluster: Any, tmp_path: Path):
    shards = Path(write_toy_shards(tmp_path / "shards", num_exams=400, rows_per_file=100, num_folds=5))
    out = tmp_path / "run"
    config = {
        "out": str(out),
        "inputs": {"shards": str(shards)},
        "num_workers": 2,
        "context": {"kind": "ray", "cpus_per_worker": 0.5},
        "global_batch": 4,
        "epochs": 3,
        "split": "lesion",
        # Rows of one file after those of another, so that most are read late.
        "shuffle_window": 8,
        "checkpoint_every_steps": 2,
        "views": {"image_size": 32, "num_views": 1},
        "image_tower": TOWER,
    }
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "prima_ray.cli", "finetune", str(tmp_path / "finetune.yaml")],
        env={**os.environ, "RAY_ADDRESS": cluster.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    steps, deadline = out / "steps.jsonl", time.monotonic() + 240
    while not steps.exists() or steps.read_text().count("\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for path in shards.glob("part-*.parquet"):
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(len(data) - 4))
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 2, stderr
    assert stdout == ""
    what, mend = stderr.splitlines()[-2:]
    assert what.startswith(f"prima: {shards}/part-0000")
    assert "cannot be read as Parquet" in what
    assert mend == "  The file is damaged: ingest the data set again."
    taken = read_lines(steps)
    assert len(taken) < 180, "the damage was met on the way"
    kept = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    assert kept, "the last good state stays"
