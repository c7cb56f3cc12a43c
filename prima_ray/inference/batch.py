"""Batch prediction by Ray Data: the same predictor over every exam of a shard folder, a pool of actors at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from prima_ray.data.plan import ExamIndex
from prima_ray.data.reader import RowReader
from prima_ray.inference.predictor import Predictor

_COLUMNS = ("exam_id", "patient_id", "images", "attributes", "label")


class _Worker:
    """One actor: loads the model once."""

    def __init__(self, run: str, shards: str, device: str) -> None:
        self._predictor = Predictor.load(run, device=device)
        index = ExamIndex.read(shards)
        self._reader = RowReader(shards, index.manifest, columns=_COLUMNS)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        table: pa.Table = self._reader.read(np.asarray(rows["id"], dtype=np.int64), 0)
        found = self._predictor.predict_tables(iter([table]))
        return {"row": rows["id"], "probabilities": found}


def predict_shards(
    run: str,
    shards: str,
    *,
    num_exams: int,
    concurrency: int = 1,
    batch_size: int = 32,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.float64]]]]:
    """(row numbers, probabilities) of every exam, batch by batch, in the shards' order."""
    import ray

    dataset = ray.data.range(num_exams, override_num_blocks=max(1, min(concurrency * 4, num_exams)))
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    mapped = dataset.map_batches(
        _Worker,
        fn_constructor_args=(run, shards, device),
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_gpus=1 if device.startswith("cuda") else None,
    )
    for batch in mapped.iter_batches(batch_size=None, batch_format="numpy"):
        rows = np.asarray(batch["row"], dtype=np.int64)
        if progress:
            progress(len(rows))
        yield rows, np.asarray(batch["probabilities"], dtype=np.float64)
