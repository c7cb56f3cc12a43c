"""Batch prediction by Ray Data: the same predictor over every exam of a shard folder, a pool of actors at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prima_ray.base import PrimaError
from prima_ray.data.reader import RowReader, Rows
from prima_ray.data.schema import Manifest
from prima_ray.inference.predictor import Predictor

_COLUMNS = ("exam_id", "patient_id", "images", "attributes", "label")
_MAX_CPU_ACTORS = 4


class _Worker:
    """One actor: loads the model once.

    A mistake of the user's travels back as a value: of an exception in an actor, Ray Data keeps the text alone, and an
    actor that does not start it tries again.
    """

    def __init__(self, run: str, shards: str, manifest: Manifest, device: str) -> None:
        self._reader = RowReader(shards, manifest, columns=_COLUMNS)
        self._num_classes = len(manifest.data_set.classes)
        self._predictor: Predictor | PrimaError
        try:
            self._predictor = Predictor.load(run, device=device)
        except PrimaError as error:
            self._predictor = error

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        count = len(rows["id"])
        try:
            if isinstance(self._predictor, PrimaError):
                raise self._predictor
            table: pa.Table = self._reader.read(np.asarray(rows["id"], dtype=np.int64), 0)
            found, mistake = self._predictor.predict_tables([table]), ""
        except PrimaError as error:
            found = np.full((count, self._num_classes), np.nan)
            mistake = json.dumps({"what": error.what, "where": error.where, "mend": error.mend})
        return {"row": rows["id"], "probabilities": found, "mistake": np.full(count, mistake, dtype=object)}


def predict_shards(
    run: str,
    shards: str,
    manifest: Manifest,
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[Rows, NDArray[np.float64]]]:
    """(row numbers, probabilities) of every exam, batch by batch, in the shards' order.

    An actor a GPU where the cluster has any, else as many as leave a CPU to Ray Data, up to four.

    Args:
        run: a run directory that every node can read.
        manifest: of the shards.

    Raises:
        PrimaError: what an actor found wrong with the model or the shards.
    """
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    num_batches = math.ceil(manifest.num_exams / batch_size)
    num_actors = max(1, min(num_batches, gpus or min(_MAX_CPU_ACTORS, int(resources.get("CPU", 1)) - 1)))
    dataset = ray.data.range(manifest.num_exams, override_num_blocks=num_batches)
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    mapped = dataset.map_batches(
        _Worker,
        fn_constructor_args=(run, shards, manifest, "cuda" if gpus else "cpu"),
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=1 if gpus else None,
    )
    for batch in mapped.iter_batches(batch_size=None, batch_format="numpy"):
        for mistake in batch["mistake"]:
            if mistake:
                raise PrimaError(**json.loads(mistake))
        rows = np.asarray(batch["row"], dtype=np.int64)
        if progress:
            progress(len(rows))
        yield rows, np.asarray(batch["probabilities"], dtype=np.float64)
