"""Texts as shards: a row a text, so that everything that plans and streams exams does so with texts.

`exam_id` is the text's name, `patient_id` what it belongs to, the attribute `text` the text, and the label and the
fold say on which side of the split it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prima_ray.base import hash_file, write_atomic, write_json
from prima_ray.data.description import ClassConfig, DataSetConfig, TextAttribute
from prima_ray.data.schema import (
    FOLDS,
    FOLDS_SCHEMA,
    MANIFEST,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    SCHEMA_VERSION,
    SHARD_SCHEMA,
    Manifest,
    ShardFile,
)

TEXT = "text"
TRAIN, HELD_OUT = "train", "held_out"
_PART = "part-00000.parquet"
_ROWS_PER_GROUP = 256


@dataclass(frozen=True)
class SideText:
    """A text and its side."""

    name: str
    owner: str
    text: str
    held_out: bool


def text_data_set() -> DataSetConfig:
    """The description that the manifest of text shards carries."""
    return DataSetConfig(
        name="texts",
        subject="a text",
        classes=(ClassConfig(name=TRAIN, phrase="trains"), ClassConfig(name=HELD_OUT, phrase="is held out")),
        attributes=(TextAttribute(kind="text", name=TEXT, phrase="{value}", max_chars=1_000_000),),
    )


def write_text_shards(folder: Path, texts: Sequence[SideText]) -> None:
    """Write texts as a finished shard folder; the manifest comes last."""
    rows = [
        {
            "exam_id": item.name,
            "patient_id": item.owner,
            "images": [],
            "attributes": [(TEXT, item.text)],
            "label": HELD_OUT if item.held_out else TRAIN,
        }
        for item in texts
    ]
    folds = [
        {"exam_id": item.name, "patient": int(not item.held_out), "lesion": int(not item.held_out)} for item in texts
    ]
    tables = {
        _PART: pa.Table.from_pylist(rows, schema=SHARD_SCHEMA),
        FOLDS: pa.Table.from_pylist(folds, schema=FOLDS_SCHEMA),
        QUARANTINE: QUARANTINE_SCHEMA.empty_table(),
    }
    files = {name: _write(folder, name, table) for name, table in tables.items()}
    num_held_out = sum(item.held_out for item in texts)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        data_set=text_data_set(),
        num_exams=len(texts),
        num_images=0,
        num_quarantined=0,
        class_counts={TRAIN: len(texts) - num_held_out, HELD_OUT: num_held_out},
        num_folds=2,
        files=(files[_PART],),
        side_files=(files[FOLDS], files[QUARANTINE]),
    )
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def _write(folder: Path, name: str, table: pa.Table) -> ShardFile:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_ROWS_PER_GROUP)
    data = sink.getvalue().to_pybytes()
    write_atomic(folder / name, data)
    return ShardFile(path=name, rows=table.num_rows, bytes=len(data), sha256=hash_file(folder / name))
