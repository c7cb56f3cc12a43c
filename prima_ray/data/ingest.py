"""Exams -> Parquet shards, by Ray Data: photos are read, checked and written part by part, never on the driver.

A part is the unit of work and of resuming: it is written aside, renamed, and noted in a marker beside it, so a run that
was broken off reads only what is missing. A task holds one row group's photos at a time, whatever the data set's size.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs as pafs
from pydantic import Field

from prima_ray.base import StrictConfig, canonical_json, hash_json
from prima_ray.data.images import FORMATS, MAX_PIXELS, ImageRejected, bare_jpeg, decode_image, encode_image, is_srgb
from prima_ray.data.near_duplicates import perceptual_hash
from prima_ray.data.schema import SCHEMA_VERSION, SHARD_SCHEMA, ShardFile, hash_stream, join, open_filesystem
from prima_ray.data.sources import Exam, Rejected

MARKERS = "_parts"
_DESCRIPTIVE = {"exif", "xmp", "photoshop", "comment", "flashpix", "mp"}
"""What PIL finds in a JPEG that may tell about a patient, or show another picture."""


class ImagesConfig(StrictConfig):
    """What becomes of a photo."""

    max_side: int | None = Field(default=1024, ge=16)
    """Longer photos are shrunk; `null` keeps every size."""
    quality: int = Field(default=92, ge=50, le=100)
    """JPEG quality of photos that are written anew. A plain sRGB JPEG that fits keeps its coded picture."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """A photo with more is rejected before it is decoded."""
    max_bytes: int = Field(default=100_000_000, ge=1)
    """A file with more is rejected before it is read."""


class ShardsConfig(StrictConfig):
    """How exams are cut into files."""

    rows_per_file: int = Field(default=200, ge=1)
    rows_per_group: int = Field(default=100, ge=1)
    """Rows that are read, and held in memory, together."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one task writes."""

    number: int
    exams: tuple[Exam, ...]
    images: str
    """The folder of the photos."""
    out: str
    config: ImagesConfig
    rows_per_group: int

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}.parquet"

    @property
    def key(self) -> str:
        """What the part's content depends on."""
        return hash_json(
            [
                [asdict(exam) for exam in self.exams],
                self.images,
                self.config.model_dump(mode="json"),
                self.rows_per_group,
                SCHEMA_VERSION,
            ]
        )


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """What a task has written."""

    file: ShardFile
    exam_ids: tuple[str, ...]
    image_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    """Of the images."""
    hashes: tuple[int, ...]
    """Perceptual hashes of the images."""
    rejected: tuple[Rejected, ...]


def cut(exams: Sequence[Exam], *, images: str, out: str, config: ImagesConfig, shards: ShardsConfig) -> list[Part]:
    """The parts of a data set."""
    return [
        Part(number, tuple(exams[start : start + shards.rows_per_file]), images, out, config, shards.rows_per_group)
        for number, start in enumerate(range(0, len(exams), shards.rows_per_file))
    ]


def write_parts_here(parts: Sequence[Part], *, progress: Callable[[int], object]) -> list[WrittenPart]:
    """Write all parts in this process, one after the other: see `write_parts`."""
    written = []
    for part in parts:
        written.append(write_part(part))
        progress(len(part.exams))
    return written


def write_parts(parts: Sequence[Part], *, progress: Callable[[int], object]) -> list[WrittenPart]:
    """Write all parts by Ray Data, a task a part; results in the order of the parts.

    Args:
        progress: is told the number of exams of every finished part.
    """
    import ray

    if not parts:
        return []
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Only now: importing ray.data sets its loggers up.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Warns that the bars are off which were turned off: ours is the one that is shown.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items(
            [{"number": part.number, "part": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts)
        ).map(_write_row)
        written: dict[int, WrittenPart] = {}
        for row in dataset.iter_rows():
            result: WrittenPart = pickle.loads(row["written"])  # noqa: S301 - what our own task returned
            written[row["number"]] = result
            progress(len(parts[row["number"]].exams))
    return [written[part.number] for part in parts]


def _write_row(row: dict[str, Any]) -> dict[str, Any]:
    # Bytes travel through Ray Data as they are; objects would be pickled one by one, with a warning each.
    written = write_part(pickle.loads(row["part"]))  # noqa: S301 - what our own driver sent
    return {"number": row["number"], "written": pickle.dumps(written)}


def write_part(part: Part) -> WrittenPart:
    """Read, check and write one part, or find it written."""
    filesystem, root = open_filesystem(part.out)
    marker = join(root, MARKERS, f"{part.name}.json")
    found = _read_marker(filesystem, marker, part, root)
    if found is not None:
        return found
    source, folder = open_filesystem(part.images)
    exam_ids: list[str] = []
    photos: list[tuple[str, str, int]] = []
    rejected: list[Rejected] = []
    # A name of its own: a task that Ray tries again may find the first attempt still writing.
    temporary = join(root, f"_{part.name}.{uuid.uuid4().hex[:8]}.tmp")
    sink = _HashingSink(filesystem.open_output_stream(temporary))
    with pq.ParquetWriter(pa.PythonFile(sink, "w"), SHARD_SCHEMA, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for row, hashes in _read_exams(part, source, folder, rejected):
            rows.append(row)
            exam_ids.append(row["exam_id"])
            photos.extend(
                (image["image_id"], row["patient_id"], value)
                for image, value in zip(row["images"], hashes, strict=True)
            )
            if len(rows) == part.rows_per_group:
                writer.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))
                rows = []
        if rows or not exam_ids:
            writer.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))
    sink.close_inner()
    filesystem.move(temporary, join(root, part.name))
    file = ShardFile(path=part.name, rows=len(exam_ids), bytes=sink.size, sha256=sink.hexdigest())
    result = WrittenPart(
        file=file,
        exam_ids=tuple(exam_ids),
        image_ids=tuple(item[0] for item in photos),
        patient_ids=tuple(item[1] for item in photos),
        hashes=tuple(item[2] for item in photos),
        rejected=tuple(rejected),
    )
    filesystem.create_dir(join(root, MARKERS), recursive=True)
    body = {**asdict(result), "file": file.model_dump(mode="json"), "key": part.key}
    with filesystem.open_output_stream(marker) as stream:
        stream.write(canonical_json(body).encode())
    return result


