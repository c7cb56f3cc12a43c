"""Ingest: photos and a table -> shards, folds, a manifest, and a quarantine with reasons."""

from __future__ import annotations

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, model_validator

from prima_ray.base import PrimaError, StrictConfig, hash_file, write_atomic, write_json
from prima_ray.data.description import DataSetConfig, leak_columns
from prima_ray.data.ingest import MARKERS, ImagesConfig, ShardsConfig, WrittenPart, cut, write_parts, write_parts_here
from prima_ray.data.leaks import (
    LeaksConfig,
    associations,
    naming_texts,
    refuse_planted_leaks,
    report,
    warnings,
)
from prima_ray.data.near_duplicates import NearDuplicatesConfig, find_near_duplicates
from prima_ray.data.run_record import CONFIG, RECORD
from prima_ray.data.schema import (
    FOLDS,
    FOLDS_SCHEMA,
    LEAKS,
    MANIFEST,
    NEAR_DUPLICATES,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    SCHEMA_VERSION,
    Manifest,
    ShardFile,
    read_manifest,
)
from prima_ray.data.sources import Exam, Intake, Rejected, SourceConfig, read_source
from prima_ray.data.splits import assign_folds, check_classes
from prima_ray.stages.out_folder import OutFolder, open_out
from prima_ray.stages.out_lock import locked
from prima_ray.stages.rundir import RunDir, check_finished, finish_run, is_fresh, open_run
from prima_ray.training.cluster import connect
from prima_ray.training.config import LocalContextConfig, RayContextConfig, RayFirstContextConfig

_log = logging.getLogger(__name__)
WITHOUT_COUNTERPART = ("no_photo", "no_row")
"""Rows without a photo and photos without a row: common in subsets, so they have a limit of their own."""
EXECUTION_KEYS = frozenset({"context", "quarantine"})
"""Where it runs and when it gives up: neither changes what is written."""


class FoldsConfig(StrictConfig):
    """How the data set is cut for cross-validation."""

    count: int = Field(default=5, ge=2)


class QuarantineConfig(StrictConfig):
    """How much may be turned away before something must be wrong."""

    max_share: float = Field(default=0.5, ge=0, le=1)
    """Of the rows with a photo: unusable photos, impossible values, unknown classes."""
    max_without_counterpart: float = Field(default=0.6, ge=0, le=1)
    """Of all rows and photos: rows without a photo, photos without a row."""


class IngestConfig(StrictConfig):
    """A data set, and what becomes of it."""

    out: str
    """A folder, or an address such as ``s3://bucket/folder``: on a cluster of several machines all must reach it."""
    seed: int = Field(default=42, ge=0)
    source: SourceConfig
    data_set: DataSetConfig
    folds: FoldsConfig = FoldsConfig()
    images: ImagesConfig = ImagesConfig()
    shards: ShardsConfig = ShardsConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    near_duplicates: NearDuplicatesConfig = NearDuplicatesConfig()
    leaks: LeaksConfig = LeaksConfig()
    context: RayFirstContextConfig = RayContextConfig()
    """`local` writes in this process, which is quicker for small data sets: no cluster is started."""

    @model_validator(mode="after")
    def _accepted(self) -> Self:
        names = self.data_set.attribute_names
        for name in self.leaks.accept:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
                raise ValueError(f"leaks.accept: there is no attribute {name!r}; {hint}")
        return self


def run(config: IngestConfig) -> str:
    """Ingest a data set; returns the shard folder, as `out` names it.

    Raises:
        PrimaError: the source cannot be read, too much was turned away, or an attribute gives the label away.
    """
    with open_out(config.out) as out, ExitStack() as until_done:
        # A mistake in the description leaves no folder behind, which its mended config could then not use.
        run_dir = None if is_fresh(str(out.local)) else _open(config, out, until_done)
        if run_dir is None or not (run_dir.finished or (out.local / MANIFEST).exists()):
            run_dir = _make(config, out, run_dir, until_done)
        if run_dir.finished:
            check_finished(run_dir)
            _log.info("%s: already finished, nothing to do", config.out)
        else:
            _close(config, out, run_dir)
    return config.out


