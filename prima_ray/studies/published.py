"""What the runs of a study said, in one file: `answers.parquet`, beside its page.

Training takes hours; what comes of it are a few numbers an exam. With this file a study's figures are made again
without training, and a study goes on on another machine: a run that the file knows by its key is not trained again.

    answers.parquet     run, asked, exam_id, prob_<CLASS>...: what runs said of their validation fold (`val`), their
                        test fold (`test`), that with the blocks masked (`masked`), and photo by photo (`photos`); of a
                        run, what it was asked; 32-bit floats
    its metadata        `prima_ray`, JSON: format, runs: key -> `RunFacts`; of the runs before those that answer, too
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from prima_ray.base import PrimaError, StrictConfig, write_atomic
from prima_ray.data.storage import reason
from prima_ray.evaluation.metrics import Probabilities

FILE = "answers.parquet"
SETS = ("val", "test", "masked", "photos")
T = TypeVar("T")
_META = b"prima_ray"
_FORMAT = 1
_MEND = "Name the `answers.parquet` of a study."


class RunFacts(StrictConfig):
    """What is known of a run beside its answers."""

    recipe: str
    fold: int | None
    seed: int | None
    seconds: float
    unvetted: bool
    version: str | None = None
    """Of the program."""
    commit: str | None = None


@dataclass(frozen=True)
class Said:
    """What one run said of one set."""

    exam_ids: list[str]
    probabilities: Probabilities
    """(N, C)"""


@dataclass
class Published:
    """Answers, and facts of every run."""

    answers: dict[str, dict[str, Said]] = field(default_factory=dict)
    """Key of the run -> one of `SETS` -> what it said."""
    runs: dict[str, RunFacts] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Key of the run -> the file that knows it."""

    def merged(self, other: Published, *, first: bool = False) -> Published:
        """The runs of both, each whole from the one that knows more of it: what two trainings said is never mixed.

        Args:
            first: whatever is known of a run here counts.
        """
        known = self.runs.keys() | self.answers.keys()
        theirs = {
            key
            for key in other.runs.keys() | other.answers.keys()
            if key not in known or (not first and len(other.answers.get(key, {})) > len(self.answers.get(key, {})))
        }

        def both(mine: dict[str, T], others: dict[str, T]) -> dict[str, T]:
            kept = {key: item for key, item in mine.items() if key not in theirs}
            return kept | {key: item for key, item in others.items() if key in theirs}

        return Published(both(self.answers, other.answers), both(self.runs, other.runs), both(self.files, other.files))


def as_published(probabilities: Probabilities) -> Probabilities:
    """Rounded to what the file holds: figures are the same from a run and from the file."""
    return np.asarray(probabilities, dtype=np.float32).astype(np.float64)


def write_published(path: Path, published: Published, class_names: Sequence[str]) -> None:
    """Write the file, whole or not at all."""
    names = [f"prob_{name}" for name in class_names]
    runs, sets, exams = (list[str]() for _ in range(3))
    found = [np.zeros((0, len(names)))]
    for run, by_set in sorted(published.answers.items()):
        for asked, said in by_set.items():
            runs += [run] * len(said.exam_ids)
            sets += [asked] * len(said.exam_ids)
            exams += said.exam_ids
            found.append(said.probabilities)
    values = np.concatenate(found)
    columns: dict[str, Any] = {"run": runs, "asked": sets, "exam_id": exams}
    table = pa.table(
        {name: pa.array(column, pa.string()) for name, column in columns.items()}
        | {name: pa.array(values[:, place], pa.float32()) for place, name in enumerate(names)}
    )
    facts = {key: item.model_dump(mode="json") for key, item in sorted(published.runs.items())}
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
    """All runs of some files, each from the file that knows most of it, the first of those.

    Raises:
        PrimaError: a file is missing, damaged, or of other classes.
    """
    found = Published()
    for path in paths:
        found = found.merged(_read(path, [f"prob_{name}" for name in class_names]))
    return found


def _read(path: str, names: list[str]) -> Published:
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
    except (TypeError, ValueError):
        values = np.full((1, 1), np.nan)
    if not np.isfinite(values).all():
        raise PrimaError("holds probabilities that are not numbers", where=path, mend="Copy the file again.")
    exams = table["exam_id"].to_pylist()
    rows: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(table["run"].to_pylist(), table["asked"].to_pylist(), strict=True)):
        rows.setdefault(key, []).append(row)
    answers: dict[str, dict[str, Said]] = {}
    for (run, asked), mine in rows.items():
        answers.setdefault(run, {})[asked] = Said([exams[row] for row in mine], values[mine])
    return Published(answers, runs, dict.fromkeys([*runs, *answers], path))


def _facts(table: pa.Table, path: str) -> dict[str, RunFacts]:
    try:
        told = json.loads((table.schema.metadata or {})[_META])
        if told["format"] != _FORMAT:
            raise PrimaError(
                f"is of format {told['format']}, this program reads format {_FORMAT}",
                where=path,
                mend="Take it up with the version that wrote it.",
            )
        return {str(key): RunFacts.model_validate(item) for key, item in told["runs"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError):
        raise PrimaError("holds no answers of a study", where=path, mend=_MEND) from None
