"""A finished run that diagnoses, with the exams that it may be scored on: what `prima evaluate` and `prima compare`
open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prima_ray.base import PrimaError
from prima_ray.config import read_yaml
from prima_ray.data.fetched import local_copy
from prima_ray.data.plan import ExamIndex, Roles, split_roles
from prima_ray.data.run_record import CONFIG, RECORD, check_outputs, read_record
from prima_ray.evaluation.comparison import check_unseen
from prima_ray.inference.bundle import read_calibration
from prima_ray.inference.calibration import Calibration

MEND = "Copy the run again, or train it again."


@dataclass(frozen=True)
class TestedRun:
    """A finished run that diagnoses, and the data it was trained on."""

    __test__ = False  # of pytest

    address: str
    """As the user named it."""
    path: Path
    """A local copy of it, where it lies on an object store."""
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    index: ExamIndex
    roles: Roles
    """Exams with a diagnosis."""
    model: str
    """The name of ours in the tables."""

    @property
    def unvetted(self) -> bool:
        """It, or one before it, used entries of a corpus that nobody has vetted."""
        # Runs of before there were corpora do not say.
        return bool(self.record.get("unvetted", False))

    @property
    def calibration(self) -> Calibration:
        """What was fitted; of a run of before there was one, that nothing was."""
        return read_calibration(self.path / "model") or Calibration.none()

    @property
    def shared_patients(self) -> int:
        """Test patients of whom another exam trained the run: none, unless it was split by lesion."""
        trained = np.concatenate([self.roles.train, self.roles.val])
        return len(set(self.index.patient_ids[trained]) & set(self.index.patient_ids[self.roles.test]))


def open_tested(address: str, shards: str | None = None) -> TestedRun:
    """Open a run of finetune or fuse.

    Args:
        shards: where the run's shards are now; default where they were.

    Raises:
        PrimaError: no finished run that diagnoses, a file of it is missing, its shards are gone or were replaced, it
            holds nothing out (`fold: none`), or what it holds out leaks into what it was trained on.
    """
    record, path = read_diagnosing(address)
    check_outputs(path, record)
    config = read_yaml(path / CONFIG)
    absent = [key for key in ("fold", "val_fold", "split") if key not in config]
    if absent:
        raise PrimaError(f"damaged: it has no key {absent[0]!r}", where=path / CONFIG)
    if config["fold"] == "none":
        raise PrimaError(
            "this run trained on every fold (fold: none): no exam is held out to score it on",
            where=path,
            mend="Score a run of the same config with a test fold; the data it saw says nothing about new patients.",
        )
    index = read_trained_shards(record, path, shards)
    roles = split_roles(index, fold=config["fold"], val_fold=config["val_fold"], split=config["split"])
    roles = Roles(*(rows[index.labels[rows] >= 0] for rows in (roles.train, roles.val, roles.test)))
    if not len(roles.test):
        raise PrimaError(f"no exam of the test fold {config['fold']} has a diagnosis", where=index.shards)
    trained = np.concatenate([roles.train, roles.val])
    check_unseen(index.exam_ids[trained], index.exam_ids[roles.test], what="exam", where=address)
    if config["split"] == "patient":
        check_unseen(index.patient_ids[trained], index.patient_ids[roles.test], what="patient", where=address)
    return TestedRun(address, path, record, config, index, roles, model_name(record))


def read_diagnosing(address: str) -> tuple[dict[str, Any], Path]:
    """The record of a finished run that diagnoses, and its local copy.

    Raises:
        PrimaError: there is none, or it is of another stage.
    """
    record, path = read_record(address), local_copy(address)
    if record["stage"] not in ("finetune", "fuse"):
        raise PrimaError(
            f"a run of {record['stage']} does not diagnose", where=path, mend="Name a run of `prima fuse`."
        )
    return record, path


def model_name(record: Mapping[str, Any]) -> str:
    """What tables call the model of a run."""
    return "PRIMA (photos and attributes)" if record["stage"] == "fuse" else "photos alone"


def read_trained_shards(record: Mapping[str, Any], path: Path, shards: str | None = None) -> ExamIndex:
    """The shards that a run was trained on.

    Raises:
        PrimaError: they are gone, or were replaced.
    """
    if "shards" not in record["inputs"]:
        raise PrimaError("damaged: its inputs do not name the shards", where=path / RECORD, mend=MEND)
    parent = record["inputs"]["shards"]
    return _read_shards(shards or parent["path"], parent["hash"], moved=shards is None)


def _read_shards(shards: str, wanted: str, *, moved: bool) -> ExamIndex:
    try:
        index = ExamIndex.read(shards)
    except PrimaError as error:
        if moved and not Path(shards).exists() and "://" not in shards:
            raise PrimaError(
                "the run's shards are no longer here", where=shards, mend="Say where they are: --shards FOLDER."
            ) from None
        raise error
    if index.manifest.content_hash != wanted:
        raise PrimaError(
            f"these are not the shards that the run was trained on: content hash {index.manifest.content_hash[:12]}, "
            f"the run's record says {wanted[:12]}",
            where=shards,
            mend="Their folds may differ, so test exams may have been trained on. Name the right ones with --shards.",
        )
    return index
