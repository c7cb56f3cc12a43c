"""Batch prediction by Ray Data: the same predictor over every exam of a shard folder, a pool of actors at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from prima_ray.base import PrimaError
from prima_ray.data.reader import RowReader, Rows
from prima_ray.data.schema import Manifest
from prima_ray.inference.diagnosis import Diagnoser, Diagnosis

_COLUMNS = ("exam_id", "patient_id", "images", "attributes", "label")
_MAX_CPU_ACTORS = 4
ANSWER_SCHEMA = pa.schema(
    [
        ("probabilities", pa.list_(pa.float64())),
        ("confidence", pa.float64()),
        ("prediction_set", pa.list_(pa.string())),
        ("abstained", pa.bool_()),
        ("reasons", pa.list_(pa.struct([("cause", pa.string()), ("text", pa.string())]))),
        ("novelty", pa.float64()),
        ("warnings", pa.list_(pa.string())),
    ]
)
"""What is kept of a `Diagnosis`, under the names of its JSON."""
_PLACE, _MISTAKE = pa.field("row", pa.int64()), pa.field("mistake", pa.string())


class _Worker:
    """One actor: loads the model once.

    A mistake of the user's travels back as a value: of an exception in an actor, Ray Data keeps the text alone, and an
    actor that does not start it tries again.
    """

    def __init__(self, run: str, shards: str, manifest: Manifest, device: str) -> None:
        self._reader = RowReader(shards, manifest, columns=_COLUMNS)
        self._diagnoser: Diagnoser | PrimaError
        try:
            self._diagnoser = Diagnoser.load(run, device=device)
        except PrimaError as error:
            self._diagnoser = error

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        places = np.asarray(rows["id"], dtype=np.int64)
        mistake = ""
        try:
            if isinstance(self._diagnoser, PrimaError):
                raise self._diagnoser
            found = _table(self._diagnoser.diagnose_table(self._reader.read(places, 0)))
        except PrimaError as error:
            found = pa.Table.from_pylist([{}] * len(places), schema=ANSWER_SCHEMA)
            mistake = json.dumps({"what": error.what, "where": error.where, "mend": error.mend})
        return found.append_column(_PLACE, [places]).append_column(_MISTAKE, [[mistake] * len(places)])


def _table(answers: Sequence[Diagnosis]) -> pa.Table:
    kept = [item.as_dict() for item in answers]
    return pa.Table.from_pylist(
        [{**item, "probabilities": list(item["probabilities"].values())} for item in kept], schema=ANSWER_SCHEMA
    )


def predict_shards(
    run: str,
    shards: str,
    manifest: Manifest,
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[Rows, pa.Table]]:
    """(row numbers, answers by `ANSWER_SCHEMA`) of every exam, batch by batch, in the shards' order.

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
    for batch in mapped.iter_batches(batch_size=None, batch_format="pyarrow"):
        for mistake in batch["mistake"].to_pylist():
            if mistake:
                raise PrimaError(**json.loads(mistake))
        if progress:
            progress(len(batch))
        yield batch["row"].to_numpy(), batch.select(ANSWER_SCHEMA.names)
