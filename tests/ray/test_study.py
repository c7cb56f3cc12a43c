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

from prima_ray.base import read_json
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
    told = re.search(r"study: (\d) of 4 runs are finished already", done.stderr)
    assert told is not None
    assert int(told[1]) >= len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    metrics = read_json(tmp_path / "study" / "metrics.json")
    assert list(metrics["sets"]["all"]["headline"]["models"]) == ["prima", "photos", "metadata", "late"]
    assert not any(item["missing"] for item in metrics["variants"].values())
