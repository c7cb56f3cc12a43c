"""Images per second that reach a training loop: Ray Data (`ray_batches`) against a torch DataLoader with two workers.

Both read the same Parquet files in the same order through the same decoding and augmentation, in interleaved pairs in
one run; the DataLoader's workers make whole batches with the project's own reader, which is the fastest it can be.

    python benchmarks/ingest_stream.py --shards SHARDS [--pairs 7] [--steps 40] [--out benchmarks/results]

Rates count from the first batch to the last, so start-up is left to "time to the first batch" (the cluster is up; for
Ray the first stream of the run also starts a worker process, and is reported alone).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from prima_ray.base import write_json
from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.reader import RowReader
from prima_ray.data.schema import read_manifest
from prima_ray.data.stream import Collator, ExamIndex, local_batches, plan_steps, ray_batches
from prima_ray.data.views import ViewConfig


class PlannedBatches(IterableDataset[ImageTextBatch]):
    """Every worker makes every n-th batch of the plan; the DataLoader puts them back in order."""

    def __init__(self, shards: str, plan: list[tuple[int, np.ndarray]], collate: Collator) -> None:
        self.shards, self.plan, self.collate = shards, plan, collate

    def __iter__(self) -> Iterator[ImageTextBatch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = RowReader(self.shards, read_manifest(self.shards), columns=self.collate.columns)
        steps = [(epoch, rows) for epoch, plan in self.plan for rows in plan]
        for epoch, rows in steps[number::count]:
            yield self.collate(reader.read(rows, epoch))


def measure(batches: Callable[[], Iterator[ImageTextBatch]]) -> tuple[float, float]:
    """(images a second after the first batch, seconds to the first batch)."""
    start = time.perf_counter()
    first = images = 0.0
    for number, batch in enumerate(batches()):
        assert batch.images is not None  # noqa: S101
        if number == 0:
            first = time.perf_counter() - start
        else:
            images += batch.images.shape[0] * batch.images.shape[1]
    return images / (time.perf_counter() - start - first), first


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 3),
        "min": round(ordered[0], 3),
        "max": round(ordered[-1], 3),
        "values": [round(value, 3) for value in values],  # type: ignore[dict-item]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2, help="collate threads of the Ray stream")
    parser.add_argument("--prefetch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()

    import ray

    ray.init(num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False, log_to_driver=False)
    index = ExamIndex.read(arguments.shards)
    views = ViewConfig(image_size=arguments.image_size)
    collate = Collator(data_set=index.manifest.data_set, seed=0, train=True, views=views)
    plan = list(plan_steps(np.arange(len(index)), global_batch=arguments.batch, seed=0, total_steps=arguments.steps))
    options = {"prefetch": arguments.prefetch, "num_threads": arguments.threads}

    def through_ray() -> Iterator[ImageTextBatch]:
        return ray_batches(arguments.shards, plan, collate, **options)

    def through_threads() -> Iterator[ImageTextBatch]:
        return local_batches(arguments.shards, plan, collate, **options)

    def through_loader() -> Iterator[ImageTextBatch]:
        return iter(DataLoader(PlannedBatches(arguments.shards, plan, collate), batch_size=None, num_workers=2))

    contenders = {"ray": through_ray, "loader": through_loader, "threads": through_threads}
    _, cold = measure(through_ray)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    firsts: dict[str, list[float]] = {name: [] for name in contenders}
    for pair in range(arguments.pairs):
        # Turn and turn about, so that what else the machine does falls on all of them.
        for name in list(contenders)[:: 1 if pair % 2 == 0 else -1]:
            rate, first = measure(contenders[name])
            rates[name].append(rate)
            firsts[name].append(first)
        print(f"pair {pair + 1}: " + ", ".join(f"{name} {rates[name][-1]:.0f}/s" for name in contenders), flush=True)
    ratios = [one / other for one, other in zip(rates["ray"], rates["loader"], strict=True)]
    ray.shutdown()

    result = {
        "images_per_s": {name: summary(values) for name, values in rates.items()},
        "first_batch_s": {**{name: summary(values) for name, values in firsts.items()}, "ray_cold": round(cold, 3)},
        "ratio_ray_to_loader": summary(ratios),
        "setting": {
            "exams": len(index),
            "batch": arguments.batch,
            "views_per_exam": views.num_views,
            "image_size": arguments.image_size,
            "steps": arguments.steps,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "torch_threads": torch.get_num_threads(),
            "machine": platform.machine(),
            **options,
        },
    }
    write_json(arguments.out / "ingest_stream.json", result)
    print(json.dumps({key: result[key] for key in ("ratio_ray_to_loader", "first_batch_s")}, indent=2))
    print(f"ray / loader, median of {arguments.pairs} pairs: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
