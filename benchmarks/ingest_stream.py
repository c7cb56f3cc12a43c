"""Images a second that reach a training loop: `ray_batches` (Ray Data) against a torch DataLoader with two workers.

Both read the same Parquet files in the same order, decode and augment with the same functions, and hand over the same
tensors (the first batches are compared bit for bit). The DataLoader is the best one we know how to write: two
persistent workers make whole batches, keep their Parquet files open and row groups cached, and work four batches ahead
each. `local_batches`, the stream without Ray, is measured beside them.

A rate counts from the first batch to the last of `--steps` batches; start-up is "first batch": *cold* is the first
stream of a process (for the DataLoader its workers' start, for Ray Data that of a worker process, in a running
cluster), the others are streams after it.

    python benchmarks/ingest_stream.py [--shards SHARDS] [--pairs 7] [--steps 40] [--quick]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

sys.path.insert(0, str(Path(__file__).parent))
from _harness import Figures, find_shards, interleave, parse, parser, report, spread

from prima_ray.data.batch import ImageTextBatch
from prima_ray.data.reader import RowReader
from prima_ray.data.schema import read_manifest
from prima_ray.data.stream import Collator, ExamIndex, local_batches, plan_steps, ray_batches
from prima_ray.data.views import ViewConfig
from prima_ray.training.quiet import quiet_worker, runtime_env

Plan = list[tuple[int, np.ndarray]]


class PlannedBatches(IterableDataset[ImageTextBatch]):
    """Every worker makes every n-th batch of the plan; the DataLoader puts them back in order."""

    def __init__(self, shards: str, plan: Plan, collate: Collator) -> None:
        self.shards, self.plan, self.collate = shards, plan, collate
        self.reader: RowReader | None = None

    def __iter__(self) -> Iterator[ImageTextBatch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.reader is None:
            # Kept from one pass to the next, as the persistent worker itself is.
            self.reader = RowReader(self.shards, read_manifest(self.shards), columns=self.collate.columns)
        steps = [(epoch, rows) for epoch, plan in self.plan for rows in plan]
        for epoch, rows in steps[number::count]:
            yield self.collate(self.reader.read(rows, epoch))


def measure(batches: Callable[[], Iterable[ImageTextBatch]]) -> Figures:
    """Images a second after the first batch, and seconds to the first batch."""
    start = time.perf_counter()
    first = images = 0.0
    for number, batch in enumerate(batches()):
        assert batch.images is not None  # noqa: S101
        if number == 0:
            first = time.perf_counter() - start
        else:
            images += batch.images.shape[0] * batch.images.shape[1]
    return {"images/s": images / (time.perf_counter() - start - first), "s to first batch": first}


def check_equal(streams: Sequence[Iterable[ImageTextBatch]]) -> None:
    """Stop unless all streams give the same tensors."""
    firsts = [next(iter(stream)) for stream in streams]
    for other in firsts[1:]:
        if firsts[0].exam_ids != other.exam_ids or not torch.equal(_images(firsts[0]), _images(other)):
            raise SystemExit("the streams differ: nothing to compare")


def _images(batch: ImageTextBatch) -> torch.Tensor:
    assert batch.images is not None  # noqa: S101
    return batch.images


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=40, help="batches a stream")
    arguments.add_argument("--batch", type=int, default=64, help="exams a batch; two views each")
    arguments.add_argument("--image-size", type=int, default=224)
    arguments.add_argument("--threads", type=int, default=2, help="collate threads of our streams")
    arguments.add_argument("--prefetch", type=int, default=4, help="batches ahead of our streams")
    arguments = parse(arguments, argv, steps=8)
    shards, data = find_shards(arguments.shards)
    index = ExamIndex.read(shards)
    collate = Collator(
        data_set=index.manifest.data_set, seed=0, train=True, views=ViewConfig(image_size=arguments.image_size)
    )

    def planned(steps: int) -> Plan:
        return list(plan_steps(np.arange(len(index)), global_batch=arguments.batch, seed=0, total_steps=steps))

    plan = planned(arguments.steps)
    options = {"prefetch": arguments.prefetch, "num_threads": arguments.threads}
    for file in index.manifest.files:
        # Into the page cache: whoever comes first must not pay for the disk.
        Path(shards, file.path).read_bytes()

    loader = DataLoader(
        PlannedBatches(shards, plan, collate),
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=4,
    )
    cold = {"loader": measure(lambda: loader)["s to first batch"]}

    # Imports are in neither's time: torch was here already when the DataLoader began.
    import ray
    import ray.data

    quiet_worker()
    started = time.perf_counter()
    ray.init(
        num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False, log_to_driver=False, runtime_env=runtime_env()
    )
    cluster_s = time.perf_counter() - started
    cold["ray"] = measure(lambda: ray_batches(shards, plan, collate, **options))["s to first batch"]
    check_equal(
        [loader, ray_batches(shards, planned(1), collate, **options), local_batches(shards, planned(1), collate)]
    )
    pairs = interleave(
        {
            "ray": lambda _: measure(lambda: ray_batches(shards, plan, collate, **options)),
            "loader": lambda _: measure(lambda: loader),
            "threads": lambda _: measure(lambda: local_batches(shards, plan, collate, **options)),
        },
        pairs=arguments.pairs,
    )
    ray.shutdown()
    section = {
        "pairs": pairs,
        "ratio": ("images/s", "ray", "loader"),
        "data": data,
        "cold first batch, s": {name: round(value, 2) for name, value in cold.items()},
        "first batch, loader - ray, s": spread(
            [
                one - other
                for one, other in zip(
                    pairs.values["s to first batch"]["loader"], pairs.values["s to first batch"]["ray"], strict=True
                )
            ]
        )["median"],
        "setting": {
            "batch": arguments.batch,
            "views_per_exam": 2,
            "image_size": arguments.image_size,
            "steps": arguments.steps,
            "loader": {"num_workers": 2, "prefetch_factor": 4, "persistent_workers": True},
            "ray": options,
            "ray_init_s": round(cluster_s, 1),
        },
    }
    report("ingest_stream", arguments, sections={"": section}, argv=argv)


if __name__ == "__main__":
    main()
