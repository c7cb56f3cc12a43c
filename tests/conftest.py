"""Fixtures that several folders of tests share: a tiny shard folder with the real schema, made in milliseconds."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from PIL import Image

from prima_ray.base import write_json
from prima_ray.data.description import DataSetConfig
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
from tests.object_store import serving

# The same examples every time: a failure is one of the code under test, and can be had again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

TOY = {
    "name": "toy",
    "subject": "a skin lesion",
    "classes": [
        {"name": "BCC", "phrase": "basal cell carcinoma", "malignant": True},
        {"name": "NEV", "phrase": "nevus"},
        {"name": "SEK", "phrase": "seborrheic keratosis"},
    ],
    "attributes": [
        {"kind": "categorical", "name": "region", "phrase": "on the {value}", "values": {"FACE": "face", "ARM": "arm"}},
        {"kind": "boolean", "name": "itch", "phrase": "it itches", "phrase_false": "it does not itch"},
        {"kind": "numeric", "name": "age", "phrase": "age {value}", "unit": "years", "minimum": 0, "maximum": 120},
    ],
    "blocks": [{"name": "history", "attributes": ["age"]}],
}


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_toy_shards(
    folder: Path,
    *,
    num_exams: int = 23,
    rows_per_file: int = 8,
    rows_per_group: int = 3,
    num_folds: int = 3,
    seed: int = 0,
    rename: Mapping[str, str] | None = None,
    **described: Any,
) -> str:
    """Exams ``e000 ...`` of random pictures; every third has two photos, every seventh no label.

    Args:
        seed: of the pictures.
        rename: attribute -> another name in the shards.
        described: other keys of the data set's description.
    """
    data_set = DataSetConfig.model_validate({**TOY, **described})
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for number in range(num_exams):
        width, height = 40 + number, 48
        images = [
            {"image_id": f"i{number:03}_{photo}", "bytes": jpeg(rng, width, height), "width": width, "height": height}
            for photo in range(2 if number % 3 == 0 else 1)
        ]
        attributes = {"region": ("FACE", "ARM")[number % 2], "itch": ("true", "false")[number % 3 == 1]}
        if number % 4:
            attributes["age"] = str(20 + number)
        label = None if number % 7 == 6 else data_set.class_names[number % 3]
        rows.append(
            {
                "exam_id": f"e{number:03}",
                "patient_id": f"p{number // 2:03}",
                "images": images,
                "attributes": {(rename or {}).get(name, name): value for name, value in attributes.items()},
                "label": label,
            }
        )
    files = []
    for start in range(0, num_exams, rows_per_file):
        table = pa.Table.from_pylist(rows[start : start + rows_per_file], schema=SHARD_SCHEMA)
        name = f"part-{start // rows_per_file:05}.parquet"
        pq.write_table(table, folder / name, row_group_size=rows_per_group)
        files.append(describe_file(folder, name, table.num_rows))
    folds = [{"exam_id": row["exam_id"], "patient": int(str(row["patient_id"])[1:]) % num_folds,
              "lesion": index % num_folds} for index, row in enumerate(rows)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(folds, schema=FOLDS_SCHEMA), folder / FOLDS)
    pq.write_table(QUARANTINE_SCHEMA.empty_table(), folder / QUARANTINE)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        data_set=data_set,
        num_exams=num_exams,
        num_images=sum(len(row["images"]) for row in rows),
        num_quarantined=0,
        class_counts={name: sum(row["label"] == name for row in rows) for name in data_set.class_names},
        num_folds=num_folds,
        files=tuple(files),
        side_files=(describe_file(folder, FOLDS, num_exams), describe_file(folder, QUARANTINE, 0)),
    )
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return str(folder)


def describe_file(folder: Path, name: str, rows: int) -> ShardFile:
    data = (folder / name).read_bytes()
    return ShardFile(path=name, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """23 exams in three files of three-row groups: do not write into it."""
    return write_toy_shards(tmp_path_factory.mktemp("toy") / "shards")


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., str]:
    """A shard folder of one's own, to damage; keywords of `write_toy_shards`."""
    return lambda **options: write_toy_shards(tmp_path / "shards", **options)


def tiny_config(stage: str, shards: str, out: str) -> dict[str, Any]:
    """The config of a run of `finetune` or `fuse` over untrained towers, seconds long."""
    raw: dict[str, Any] = {
        "out": out,
        "inputs": {"shards": shards},
        "image_tower": {
            "name": "vit_tiny_patch16_224",
            "image_size": 32,
            "options": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        "views": {"image_size": 32, "num_views": 1},
        "optimizer": {"lr": 1e-2},
        "global_batch": 8,
        "max_steps": 6,
        "context": {"kind": "local", "device": "cpu"},
        # The validation fold has eight exams.
        "calibration": {"coverage": 0.8},
        "familiarity": {"familiar": 0.6},
    }
    if stage == "finetune":
        return raw
    raw["text_tower"] = {
        "config": {
            "model_type": "bert",
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "max_tokens": 48,
    }
    raw["fusion"] = {
        "kind": "qwen3",
        "trainable": "full",
        "config": {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 12,
        },
    }
    return raw


def train_tiny(stage: str, shards: str, out: Path, **changes: Any) -> Path:
    """A run of `finetune` or `fuse` over untrained towers, in seconds."""
    from prima_ray.stages.registry import config_class, run_of

    raw = {**tiny_config(stage, shards, str(out)), **changes}
    found: Path = run_of(stage)(config_class(stage).model_validate(raw))
    return found


@pytest.fixture(scope="session")
def labelled_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 exams in four folds, every class in every fold: do not write into it."""
    return write_toy_shards(tmp_path_factory.mktemp("labelled") / "shards", num_exams=40, num_folds=4)


@pytest.fixture(scope="session")
def tiny_fuse(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fuse on `labelled_shards`, test fold 0: do not write into it."""
    return train_tiny("fuse", labelled_shards, tmp_path_factory.mktemp("tiny") / "fuse")


@pytest.fixture(scope="session")
def tiny_finetune(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of finetune on `labelled_shards`, test fold 0: do not write into it."""
    return train_tiny("finetune", labelled_shards, tmp_path_factory.mktemp("tiny") / "finetune")


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``s3://...`` of a bucket on a local server; what is fetched from it goes into a temporary folder."""
    with serving() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield address


@pytest.fixture
def store(bucket: str, request: pytest.FixtureRequest) -> str:
    """An empty folder on the local server."""
    return f"{bucket}/{request.node.name.replace('[', '-').replace(']', '')}"
