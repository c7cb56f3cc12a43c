"""Raw data sets -> exams: a table whose rows name photos, and the folder the photos are in.

Everything here is light: the table's cells and the folder's listing, never a photo's bytes. A data set in this shape
needs a YAML and no code; another format (DICOM, nested JSON) is a reader here that ends in `Intake`.
"""

from __future__ import annotations

import difflib
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pyarrow import fs as pafs
from pydantic import Field

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.data.attributes import AttributeRejected, is_missing, normalise_value
from prima_ray.data.description import DataSetConfig
from prima_ray.data.schema import open_filesystem

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class ColumnsConfig(StrictConfig):
    """The table's key columns."""

    patient: str
    exam: tuple[str, ...] = Field(min_length=1)
    """The columns that together name an exam; they may repeat the patient's."""
    image: str
    label: str | None = None
    """The diagnosis; `null`: none of the exams has one."""


class SourceConfig(StrictConfig):
    """Where the raw data are: local paths or URIs of any pyarrow filesystem."""

    table: InputPath
    """CSV, TSV or Parquet, a row a photo."""
    images: InputPath
    """A folder. An image id names a file in it by its stem, whatever the extension; it may name subfolders."""
    columns: ColumnsConfig


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that does not become an exam: a short fixed reason and what was seen."""

    reason: str
    detail: str
    row: int | None = None
    """Row of the table, from 1, the header not counted; None for a file without a row."""
    patient_id: str | None = None
    exam_id: str | None = None
    image_id: str | None = None


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo that a row names: its id, file and row."""

    image_id: str
    path: str
    row: int


@dataclass(frozen=True, slots=True)
class Exam:
    """An exam before its photos are read."""

    exam_id: str
    patient_id: str
    photos: tuple[Photo, ...]
    attributes: Mapping[str, str]
    label: str | None


@dataclass
class Intake:
    """What a source holds: the exams, in the order of their ids, and what was turned away."""

    exams: list[Exam]
    rejected: list[Rejected]
    num_rows: int
    num_files: int
    table: pa.Table
    num_inconsistent: int = 0
    """Exams whose rows disagree on an attribute; the first row that has a value counts."""
    used_rows: list[int] = field(default_factory=list)


def read_table(path: str) -> pa.Table:
    """A table with every cell as text; null where empty.

    Raises:
        PrimaError: no such file, an unreadable one, or one without rows.
    """
    filesystem, inner = open_filesystem(path)
    try:
        if inner.endswith((".parquet", ".pq")):
            table = pq.read_table(inner, filesystem=filesystem)
        else:
            table = _read_delimited(filesystem, inner)
    except FileNotFoundError:
        raise PrimaError("no such table", where=path, mend="Check source.table.") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PrimaError(f"cannot be read as a table ({error})", where=path) from None
    if not table.num_rows:
        raise PrimaError("the table has no rows", where=path)
    return table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))


def _read_delimited(filesystem: pafs.FileSystem, path: str) -> pa.Table:
    delimiter = "\t" if path.endswith((".tsv", ".tab")) else ","
    with filesystem.open_input_stream(path) as stream:
        header = stream.read(1 << 20).split(b"\n", 1)[0].decode("utf-8-sig").strip("\r")
    names = next(iter(_csv_rows([header], delimiter)), [])
    with filesystem.open_input_stream(path) as stream:
        return pa_csv.read_csv(
            stream,
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )


def _csv_rows(lines: Sequence[str], delimiter: str) -> Iterator[list[str]]:
    import csv

    return csv.reader(lines, delimiter=delimiter)


def list_images(folder: str) -> dict[str, list[str]]:
    """Stem (with subfolders, ``/`` between) -> paths relative to the folder, of all JPEG and PNG files.

    Raises:
        PrimaError: no such folder.
    """
    filesystem, root = open_filesystem(folder)
    root = root.rstrip("/")
    try:
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except (FileNotFoundError, NotADirectoryError):
        raise PrimaError("no such folder", where=folder, mend="Check source.images.") from None
    found: dict[str, list[str]] = defaultdict(list)
    for info in infos:
        if info.type == pafs.FileType.File and info.path.lower().endswith(IMAGE_SUFFIXES):
            relative = info.path[len(root) + 1 :]
            found[posixpath.splitext(relative)[0]].append(relative)
    return dict(found)


