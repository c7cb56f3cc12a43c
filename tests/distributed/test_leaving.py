"""A notice that reaches one of two ranks, one of them slow, ends both after the same step. Two gloo ranks; no Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from prima_ray.data.batch import ImageTextBatch
from prima_ray.training.contexts import LocalContext, Steps, StreamSpec
from prima_ray.training.leaving import Notice
from prima_ray.training.loop import train
from prima_ray.training.ranks import start_ranks
from tests.unit.training.toys import Contrast, curve, make_job, read_lines

WORLD = 2
SLOW_S = 0.15


class GlooContext(LocalContext):
    """One of two processes; slow where asked, and told of its end at certain steps."""

    def __init__(self, rank: int, *, slow: bool, notices: Mapping[int, Notice]) -> None:
        super().__init__("cpu")
        self.rank, self.world_size = rank, WORLD
        self._slow, self._notices, self._step, self.num_heeded = slow, notices, 0, 0

    def batches(self, shards: str, steps: Steps, spec: StreamSpec) -> Generator[ImageTextBatch]:
        for batch in super().batches(shards, steps, spec):
            time.sleep(SLOW_S * self._slow)
            yield batch

    def gather_objects(self, values: list[str]) -> list[str]:
        lists: list[list[str]] = [[] for _ in range(WORLD)]
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def barrier(self) -> None:
        dist.barrier()

    def notice(self) -> Notice:
        self._step += 1
        return self._notices.get(self._step, Notice.NONE)

    def heeded(self) -> None:
        self.num_heeded += 1


def rank_main(rank: int, folder: str, shards: str) -> None:
    # The slow rank hears that a node will go, the other that the group must leave.
    notices = ({5: Notice.LEAVE}, {4: Notice.SAVE})[rank]
    context = GlooContext(rank, slow=rank == 1, notices=notices)
    job = make_job(Path(folder, "two"), shards, Contrast(_data_set(shards)), log_exam_ids=True)
    finished = train(job, context)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps([finished, context.num_heeded]))


def _data_set(shards: str) -> Any:
    from prima_ray.data.plan import ExamIndex

    return ExamIndex.read(shards).manifest.data_set


def test_both_ranks_save_and_leave_after_the_same_step_and_one_goes_on(tmp_path: Path, toy_shards: str):
    whole = make_job(tmp_path / "one", toy_shards, Contrast(_data_set(toy_shards)), log_exam_ids=True)
    train(whole, LocalContext("cpu"))
    start_ranks(rank_main, WORLD, str(tmp_path), toy_shards)
    # Neither finished; both heeded the notice that one of them had heard.
    assert [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(WORLD)] == [[False, 1]] * WORLD
    job = make_job(tmp_path / "two", toy_shards, Contrast(_data_set(toy_shards)), log_exam_ids=True)
    kept = sorted(folder.name for folder in (job.run / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000005"]
    lines = read_lines(job.run / "steps.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert min(line["seconds"] for line in lines[1:]) >= SLOW_S, "all wait for the slow rank"
    assert train(job, LocalContext("cpu")) is True
    assert curve(job.run) == pytest.approx(curve(whole.run), rel=1e-6)
    mine, wanted = (read_lines(item.run / "steps.jsonl") for item in (job, whole))
    assert [sorted(line["exam_ids"]) for line in mine] == [sorted(line["exam_ids"]) for line in wanted]
    assert [line["world_size"] for line in mine] == [2] * 5 + [1] * 4
