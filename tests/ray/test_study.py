"""A study as Ray tasks: killed half-way and taken up again, it repeats no finished run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from prima_ray.base import read_json
from prima_ray.config import load_config
from prima_ray.data.schema import read_manifest
from prima_ray.studies.config import StudyConfig
from prima_ray.studies.sitting import shards_of
from tests.ray.conftest import LOGICAL_CPUS
from tests.unit.raw_data_set import NUM_EXAMS, RawDataSet
from tests.unit.studies.conftest import write_study


@pytest.mark.timeout(420)
def test_a_killed_study_goes_on_where_it_was(cluster: Any, labelled_shards: str, tmp_path: Path) -> None:
    # Beside the shared cluster: its own would have to start, and be killed with it.
    address = cluster.get_runtime_context().gcs_address
    study = write_study(
        tmp_path, labelled_shards, context={"kind": "ray", "address": address}, cpus_per_cell=2, num_resamples=20
    )
    cells = tmp_path / "cells"
    command = [sys.executable, "-m", "prima_ray.cli", "study", str(study)]
    said = tmp_path / "said.txt"
    with said.open("w") as file:
        first = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        deadline = time.monotonic() + 240
        while not list(cells.glob("*/run.json")):
            assert first.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    finished = {path: path.stat().st_mtime_ns for path in cells.glob("*/run.json")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"run: {tmp_path / 'study'}"
    # The run that was under way may have come to its end after the kill.
    told = re.search(r"study: (\d) of 8 runs are finished already", done.stderr)
    assert told is not None
    assert int(told[1]) >= len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    metrics = read_json(tmp_path / "study" / "metrics.json")
    assert list(metrics["sets"]["all"]["headline"]["models"]) == ["prima", "photos", "metadata", "late"]
    assert not any(item["missing"] for item in metrics["variants"].values())


@pytest.mark.timeout(180)
def test_a_run_that_uses_ray_itself_does_not_wait_for_what_it_holds(cluster: Any, tmp_path: Path) -> None:
    """Ingest writes by Ray Data: a task that takes every CPU would keep them from its own writers, without end."""
    raw = RawDataSet(tmp_path / "raw")
    raw.write()
    ingest = raw.config("unused", context={"kind": "ray", "address": cluster.get_runtime_context().gcs_address})
    (tmp_path / "ingest.yaml").write_text(yaml.safe_dump(ingest))
    study = write_study(tmp_path, "unused", inputs={"ingest": "ingest"}, context=ingest["context"])
    config = load_config(
        StudyConfig,
        study,
        [f"cpus_per_cell={LOGICAL_CPUS}", "recipes.ingest={stage: ingest, config: ingest.yaml}"],
    )
    assert read_manifest(shards_of(config)).num_exams == NUM_EXAMS
