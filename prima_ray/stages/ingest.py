"""Ingest: photos and a table -> shards, folds, a manifest, and a quarantine with reasons."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from prima_ray.base import PrimaError, StrictConfig, hash_file, write_atomic, write_json
from prima_ray.data.description import DataSetConfig
from prima_ray.data.ingest import MARKERS, ImagesConfig, ShardsConfig, WrittenPart, cut, write_parts
from prima_ray.data.leaks import LeaksConfig, associations, refuse_planted_leaks, report, warnings
from prima_ray.data.near_duplicates import NearDuplicatesConfig, find_near_duplicates
from prima_ray.data.schema import (
    FOLDS,
    FOLDS_SCHEMA,
    MANIFEST,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    SCHEMA_VERSION,
    Manifest,
    ShardFile,
)
from prima_ray.data.sources import Exam, Intake, Rejected, SourceConfig, read_source
from prima_ray.data.splits import assign_folds
from prima_ray.stages.rundir import RunDir, finish_run, open_run
from prima_ray.training.config import RayContextConfig
from prima_ray.training.launch import connect

_log = logging.getLogger(__name__)
WITHOUT_COUNTERPART = ("no_photo", "no_row")
"""Rows without a photo and photos without a row: common in subsets, so they have a limit of their own."""


class FoldsConfig(StrictConfig):
    """How the data set is cut for cross-validation."""

    count: int = Field(default=5, ge=2)


class QuarantineConfig(StrictConfig):
    """How much may be turned away before something must be wrong."""

    max_share: float = Field(default=0.05, ge=0, le=1)
    """Of all rows: unusable photos, impossible values, unknown classes."""
    max_without_counterpart: float = Field(default=0.6, ge=0, le=1)
    """Of all rows and photos: rows without a photo, photos without a row."""


class IngestConfig(StrictConfig):
    """A data set, and what becomes of it."""

    out: str
    seed: int = Field(default=42, ge=0)
    source: SourceConfig
    data_set: DataSetConfig
    folds: FoldsConfig = FoldsConfig()
    images: ImagesConfig = ImagesConfig()
    shards: ShardsConfig = ShardsConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    near_duplicates: NearDuplicatesConfig = NearDuplicatesConfig()
    leaks: LeaksConfig = LeaksConfig()
    context: RayContextConfig = RayContextConfig()


def run(config: IngestConfig) -> Path:
    """Ingest a data set; returns the shard folder.

    Raises:
        PrimaError: the source cannot be read, too much was turned away, or an attribute gives the label away.
    """
    run_dir = open_run(config, out=config.out, stage="ingest", execution_keys=frozenset({"context"}))
    if run_dir.finished:
        _log.info("%s: already finished, nothing to do", run_dir.path)
        return run_dir.path
    intake = read_source(config.source, config.data_set)
    _check_share(config, intake, intake.rejected)
    if not intake.exams:
        raise PrimaError("no row is left to make an exam of", where=config.source.table, mend=_reasons(intake.rejected))
    _check_leaks(config, intake)
    written = _write(config, intake, run_dir)
    rejected = [*intake.rejected, *(item for part in written for item in part.rejected)]
    _check_share(config, intake, rejected)
    kept = {exam_id for part in written for exam_id in part.exam_ids}
    exams = [exam for exam in intake.exams if exam.exam_id in kept]
    _finish(config, run_dir, intake, exams=exams, written=written, rejected=rejected)
    return run_dir.path


def _check_share(config: IngestConfig, intake: Intake, rejected: Sequence[Rejected]) -> None:
    alone = sum(item.reason in WITHOUT_COUNTERPART for item in rejected)
    other = len(rejected) - alone
    limits = config.quarantine
    total = intake.num_rows + sum(item.reason == "no_row" for item in rejected)
    if alone > limits.max_without_counterpart * total:
        raise PrimaError(
            f"{alone} of {total} rows and photos have no counterpart ({_reasons(rejected)})",
            where=config.source.table,
            mend="Check source.images and source.columns.image, or raise quarantine.max_without_counterpart.",
        )
    if other > limits.max_share * intake.num_rows:
        raise PrimaError(
            f"{other} of {intake.num_rows} rows are unusable ({_reasons(rejected)}): more than {limits.max_share:.0%}",
            where=config.source.table,
            mend="Check the data set's description against the table, or raise quarantine.max_share. First: "
            + next(f"{item.reason}: {item.detail}" for item in rejected if item.reason not in WITHOUT_COUNTERPART),
        )


def _reasons(rejected: Sequence[Rejected]) -> str:
    counts = Counter(item.reason for item in rejected)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _check_leaks(config: IngestConfig, intake: Intake) -> None:
    first_rows = [exam.photos[0].row - 1 for exam in intake.exams]
    declared = {
        name: intake.table[name].take(pa.array(first_rows)).to_pylist()
        for name in config.data_set.leaks
        if name in intake.table.column_names
    }
    refuse_planted_leaks(
        [exam.attributes for exam in intake.exams],
        [exam.label for exam in intake.exams],
        declared,
        config.data_set,
        config.leaks,
    )


def _write(config: IngestConfig, intake: Intake, run_dir: RunDir) -> list[WrittenPart]:
    from tqdm import tqdm

    connect(config.context, num_workers=0)
    out = str(run_dir.path.resolve())
    parts = cut(intake.exams, images=config.source.images, out=out, config=config.images, shards=config.shards)
    with tqdm(total=len(intake.exams), desc="ingest", unit="exam", file=sys.stderr, mininterval=1.0) as bar:
        return write_parts(parts, progress=bar.update)


def _finish(
    config: IngestConfig,
    run_dir: RunDir,
    intake: Intake,
    *,
    exams: Sequence[Exam],
    written: Sequence[WrittenPart],
    rejected: Sequence[Rejected],
) -> None:
    out = run_dir.path
    labels = [exam.label for exam in exams]
    folds = {
        "patient": assign_folds(
            labels, [exam.patient_id for exam in exams], num_folds=config.folds.count, seed=config.seed
        ),
        "lesion": assign_folds(
            labels, [exam.exam_id for exam in exams], num_folds=config.folds.count, seed=config.seed
        ),
    }
    table = pa.table({"exam_id": [exam.exam_id for exam in exams], **folds}, schema=FOLDS_SCHEMA)
    side = [
        _write_side(out / FOLDS, table),
        _write_side(out / QUARANTINE, pa.Table.from_pylist([_plain(item) for item in rejected], QUARANTINE_SCHEMA)),
    ]
    told = associations([exam.attributes for exam in exams], labels, folds["patient"], config.data_set)
    write_json(out / "leaks.json", report(told))
    pairs = find_near_duplicates(
        [name for part in written for name in part.image_ids],
        [name for part in written for name in part.patient_ids],
        [value for part in written for value in part.hashes],
        config.near_duplicates,
    )
    write_json(out / "near_duplicates.json", pairs)
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
    _clean(out, manifest)
    _summarise(
        config, intake, manifest, rejected=rejected, told=warnings(told, config.data_set, config.leaks), pairs=pairs
    )
    # Written last: a folder with a manifest is a finished one.
    write_atomic(out / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    finish_run(run_dir, seed=config.seed, inputs={}, extra={"source": config.source.model_dump(mode="json")})


def _plain(item: Rejected) -> dict[str, Any]:
    return {name: getattr(item, name) for name in QUARANTINE_SCHEMA.names}


def _write_side(path: Path, table: pa.Table) -> ShardFile:
    pq.write_table(table, path)
    return ShardFile(path=path.name, rows=table.num_rows, bytes=path.stat().st_size, sha256=hash_file(path))


def _clean(out: Path, manifest: Manifest) -> None:
    """Drop what only an unfinished folder needs: markers, temporary files, parts without an exam."""
    for marker in (out / MARKERS).glob("*"):
        marker.unlink()
    (out / MARKERS).rmdir()
    kept = {file.path for file in manifest.files}
    for path in (*out.glob("part-*.parquet"), *out.glob("_part-*.tmp")):
        if path.name not in kept:
            path.unlink()


def _summarise(
    config: IngestConfig,
    intake: Intake,
    manifest: Manifest,
    *,
    rejected: Sequence[Rejected],
    told: Sequence[str],
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
    lines += [f"warning: {text}" for text in told]
    if pairs:
        shown = "; ".join(" and ".join(pair["images"]) for pair in pairs[:3])
        lines.append(f"warning: {len(pairs)} pairs of photos of different patients look alike: {shown}")
    for line in lines:
        _log.info("ingest %s: %s", config.data_set.name, line)
