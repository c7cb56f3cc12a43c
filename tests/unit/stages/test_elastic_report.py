"""The report of two real runs in this process: one straight through, one that was told to leave and then killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prima_ray.stages.elastic_report import REPORT, write_report
from prima_ray.training.contexts import LocalContext
from prima_ray.training.leaving import Notice
from prima_ray.training.loop import train
from prima_ray.training.tracking import Tracker
from tests.unit.training.toys import make_job, read_lines


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


class Told(LocalContext):
    def __init__(self) -> None:
        super().__init__("cpu")
        self._step = 0

    def notice(self) -> Notice:
        self._step += 1
        return Notice.LEAVE if self._step == 2 else Notice.NONE


def test_the_report_tells_what_happened(tmp_path: Path, toy_shards: str, monkeypatch: pytest.MonkeyPatch):
    def job(name: str) -> Any:
        return make_job(tmp_path / name, toy_shards, log_exam_ids=True)

    train(job("fixed"), LocalContext("cpu"))
    assert train(job("elastic"), Told()) is False
    original = Tracker.step

    def fatal(self: Tracker, record: Mapping[str, Any]) -> None:
        original(self, record)
        if record["step"] == 5:
            raise Killed

    monkeypatch.setattr(Tracker, "step", fatal)
    with pytest.raises(Killed):
        train(job("elastic"), LocalContext("cpu"))
    monkeypatch.undo()
    train(job("elastic"), LocalContext("cpu"))

    times = [line["time"] for line in read_lines(tmp_path / "elastic" / "steps.jsonl")]
    happened = [
        {"event": "add_node", "at_step": 2, "step": 2, "time": times[1], "start": 1},
        {"event": "kill_worker", "at_step": 5, "step": 5, "time": times[3], "start": 2},
    ]
    metrics = write_report(
        tmp_path,
        stage="finetune",
        happened=happened,
        answer_difference=2.5e-7,
        tolerance=1e-4,
        global_batch=5,
        facts={"engine": "torch"},
    )
    assert metrics == {**metrics, "largest_loss_difference": 0.0, "largest_answer_difference": 2.5e-7,
                       "same_batches": True, "num_steps": 9,
                       "exams_lost": 0, "exams_doubled": 0, "steps_replayed": 2, "world_sizes": [1, 1, 1]}  # fmt: skip
    assert 0 < metrics["goodput"] < 1
    written = json.loads((tmp_path / "metrics.json").read_text())
    rows = [(row["event"], row["at_step"], row["from_step"], row["replayed"]) for row in written["events"]]
    assert rows == [("add node", 2, 2, 0), ("kill worker", 5, 3, 2)]
    assert read_lines(tmp_path / "events.jsonl") == happened
    page = (tmp_path / REPORT).read_text()
    assert "The same training: the loss curves differ by at most 0.0e+00 (tolerance 1e-04)." in page
    assert "Exams lost: 0; doubled: 0; steps replayed: 2 of 9; goodput" in page
    assert "Probabilities of the diagnoses of the two trained models differ by at most 2.5e-07." in page
    assert page.count("data:image/png;base64,") == 3
    # Nothing is fetched from elsewhere.
    assert "http" not in page
