"""`prima elastic` as a user calls it: real nodes, a real SIGKILL, 2 -> 1 -> 2 workers. And a shard that is damaged."""

from __future__ import annotations

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
ALIGN: dict[str, Any] = {
    "seed": 3,
    "global_batch": 14,
    "max_steps": 80,
    "epochs": 20,
    "validate_every_epochs": 20,
    "checkpoint_every_steps": 25,
    "split": "lesion",
    "views": {"image_size": 32},
    "optimizer": {"lr": 3e-3, "clip_norm": 0.5},
    "engine": {"kind": "deepspeed", "zero_stage": 1},
    "image_tower": TOWER,
    "text_tower": {
        "config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "intermediate_size": 16, "vocab_size": 30522},
        "max_tokens": 32,
    },
    "projection": {"width": 16},
}  # fmt: skip
EVENTS = [
    {"at_step": 5, "event": "remove_node"},
    {"at_step": 15, "event": "add_node"},
    {"at_step": 30, "event": "kill_worker", "after_checkpoint": 8},
]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(900)
def test_two_workers_one_and_two_again_and_a_kill_train_what_two_workers_train(tmp_path: Path):
    shards = write_toy_shards(tmp_path / "shards", num_exams=100, num_folds=5)
    (tmp_path / "align.yaml").write_text(yaml.safe_dump({"out": "x", "inputs": {"shards": shards}, **ALIGN}))
    out = tmp_path / "elastic"
    config = {
        "out": str(out),
        "inputs": {"training": "align.yaml"},
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
    # 60 exams train: in each of the whole epochs each of them came once.
    steps = read_lines(out / "elastic" / "steps.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 81))
    for epoch in range(80 // 5):
        seen = [exam for line in steps if line["epoch"] == epoch for exam in line["exam_ids"]]
        assert len(seen) == len(set(seen)) == 60
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