def _read_marker(filesystem: pafs.FileSystem, marker: str, part: Part, root: str) -> WrittenPart | None:
    """What the marker of a finished part says, None where the part must be written."""
    try:
        with filesystem.open_input_stream(marker) as stream:
            body = json.loads(stream.read().decode())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(body, dict) or body.pop("key", None) != part.key:
        return None
    file = ShardFile.model_validate(body.pop("file"))
    path = join(root, part.name)
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File or info.size != file.bytes or hash_stream(filesystem, path) != file.sha256:
        return None
    return WrittenPart(
        file=file,
        exam_ids=tuple(body["exam_ids"]),
        image_ids=tuple(body["image_ids"]),
        patient_ids=tuple(body["patient_ids"]),
        hashes=tuple(body["hashes"]),
        rejected=tuple(Rejected(**item) for item in body["rejected"]),
    )


def _read_exams(
    part: Part, source: pafs.FileSystem, folder: str, rejected: list[Rejected]
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Rows of the shard schema, and the perceptual hash of each of their photos."""
    for exam in part.exams:
        images, hashes = [], []
        for photo in exam.photos:
            try:
                data, width, height, value = read_photo(source, join(folder, photo.path), part.config)
            except ImageRejected as error:
                rejected.append(
                    Rejected(error.reason, error.detail, photo.row, exam.patient_id, exam.exam_id, photo.image_id)
                )
                continue
            images.append({"image_id": photo.image_id, "bytes": data, "width": width, "height": height})
            hashes.append(value)
        if images:
            yield (
                {
                    "exam_id": exam.exam_id,
                    "patient_id": exam.patient_id,
                    "images": images,
                    "attributes": sorted(exam.attributes.items()),
                    "label": exam.label,
                },
                hashes,
            )


def read_photo(filesystem: pafs.FileSystem, path: str, config: ImagesConfig) -> tuple[bytes, int, int, int]:
    """JPEG bytes of an upright RGB photo, its width and height, and its perceptual hash.

    Raises:
        ImageRejected: the file cannot be read or is not a usable photo.
    """
    try:
        size = filesystem.get_file_info(path).size
        if size is not None and size > config.max_bytes:
            raise ImageRejected("too_many_bytes", f"{size} bytes, at most {config.max_bytes} are read")
        with filesystem.open_input_stream(path) as stream:
            data = stream.read()
    except (OSError, UnicodeError) as error:
        raise ImageRejected("unreadable_file", str(error)) from None
    image = decode_image(data, max_pixels=config.max_pixels, draft_side=config.max_side)
    value = perceptual_hash(image)
    bare = bare_jpeg(data) if _as_it_should_be(data, config) else None
    if bare is not None:
        return bare, image.width, image.height, value
    return *encode_image(image, max_side=config.max_side, quality=config.quality), value


def _as_it_should_be(data: bytes, config: ImagesConfig) -> bool:
    """True for an sRGB JPEG of a fitting size without EXIF and its like, which may hold a rotation or a picture."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as original:
        return (
            original.format == "JPEG"
            and original.mode == "RGB"
            and not _DESCRIPTIVE & set(original.info)
            and ("icc_profile" not in original.info or is_srgb(original.info["icc_profile"]))
            and (config.max_side is None or max(original.size) <= config.max_side)
        )


class _HashingSink(io.RawIOBase):
    """Counts and hashes what is written, so that a file need not be read again."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self.size += view.nbytes
        self._inner.write(view)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def close_inner(self) -> None:
        """Close the stream below; closing this one would close it too early for the Parquet footer."""
        self._inner.close()
