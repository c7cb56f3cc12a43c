"""The shard contract: columns, types, versions, and the manifest whose presence means "finished".

A shard folder is written by ingest and read by everything else. `manifest.json` is written last: object stores have
no rename, so the manifest is the commit. A new column or file needs a new SCHEMA_VERSION and a line in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import posixpath

import pyarrow as pa
from pyarrow import fs as pafs
from pydantic import Field, ValidationError

from prima_ray.base import PrimaError, StrictConfig, hash_json, is_uri
from prima_ray.data.description import DataSetConfig

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
FOLDS = "folds.parquet"
QUARANTINE = "quarantine.parquet"
LEAKS = "leaks.json"
NEAR_DUPLICATES = "near_duplicates.json"

IMAGE_TYPE = pa.struct(
    [("image_id", pa.string()), ("bytes", pa.binary()), ("width", pa.int32()), ("height", pa.int32())]
)
SHARD_SCHEMA = pa.schema(
    [
        ("exam_id", pa.string()),
        ("patient_id", pa.string()),
        ("images", pa.list_(IMAGE_TYPE)),
        ("attributes", pa.map_(pa.string(), pa.string())),
        ("label", pa.string()),
    ]
)
"""One row an exam. Attributes that are missing have no entry; an exam without a diagnosis has a null label."""
FOLDS_SCHEMA = pa.schema([("exam_id", pa.string()), ("patient", pa.int32()), ("lesion", pa.int32())])
QUARANTINE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("patient_id", pa.string()),
        ("exam_id", pa.string()),
        ("image_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""One row a rejected record: `reason` is a short fixed code, `detail` says what was seen. `row` is null for a file."""


class ShardFile(StrictConfig):
    """One Parquet file of a shard folder."""

    path: str
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Manifest(StrictConfig):
    """`manifest.json`: what a finished shard folder holds."""

    schema_version: int
    data_set: DataSetConfig
    num_exams: int
    num_images: int
    num_quarantined: int
    class_counts: dict[str, int]
    num_folds: int
    files: tuple[ShardFile, ...]
    """The `part-*.parquet` files, in order."""
    side_files: tuple[ShardFile, ...]
    """`folds.parquet` and `quarantine.parquet`."""
    created_by: dict[str, str] = Field(default_factory=dict)

    @property
    def content_hash(self) -> str:
        """Identifies the data: the hash of every file's hash and of the description."""
        files = [(item.path, item.sha256) for item in (*self.files, *self.side_files)]
        return hash_json({"files": files, "data_set": self.data_set.model_dump(mode="json")})


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a local path or a URI (``s3://``, ``gs://``) and the path in it.

    Raises:
        PrimaError: the URI's scheme is unknown.
    """
    if not is_uri(path):
        return pafs.LocalFileSystem(), path
    try:
        filesystem, inner = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise PrimaError(f"cannot open this address ({error})", where=path) from None
    return filesystem, inner


def join(path: str, *parts: str) -> str:
    """Join paths with ``/``, for local paths and URIs alike; what follows a URI's ``?`` stays at its end."""
    head, mark, query = path.partition("?") if is_uri(path) else (path, "", "")
    return posixpath.join(head, *parts) + mark + query


def split(path: str) -> tuple[str, str]:
    """The folder that a path or a URI lies in, and its last part; inverse of `join`."""
    head, mark, query = path.rstrip("/").partition("?") if is_uri(path) else (path, "", "")
    folder, name = posixpath.split(head.rstrip("/"))
    return folder + mark + query, name


def hash_stream(filesystem: pafs.FileSystem, path: str) -> str:
    """SHA-256 (hex) of a file on any filesystem, read in pieces."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def read_manifest(shards: str) -> Manifest:
    """Read the manifest of a shard folder.

    Raises:
        PrimaError: no finished shard folder there, or one of another schema version.
    """
    filesystem, root = open_filesystem(shards)
    where = join(shards, MANIFEST)
    try:
        with filesystem.open_input_stream(join(root, MANIFEST)) as stream:
            text = stream.read().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise PrimaError(
            "no finished shard folder here (manifest.json is missing)", where=shards, mend="Run `prima ingest` first."
        ) from None
    except OSError as error:
        raise PrimaError(f"cannot be read ({' '.join(str(error).split())})", where=where) from None
    except UnicodeDecodeError:
        raise PrimaError("not valid JSON (it is not UTF-8 text)", where=where) from None
    return parse_manifest(text, where=where)


def parse_manifest(text: str, *, where: str) -> Manifest:
    """Validate the text of a manifest; see `read_manifest`."""
    import json

    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PrimaError(f"not valid JSON ({error})", where=where) from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise PrimaError(
            f"shards of schema version {version}, this program reads version {SCHEMA_VERSION}",
            where=where,
            mend="Ingest the data set again with this version of prima_ray.",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise PrimaError(f"damaged manifest: {key}: {first['msg']}", where=where) from None
