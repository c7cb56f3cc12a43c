"""What the runs of a study said, in one file: `answers.parquet`, beside its page.

Training takes hours; what comes of it are a few numbers an exam. With this file a study's figures are made again
without training, and a study goes on on another machine: a run that the file knows by its key is not trained again.

    answers.parquet     run, asked, exam_id, prob_<CLASS>...: of each run its validation fold (`val`), its test fold
                        (`test`), that with the blocks masked (`masked`), and photo by photo (`photos`); 32-bit floats
    its metadata        `prima_ray`, JSON: format, runs: key -> recipe, fold, seed, seconds, unvetted; of runs in
                        between, too
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prima_ray.base import PrimaError, write_atomic
from prima_ray.data.storage import reason
from prima_ray.evaluation.metrics import Probabilities

FILE = "answers.parquet"
SETS = ("val", "test", "masked", "photos")
_META = b"prima_ray"
_FORMAT = 1
_MEND = "Name the `answers.parquet` of a study."


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run beside its answers."""

    recipe: str
    fold: int | None
    seed: int | None
    seconds: float
    unvetted: bool


@dataclass
class Published:
    """Answers by run and set, and facts of every run."""

    answers: dict[tuple[str, str], tuple[list[str], Probabilities]] = field(default_factory=dict)
    """(key of the run, one of `SETS`) -> the exams, (N, C) probabilities."""
    runs: dict[str, RunFacts] = field(default_factory=dict)


def as_published(probabilities: Probabilities) -> Probabilities:
    """Rounded to what the file holds: figures are the same from a run and from the file."""
    return np.asarray(probabilities, dtype=np.float32).astype(np.float64)


def write_published(path: Path, published: Published, class_names: Sequence[str]) -> None:
    """Write the file, whole or not at all."""
    names = [f"prob_{name}" for name in class_names]
    runs, sets, exams = (list[str]() for _ in range(3))
    for (run, asked), (exam_ids, _) in published.answers.items():
        runs += [run] * len(exam_ids)
        sets += [asked] * len(exam_ids)
        exams += exam_ids
    found = [values for _, values in published.answers.values()]
    values = np.concatenate(found) if found else np.zeros((0, len(names)))
    columns: dict[str, Any] = {"run": runs, "asked": sets, "exam_id": exams}
    table = pa.table(
        {name: pa.array(column, pa.string()) for name, column in columns.items()}
        | {name: pa.array(values[:, place], pa.float32()) for place, name in enumerate(names)}
    )
    facts = {key: asdict(item) for key, item in published.runs.items()}
    table = table.replace_schema_metadata({_META: json.dumps({"format": _FORMAT, "runs": facts}).encode()})
    written = io.BytesIO()
    pq.write_table(
        table,
        written,
        compression="zstd",
        use_dictionary=list(columns),
        column_encoding=dict.fromkeys(names, "BYTE_STREAM_SPLIT"),
    )
    write_atomic(path, written.getvalue())


def read_published(paths: Iterable[str], class_names: Sequence[str]) -> Published:
    """All answers of some files; of a run that several know, the first file's.

    Raises:
        PrimaError: a file is missing, damaged, or of other classes.
    """
    found = Published()
    for path in paths:
        answers, runs = _read(path, [f"prob_{name}" for name in class_names])
        found.answers = {**answers, **found.answers}
        found.runs = {**runs, **found.runs}
    return found


def _read(
    path: str, names: list[str]
) -> tuple[dict[tuple[str, str], tuple[list[str], Probabilities]], dict[str, RunFacts]]:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise PrimaError("no such file", where=path, mend=_MEND) from None
    except (pa.ArrowException, OSError) as error:
        raise PrimaError(f"cannot be read as Parquet ({reason(error)})", where=path, mend=_MEND) from None
    runs = _facts(table, path)
    wanted = ["run", "asked", "exam_id", *names]
    if table.column_names != wanted:
        raise PrimaError(
            f"has the columns {', '.join(table.column_names)}, expected {', '.join(wanted)}",
            where=path,
            mend="Answers of other classes are of another data set.",
        )
    try:
        values = np.column_stack([table[name].to_numpy() for name in names]).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise PrimaError(f"holds probabilities that are not numbers ({error})", where=path, mend=_MEND) from None
    if not np.isfinite(values).all():
        raise PrimaError("holds probabilities that are not numbers", where=path, mend="Copy the file again.")
    keys = list(zip(table["run"].to_pylist(), table["asked"].to_pylist(), strict=True))
    exams = table["exam_id"].to_pylist()
    starts = [place for place, key in enumerate(keys) if place == 0 or key != keys[place - 1]]
    answers = {
        keys[start]: (exams[start:end], values[start:end])
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)
    }
    return answers, runs


def _facts(table: pa.Table, path: str) -> dict[str, RunFacts]:
    try:
        told = json.loads((table.schema.metadata or {})[_META])
        if told["format"] != _FORMAT:
            raise PrimaError(f"is of format {told['format']}, expected {_FORMAT}", where=path)
        return {str(key): RunFacts(**item) for key, item in told["runs"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PrimaError("holds no answers of a study", where=path, mend=_MEND) from None
