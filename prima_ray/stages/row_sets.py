"""The sets of exams that an evaluation stands on, and every model's probabilities for them.

Missingness may tell the label, so every figure stands three times: on all exams, on those with complete metadata, and
on all exams with the blocks that go missing together masked for everybody. To add a set: a function that ends in
`RowSet`, and a line in `row_sets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prima_ray.base import PrimaError
from prima_ray.data.plan import ExamIndex, Roles
from prima_ray.data.reader import RowReader, Rows
from prima_ray.data.storage import reason
from prima_ray.evaluation.baselines import has_blocks, mask_blocks, metadata_baselines
from prima_ray.evaluation.metrics import Probabilities
from prima_ray.inference.predictor import Predictor

_COLUMNS = ("exam_id", "patient_id", "images", "attributes", "label")
_MEND = "Copy the run again, or train it again."
Load = Callable[[], Predictor]


@dataclass(frozen=True)
class RowSet:
    """Exams (row numbers of the shards; a row may repeat), and every model's probabilities for them, ours first."""

    name: str
    title: str
    note: str
    rows: Rows
    probabilities: Mapping[str, Probabilities]


def row_sets(run: Path, index: ExamIndex, roles: Roles, *, model: str, load: Load) -> list[RowSet]:
    """All exams of the test fold and, where the data set declares blocks, `complete` and `masked`.

    The baselines learn on everything outside of the test fold: they have nothing to choose by a validation fold.

    Args:
        model: the name of ours.
        load: gives the run's predictor; called only where something must be predicted anew.

    Raises:
        PrimaError: `predictions.parquet` is missing, damaged, or lacks an exam.
    """
    data_set = index.manifest.data_set
    learn, test = np.sort(np.concatenate([roles.train, roles.val])), roles.test
    known, labels, asked = index.attribute_rows(learn), index.labels[learn], index.attribute_rows(test)
    num_classes = len(data_set.classes)
    baselines = metadata_baselines(data_set)
    rivals = {item.title: item.fit_predict(known, labels, asked, num_classes) for item in baselines}
    whole = RowSet("all", "All exams", "", test, {model: read_predictions(run, index, test), **rivals})
    if not data_set.blocks:
        return [whole]
    kept = has_blocks(asked, data_set)
    complete = RowSet(
        "complete",
        "Exams with complete metadata",
        "Exams of which no block is missing as a whole, so that missingness says nothing.",
        test[kept],
        {name: found[kept] for name, found in whole.probabilities.items()},
    )
    predictor = load()
    hidden = mask_blocks(asked, data_set)
    ours = whole.probabilities[model]
    if predictor.uses_attributes:
        ours = predictor.predict_tables(shard_tables(index, test), masked=sorted(data_set.block_attributes))
    masked = RowSet(
        "masked",
        "All exams, blocks masked for everybody",
        f"Treated as missing for every exam: {', '.join(block.name for block in data_set.blocks)}. The models are the "
        "same as above.",
        test,
        {model: ours, **{item.title: item.fit_predict(known, labels, hidden, num_classes) for item in baselines}},
    )
    return [whole, complete, masked]


def photo_set(whole: RowSet, index: ExamIndex, *, model: str, load: Load) -> RowSet | None:
    """Every photo of the test fold as an exam of its own, with the exam's attributes; None where no exam has two."""
    counts = index.num_images[whole.rows]
    if counts.max(initial=0) < 2:
        return None
    place = np.repeat(np.arange(len(whole.rows)), counts)
    ours = load().predict_tables(single_photos(table) for table in shard_tables(index, whole.rows))
    return RowSet(
        "photos",
        "Photo by photo",
        "Every photo as an exam of its own, as earlier work counts; the attributes are its exam's.",
        whole.rows[place],
        {name: ours if name == model else found[place] for name, found in whole.probabilities.items()},
    )


def read_predictions(run: Path, index: ExamIndex, rows: Rows) -> Probabilities:
    """The run's own probabilities for some rows, (N, C).

    Raises:
        PrimaError: the file is missing or damaged, or lacks an exam or a class.
    """
    path = run / "predictions.parquet"
    names = [f"prob_{name}" for name in index.manifest.data_set.class_names]
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise PrimaError("no such file", where=path, mend=_MEND) from None
    except (pa.ArrowException, OSError) as error:
        raise PrimaError(f"cannot be read as Parquet ({reason(error)})", where=path) from None
    absent = [name for name in ("exam_id", *names) if name not in table.column_names]
    if absent:
        raise PrimaError(f"has no column {absent[0]}", where=path)
    place = {exam: position for position, exam in enumerate(table["exam_id"].to_pylist())}
    missing = [exam for exam in index.exam_ids[rows] if exam not in place]
    if missing:
        raise PrimaError(f"{len(missing)} exams of the test fold have no prediction ({missing[0]}, ...)", where=path)
    values = np.column_stack([table[name].to_numpy() for name in names])
    values = values[[place[exam] for exam in index.exam_ids[rows]]]
    if not (np.issubdtype(values.dtype, np.number) and np.isfinite(values).all()):
        raise PrimaError("holds probabilities that are not numbers (NaN)", where=path, mend=_MEND)
    return values


def shard_tables(index: ExamIndex, rows: Rows, size: int = 32) -> Iterator[pa.Table]:
    """Rows of a shard folder, with the columns of the shard schema, some at a time."""
    reader = RowReader(index.shards, index.manifest, columns=_COLUMNS)
    for start in range(0, len(rows), size):
        yield reader.read(rows[start : start + size], 0)


def single_photos(table: pa.Table) -> pa.Table:
    """Every photo as an exam of its own, with the exam's attributes."""
    rows = [{**row, "images": [photo]} for row in table.to_pylist() for photo in row["images"]]
    return pa.Table.from_pylist(rows, schema=table.schema)