def _make(config: IngestConfig, out: OutFolder, run_dir: RunDir | None, until_done: ExitStack) -> RunDir:
    """Everything up to the manifest."""
    intake = read_source(config.source, config.data_set)
    _check_share(config, intake, intake.rejected)
    _check_any(config, intake.exams, intake.rejected)
    check_classes(*_labels_and_patients(intake.exams), num_folds=config.folds.count)
    _check_leaks(config, intake)
    run_dir = run_dir or _open(config, out, until_done)
    if run_dir.finished or (out.local / MANIFEST).exists():
        return run_dir  # by another process, while this one read the table
    written = _write(config, intake, out)
    rejected = [*intake.rejected, *(item for part in written for item in part.rejected)]
    _check_share(config, intake, rejected)
    kept = {exam_id for part in written for exam_id in part.exam_ids}
    exams = [exam for exam in intake.exams if exam.exam_id in kept]
    _check_any(config, exams, rejected)
    _finish(config, out, intake, exams=exams, written=written, rejected=rejected)
    return run_dir


def _open(config: IngestConfig, out: OutFolder, until_done: ExitStack) -> RunDir:
    try:
        run_dir = open_run(config, out=str(out.local), stage="ingest", execution_keys=EXECUTION_KEYS)
        if not out.is_remote:  # an object store has no locks
            run_dir, _ = until_done.enter_context(locked(run_dir))
    except PrimaError as error:
        # Of an address the user knows nothing of a local copy.
        raise PrimaError(error.what, where=config.out, mend=error.mend) from None
    if not run_dir.finished:
        out.push(CONFIG)
    return run_dir


def _labels_and_patients(exams: Sequence[Exam]) -> tuple[list[str | None], list[str]]:
    return [exam.label for exam in exams], [exam.patient_id for exam in exams]


def _check_any(config: IngestConfig, exams: Sequence[Exam], rejected: Sequence[Rejected]) -> None:
    if not exams:
        raise PrimaError(
            "no row is left to make an exam of", where=config.source.table, mend=f"Quarantined: {_reasons(rejected)}."
        )


def _check_share(config: IngestConfig, intake: Intake, rejected: Sequence[Rejected]) -> None:
    alone = sum(item.reason in WITHOUT_COUNTERPART for item in rejected)
    other = len(rejected) - alone
    limits = config.quarantine
    with_photo = intake.num_rows - sum(item.reason == "no_photo" for item in rejected)
    total = intake.num_rows + sum(item.reason == "no_row" for item in rejected)
    if alone > limits.max_without_counterpart * total:
        raise PrimaError(
            f"{alone} of {total} rows and photos have no counterpart ({_reasons(rejected)}), more than "
            f"{limits.max_without_counterpart:.0%}",
            where=config.source.table,
            mend="Check source.images and source.columns.image, or raise quarantine.max_without_counterpart.",
        )
    if other > limits.max_share * with_photo:
        first = next(item for item in rejected if item.reason not in WITHOUT_COUNTERPART)
        raise PrimaError(
            f"{other} of {with_photo} rows with a photo are unusable ({_reasons(rejected)}), more than "
            f"{limits.max_share:.0%}",
            where=config.source.table,
            mend=f"The first, row {first.row}: {first.detail}. Mend the table or the description, or raise "
            "quarantine.max_share.",
        )


def _reasons(rejected: Sequence[Rejected]) -> str:
    counts = Counter(item.reason for item in rejected)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _check_leaks(config: IngestConfig, intake: Intake) -> None:
    first_rows = [exam.photos[0].row - 1 for exam in intake.exams]
    declared = {
        name: intake.table[name].take(pa.array(first_rows)).to_pylist()
        for name in leak_columns(config.data_set.leaks, intake.table.column_names)
    }
    refuse_planted_leaks(
        [exam.attributes for exam in intake.exams],
        [exam.label for exam in intake.exams],
        declared,
        config.data_set,
        config.leaks,
    )


def _write(config: IngestConfig, intake: Intake, out: OutFolder) -> list[WrittenPart]:
    from tqdm import tqdm

    write = write_parts_here
    if not isinstance(config.context, LocalContextConfig):
        connect(config.context, num_workers=0)
        write = write_parts
    parts = cut(intake.exams, images=config.source.images, out=out.address, config=config.images, shards=config.shards)
    with tqdm(total=len(intake.exams), desc="ingest", unit="exam", file=sys.stderr, mininterval=1.0) as bar:
        return write(parts, progress=bar.update)


