from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from prima_ray.base import PrimaError
from prima_ray.data import stream as stream_module
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.collate import Collator
from prima_ray.data.feature_writer import FeatureConfig, compute_features
from prima_ray.data.plan import ExamIndex, plan_steps
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.data.stream import local_batches, ray_batches
from prima_ray.data.views import ViewConfig

ray = pytest.importorskip("ray")

from prima_ray.data import ray_source  # noqa: E402 - it imports Ray
from prima_ray.data.ray_source import PacedExecution  # noqa: E402

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def collate(toy_shards: str) -> Collator:
    data_set = ExamIndex.read(toy_shards).manifest.data_set
    return Collator(data_set=data_set, seed=5, train=True, views=ViewConfig(image_size=24))


def steps(total: int = 9, **options: int) -> Iterator[tuple[int, Any]]:
    return plan_steps(np.arange(23), global_batch=7, seed=5, total_steps=total, **options)


def assert_equal(left: ImageTextBatch, right: ImageTextBatch) -> None:
    for field in fields(ImageTextBatch):
        one, other = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name


def wait_until_idle() -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        running = [thread for thread in threading_names() if thread.startswith("StreamingExecutor")]
        if not running:
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {running}")


def threading_names() -> list[str]:
    import threading

    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3), (2, 3)])
def test_ray_gives_the_local_batches_bit_for_bit(
    toy_shards: str, collate: Collator, rank: int, world_size: int
) -> None:
    local = list(local_batches(toy_shards, steps(rank=rank, world_size=world_size), collate))
    through_ray = list(ray_batches(toy_shards, steps(rank=rank, world_size=world_size), collate))
    assert len(through_ray) == 9
    for one, other in zip(through_ray, local, strict=True):
        assert_equal(one, other)


def test_many_read_tasks_and_executions_keep_the_order(
    toy_shards: str, collate: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "TASK_ROWS", 1)
    monkeypatch.setattr(stream_module, "TASKS_PER_EXECUTION", 4)
    local = list(local_batches(toy_shards, steps(total=12), collate))
    through_ray = list(ray_batches(toy_shards, steps(total=12), collate, prefetch=1, num_fetchers=2))
    for one, other in zip(through_ray, local, strict=True):
        assert_equal(one, other)


def test_stored_features_stream_as_they_do_locally(toy_shards: str, collate: Collator, tmp_path: Path) -> None:
    def encode(batch: ImageTextBatch) -> dict[str, Tensor]:
        assert batch.images is not None
        return {"image_cls": batch.images.flatten(2)[..., :5]}

    features = compute_features(str(tmp_path), toy_shards, collate, encode, tower="t", config=FeatureConfig(variants=2))
    without_pixels = Collator(data_set=collate.data_set, seed=5, train=True, features=features.manifest.specs)
    local = list(local_batches(toy_shards, steps(), without_pixels, features=features))
    through_ray = list(ray_batches(toy_shards, steps(), without_pixels, features=features))
    for one, other in zip(through_ray, local, strict=True):
        assert one.images is None
        assert_equal(one, other)


def test_resuming_at_a_step_gives_the_tail(toy_shards: str, collate: Collator) -> None:
    whole = list(local_batches(toy_shards, steps(), collate))
    for one, other in zip(ray_batches(toy_shards, steps(start_step=5), collate), whole[5:], strict=True):
        assert_equal(one, other)


def test_reading_starts_when_every_cpu_is_taken(toy_shards: str, collate: Collator) -> None:
    @ray.remote(num_cpus=int(ray.cluster_resources()["CPU"]))
    class Trainer:
        def first(self, shards: str, collate: Collator) -> tuple[str, ...]:
            plan = plan_steps(np.arange(23), global_batch=7, seed=5, total_steps=2)
            first, _ = ray_batches(shards, plan, collate)
            return first.exam_ids

    trainer = Trainer.remote()
    found = ray.get(trainer.first.remote(toy_shards, collate), timeout=120)
    assert found == next(iter(local_batches(toy_shards, steps(), collate))).exam_ids
    ray.kill(trainer)


def test_two_streams_run_side_by_side(toy_shards: str, collate: Collator) -> None:
    training = ray_batches(toy_shards, steps(total=6), collate)
    validation = ray_batches(toy_shards, steps(total=6), collate.for_evaluation())
    pairs = list(zip(training, validation, strict=True))
    assert [one.exam_ids for one, _ in pairs] == [other.exam_ids for _, other in pairs]


def test_stopping_early_shuts_the_execution_down(toy_shards: str, collate: Collator) -> None:
    batches = ray_batches(toy_shards, steps(total=3000), collate)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    wait_until_idle()
    assert not [name for name in threading_names() if name.startswith("prima-collate")]


def test_the_control_loop_rests_while_the_consumer_is_behind(
    toy_shards: str, collate: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[float] = []

    class Counted(PacedExecution):
        def on_execution_step(self, executor: Any) -> None:
            turns.append(time.monotonic())
            super().on_execution_step(executor)

    monkeypatch.setattr(ray_source, "PacedExecution", Counted)
    # Little room, so that the stream is full soon.
    batches = ray_batches(toy_shards, steps(total=3000), collate, store_bytes=1024 * 1024)
    next(batches)
    time.sleep(3)
    started = time.monotonic()
    time.sleep(2)
    while_full = sum(turn > started for turn in turns)
    batches.close()  # type: ignore[attr-defined]
    assert turns
    assert while_full <= 2 / PacedExecution.PAUSE_S + 5


def test_a_corrupt_photo_names_its_exam_and_itself(make_shards: Callable[..., str], collate: Collator) -> None:
    shards = make_shards()
    path = Path(shards) / "part-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1]["images"][0]["bytes"] = b"not a photo"
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), path, row_group_size=3)
    with pytest.raises(PrimaError) as caught:
        list(ray_batches(shards, steps(), collate))
    assert caught.value.what.startswith("exam e001: the photo i001_0 cannot be decoded (")
    wait_until_idle()


def test_a_damaged_file_met_by_a_read_task_is_named_without_rays_wrapping(
    make_shards: Callable[..., str], collate: Collator
) -> None:
    shards = make_shards()
    part = Path(shards) / "part-00001.parquet"
    part.write_bytes(b"x" * 200)
    with pytest.raises(PrimaError) as caught:
        list(ray_batches(shards, steps(), collate))
    assert caught.value.where == str(part)
    assert caught.value.what.startswith("cannot be read as Parquet (")
    wait_until_idle()