def check_columns(table: pa.Table, columns: ColumnsConfig, data_set: DataSetConfig, *, where: str) -> None:
    """Every column that the config names must be there.

    Raises:
        PrimaError: naming the first that is not, and the nearest that is.
    """
    wanted = {
        "source.columns.patient": columns.patient,
        **{f"source.columns.exam[{index}]": name for index, name in enumerate(columns.exam)},
        "source.columns.image": columns.image,
        **({"source.columns.label": columns.label} if columns.label else {}),
        **{f"data_set.attributes: {item.name}": item.table_column for item in data_set.attributes},
    }
    for key, name in wanted.items():
        if name not in table.column_names:
            near = difflib.get_close_matches(name, table.column_names, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"The table has {', '.join(table.column_names)}."
            raise PrimaError(f"the table has no column {name!r} ({key})", where=where, mend=hint)
    if columns.label:
        for item in data_set.attributes:
            if item.table_column == columns.label:
                raise PrimaError(
                    f"attribute {item.name!r} reads the label's column {columns.label!r}",
                    where=where,
                    mend="Remove it from data_set.attributes.",
                )


def read_source(source: SourceConfig, data_set: DataSetConfig) -> Intake:
    """Match rows with photos and gather them into exams.

    Raises:
        PrimaError: the table or folder cannot be read, or a column is missing.
    """
    table = read_table(source.table)
    check_columns(table, source.columns, data_set, where=source.table)
    files = list_images(source.images)
    reader = _RowReader(source.columns, data_set, files)
    for number, cells in enumerate(_rows(table, source.columns, data_set), start=1):
        reader.take(number, cells)
    reader.reject_conflicts()
    reader.reject_files_without_row()
    exams = sorted(reader.exams(), key=lambda exam: exam.exam_id)
    return Intake(
        exams=exams,
        rejected=sorted(reader.rejected, key=lambda item: (item.row is None, item.row or 0, item.image_id or "")),
        num_rows=table.num_rows,
        num_files=sum(len(paths) for paths in files.values()),
        table=table,
        num_inconsistent=reader.num_inconsistent,
        used_rows=sorted(photo.row for exam in exams for photo in exam.photos),
    )


def _rows(table: pa.Table, columns: ColumnsConfig, data_set: DataSetConfig) -> Iterator[dict[str, Any]]:
    names = {columns.patient, *columns.exam, columns.image, *(item.table_column for item in data_set.attributes)}
    if columns.label:
        names.add(columns.label)
    for batch in table.select(sorted(names)).to_batches(max_chunksize=4096):
        yield from batch.to_pylist()


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    patient_id: str
    exam_id: str
    photo: Photo
    label: str | None
    attributes: dict[str, str]


class _RowReader:
    def __init__(self, columns: ColumnsConfig, data_set: DataSetConfig, files: Mapping[str, list[str]]) -> None:
        self.columns, self.data_set, self.files = columns, data_set, files
        self.rejected: list[Rejected] = []
        self.num_inconsistent = 0
        self._kept: dict[str, list[_Row]] = defaultdict(list)
        self._seen: dict[str, int] = {}
        self._classes = {
            spelling.lower(): item.name for item in data_set.classes for spelling in (item.name, *item.synonyms)
        }

    def take(self, number: int, cells: Mapping[str, Any]) -> None:
        """Turn one row into a photo of an exam, or into a rejection."""
        columns, missing = self.columns, self.data_set.missing
        keys = {name: cells[name] for name in (columns.patient, *columns.exam, columns.image)}
        for name, value in keys.items():
            if is_missing(value, missing):
                self.rejected.append(Rejected("missing_key", f"no value in the column {name}", row=number))
                return
        patient, image = str(keys[columns.patient]).strip(), str(keys[columns.image]).strip()
        exam = "/".join(str(keys[name]).strip() for name in columns.exam)

        def reject(reason: str, detail: str) -> None:
            self.rejected.append(Rejected(reason, detail, row=number, patient_id=patient, exam_id=exam, image_id=image))

        if image in self._seen:
            reject("duplicate_image", f"row {self._seen[image]} has the same image id")
            return
        self._seen[image] = number
        path = self._find(image, reject)
        if path is None:
            return
        label = self._label(cells)
        if label is not None and label not in self._classes.values():
            reject("unknown_class", f"{label!r} is none of {', '.join(self.data_set.class_names)}")
            return
        try:
            attributes = self._attributes(cells)
        except AttributeRejected as error:
            reject(error.reason, error.detail)
            return
        photo = Photo(image_id=image, path=path, row=number)
        self._kept[exam].append(_Row(number, patient, exam, photo, label, attributes))

    def _find(self, image: str, reject: Any) -> str | None:
        parts = image.replace("\\", "/").split("/")
        if image.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            reject("path_outside", "the image id leaves the image folder")
            return None
        stem = "/".join(parts)
        stem = posixpath.splitext(stem)[0] if stem.lower().endswith(IMAGE_SUFFIXES) else stem
        found = self.files.get(stem, [])
        if not found:
            reject("no_photo", "no file of this name in the image folder")
            return None
        if len(found) > 1:
            reject("ambiguous_photo", f"several files of this name: {', '.join(sorted(found))}")
            return None
        return found[0]

    def _label(self, cells: Mapping[str, Any]) -> str | None:
        """The class name, or the cell as it stands where it names no class; None without a diagnosis."""
        if self.columns.label is None or is_missing(cells[self.columns.label], self.data_set.missing):
            return None
        raw = str(cells[self.columns.label]).strip()
        return self._classes.get(raw.lower(), raw)

    def _attributes(self, cells: Mapping[str, Any]) -> dict[str, str]:
        found = {}
        for item in self.data_set.attributes:
            value = normalise_value(item, cells[item.table_column], missing=self.data_set.missing)
            if value is not None:
                found[item.name] = value
        return found

    def reject_conflicts(self) -> None:
        """An exam has one diagnosis and one patient; where its rows disagree, all of them go."""
        for exam, rows in list(self._kept.items()):
            labels = sorted({row.label for row in rows if row.label is not None})
            patients = sorted({row.patient_id for row in rows})
            if len(labels) <= 1 and len(patients) == 1:
                continue
            reason, values = ("conflicting_labels", labels) if len(labels) > 1 else ("conflicting_patients", patients)
            del self._kept[exam]
            for row in rows:
                self.rejected.append(
                    Rejected(
                        reason,
                        f"the exam's rows say {' and '.join(values)}",
                        row=row.number,
                        patient_id=row.patient_id,
                        exam_id=exam,
                        image_id=row.photo.image_id,
                    )
                )

    def reject_files_without_row(self) -> None:
        """Photos that no row names."""
        named = {
            posixpath.splitext(image)[0] if image.lower().endswith(IMAGE_SUFFIXES) else image for image in self._seen
        }
        for stem in sorted(set(self.files) - named):
            for path in sorted(self.files[stem]):
                self.rejected.append(Rejected("no_row", "no row of the table names this photo", image_id=path))

    def exams(self) -> Iterator[Exam]:
        """The exams that are left."""
        for exam, rows in self._kept.items():
            attributes: dict[str, str] = {}
            inconsistent = False
            for row in rows:
                for name, value in row.attributes.items():
                    inconsistent |= attributes.setdefault(name, value) != value
            self.num_inconsistent += inconsistent
            label = next((row.label for row in rows if row.label is not None), None)
            photos = tuple(sorted((row.photo for row in rows), key=lambda photo: photo.image_id))
            yield Exam(exam, rows[0].patient_id, photos, attributes, label)