def _finish(
    config: IngestConfig,
    out: OutFolder,
    intake: Intake,
    *,
    exams: Sequence[Exam],
    written: Sequence[WrittenPart],
    rejected: Sequence[Rejected],
) -> None:
    labels, patients = _labels_and_patients(exams)
    lesions = [exam.exam_id for exam in exams]
    folds = {
        name: assign_folds(labels, groups, num_folds=config.folds.count, seed=config.seed)
        for name, groups in (("patient", patients), ("lesion", lesions))
    }
    table = pa.table({"exam_id": lesions, **folds}, schema=FOLDS_SCHEMA)
    side = [
        _write_side(out.local / FOLDS, table),
        _write_side(
            out.local / QUARANTINE, pa.Table.from_pylist([_plain(item) for item in rejected], QUARANTINE_SCHEMA)
        ),
    ]
    rows = [exam.attributes for exam in exams]
    told = associations(rows, labels, folds["patient"], config.data_set)
    naming = naming_texts(rows, labels, config.data_set)
    write_json(out.local / LEAKS, report(told, naming))
    pairs = find_near_duplicates(
        [name for part in written for name in part.image_ids],
        [name for part in written for name in part.patient_ids],
        [value for part in written for value in part.hashes],
        config.near_duplicates,
    )
    write_json(out.local / NEAR_DUPLICATES, pairs)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        data_set=config.data_set,
        num_exams=len(exams),
        num_images=sum(len(part.image_ids) for part in written),
        num_quarantined=len(rejected),
        class_counts={name: labels.count(name) for name in config.data_set.class_names},
        num_folds=config.folds.count,
        files=tuple(part.file for part in written if part.file.rows),
        side_files=tuple(side),
    )
    notes = [*_fold_notes(labels, folds, config), *warnings(told, naming, config.data_set, config.leaks)]
    _summarise(config, intake, manifest, rejected=rejected, notes=notes, pairs=pairs)
    out.push(FOLDS, QUARANTINE, LEAKS, NEAR_DUPLICATES)
    # The commit: a folder with a manifest is a finished one.
    write_atomic(out.local / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    out.push(MANIFEST)


def _close(config: IngestConfig, out: OutFolder, run_dir: RunDir) -> None:
    """Clean a folder whose manifest is written of what only an unfinished one needs, and write its record."""
    out.clean(keep={file.path for file in read_manifest(str(out.local)).files}, folder=MARKERS)
    finish_run(run_dir, seed=config.seed, inputs={}, extra={"source": config.source.model_dump(mode="json")})
    out.push(RECORD)


def _fold_notes(
    labels: Sequence[str | None], folds: Mapping[str, NDArray[np.int32]], config: IngestConfig
) -> Iterator[str]:
    for name in config.data_set.class_names:
        members = [position for position, label in enumerate(labels) if label == name]
        if not members:
            if config.source.columns.label:
                yield f"class {name} has no exam"
            continue
        for split, numbers in folds.items():
            absent = sorted(set(range(config.folds.count)) - set(numbers[members].tolist()))
            if absent:
                yield f"class {name} has no exam in fold {', '.join(map(str, absent))} of the {split} split"


def _plain(item: Rejected) -> dict[str, Any]:
    return {name: getattr(item, name) for name in QUARANTINE_SCHEMA.names}


def _write_side(path: Path, table: pa.Table) -> ShardFile:
    pq.write_table(table, path)
    return ShardFile(path=path.name, rows=table.num_rows, bytes=path.stat().st_size, sha256=hash_file(path))


def _summarise(
    config: IngestConfig,
    intake: Intake,
    manifest: Manifest,
    *,
    rejected: Sequence[Rejected],
    notes: Sequence[str],
    pairs: Sequence[dict[str, Any]],
) -> None:
    classes = ", ".join(f"{name} {count}" for name, count in manifest.class_counts.items())
    lines = [
        f"{manifest.num_images} photos in {manifest.num_exams} exams ({classes}) from {intake.num_rows} rows and "
        f"{intake.num_files} files",
        f"quarantine: {_reasons(rejected)}" if rejected else "quarantine: nothing",
    ]
    if intake.num_inconsistent:
        lines.append(f"{intake.num_inconsistent} exams have rows that disagree on an attribute: the first one counts")
    lines += [f"warning: {text}" for text in notes]
    if pairs:
        shown = "; ".join(" and ".join(pair["images"]) for pair in pairs[:3])
        lines.append(f"warning: {len(pairs)} pairs of photos of different patients look alike: {shown}")
    for line in lines:
        _log.info("ingest %s: %s", config.data_set.name, line)
