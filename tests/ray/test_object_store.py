"""Two workers whose only common place is an object store: the submitted command, a kill of all of it, and again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from prima_ray.data.storage import Folder
from tests.conftest import write_toy_shards
from tests.ray.test_training import FINETUNE, RAY, TORCH

pytest.importorskip("ray")


def test_two_ray_workers_and_a_killed_driver_on_an_object_store(bucket: str, tmp_path: Path):
    shards, out = Folder.at(f"{bucket}/ray/shards"), Folder.at(f"{bucket}/ray/runs/finetune")
    for path in Path(write_toy_shards(tmp_path / "shards", num_folds=5)).iterdir():
        shards.upload(path, path.name)
    keys: dict[str, Any] = {**TORCH, **RAY, "max_steps": 16, "epochs": 40, "validate_every_epochs": 40}
    config = tmp_path / "finetune.yaml"
    config.write_text(yaml.safe_dump({"out": out.address, "inputs": {"shards": shards.address}, **FINETUNE, **keys}))
    command = [sys.executable, "-m", "prima_ray.cli", "finetune", str(config)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    said = tmp_path / "log"
    with said.open("w") as log:
        # A session of its own: the cluster that it starts is killed with it.
        first = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while not any(name.endswith("checkpoint.json") for name in out.folder("checkpoints").files()):
                assert first.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.2)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    assert not out.exists("run.json")
    assert out.exists(".lease.json")
    second = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert second.returncode == 0, second.stderr
    assert second.stdout == f"run: {out.address}\n"
    assert "looking for up to 30 s whether it still does" in second.stderr
    steps = [json.loads(line) for line in out.read("steps.jsonl").decode().splitlines()]
    starts = [json.loads(line) for line in out.read("starts.jsonl").decode().splitlines()]
    assert [line["step"] for line in steps] == list(range(1, 17))
    assert {line["world_size"] for line in steps} == {2}
    assert starts[-1]["from_step"] > 0
    assert {"run.json", "metrics.json", "predictions.parquet"} <= set(out.files())
    # Nothing was left in the working directory or beside the config.
    assert not list(Path.cwd().glob("s3:*"))
