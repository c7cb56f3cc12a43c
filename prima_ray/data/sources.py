"""Raw data sets -> exams: a table whose rows name photos, and the folder the photos are in.

Everything here is light: the table's cells and the folder's listing, never a photo's bytes. Nothing is lost: a row
becomes a photo of an exam or a `Rejected`, and a photo that no row names becomes a `Rejected` as well. A data set in
this shape needs a YAML and no code; another format (DICOM, nested JSON) is a reader here that ends in `Intake`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field, field_validator

from prima_ray.base import InputPath, PrimaError, StrictConfig
from prima_ray.data.attributes import is_missing, normalise_value
from prima_ray.data.description import DataSetConfig
from prima_ray.data.photo_folder import PhotoFile, PhotoFolder, list_photos
from prima_ray.data.rejection import RecordRejected
from prima_ray.data.tables import read_table


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
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Between a text table's cells; `null`: a tab in .tsv files, else a comma."""
    encoding: str = "utf8"
    """Of a text table."""
    follow_links: bool = False
    """Take photos that are links to elsewhere, on a local disk. Without it a link cannot lead out of the folder."""

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        if value is not None and (not value.isascii() or value in '\0\r\n"'):
            raise ValueError(f"{value!r} cannot separate cells: give an ASCII character such as ',', ';' or '|'")
        return value


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
    """Relative to the folder of the photos."""
    row: int
    size: int
    modified_ns: int
    """With the size: a photo that was replaced is read again when an ingest is taken up."""


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


def read_source(source: SourceConfig, data_set: DataSetConfig) -> Intake:
    """Match rows with photos and gather them into exams.

    Raises:
        PrimaError: the table or folder cannot be read, or a column is missing.
    """
    wanted = wanted_columns(source.columns, data_set)
    table = read_table(source.table, wanted, leaks=data_set.leaks, delimiter=source.delimiter, encoding=source.encoding)
    folder = list_photos(source.images, follow_links=source.follow_links)
    reader = _RowReader(source.columns, data_set, folder)
    number = 0
    for batch in table.select(list(dict.fromkeys(wanted.values()))).to_batches(max_chunksize=4096):
        for cells in batch.to_pylist():
            number += 1
            reader.take(number, cells)
    reader.reject_conflicts()
    reader.reject_photos_without_row()
    exams = sorted(reader.exams(), key=lambda exam: exam.exam_id)
    return Intake(
        exams=exams,
        rejected=sorted(reader.rejected, key=lambda item: (item.row is None, item.row or 0, item.image_id or "")),
        num_rows=table.num_rows,
        num_files=sum(1 for _ in folder.photos),
        table=table,
        num_inconsistent=reader.num_inconsistent,
    )


def wanted_columns(columns: ColumnsConfig, data_set: DataSetConfig) -> dict[str, str]:
    """Config key -> the column that it names.

    Raises:
        PrimaError: an attribute reads the label's column.
    """
    for item in data_set.attributes:
        if item.table_column == columns.label:
            raise PrimaError(
                f"attribute {item.name!r} reads the label's column {columns.label!r}",
                mend="Remove it from data_set.attributes.",
            )
    return {
        "source.columns.patient": columns.patient,
        **{f"source.columns.exam[{index}]": name for index, name in enumerate(columns.exam)},
        "source.columns.image": columns.image,
        **({"source.columns.label": columns.label} if columns.label else {}),
        **{f"data_set.attributes: {item.name}": item.table_column for item in data_set.attributes},
    }


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    patient_id: str
    exam_id: str
    photo: Photo
    label: str | None
    attributes: dict[str, str]


class _RowReader:
    def __init__(self, columns: ColumnsConfig, data_set: DataSetConfig, folder: PhotoFolder) -> None:
        self.columns, self.data_set, self.folder = columns, data_set, folder
        self.rejected: list[Rejected] = []
        self.num_inconsistent = 0
        self._kept: dict[str, list[_Row]] = defaultdict(list)
        self._labels: dict[str, set[str]] = defaultdict(set)
        """Every diagnosis that any row gives an exam, also a row without a photo."""
        self._named: dict[str, int] = {}
        """Photo -> the first row that names it."""
        self._classes = {
            spelling.strip().lower(): item.name for item in data_set.classes for spelling in (item.name, *item.synonyms)
        }

    def take(self, number: int, cells: Mapping[str, Any]) -> None:
        """Turn one row into a photo of an exam, or into a rejection."""
        columns = self.columns
        patient, image = self._key(cells[columns.patient]), self._key(cells[columns.image])
        exam = _exam_id([self._key(cells[name]) for name in columns.exam])
        try:
            label = self._label(cells)
            if exam is not None and label in self.data_set.class_names:
                self._labels[exam].add(label)
            if image is None:
                raise RecordRejected("no_photo", f"no value in the column {columns.image}")
            photo = self._photo(image, number)
            if patient is None or exam is None:
                empty = next(name for name in (columns.patient, *columns.exam) if self._key(cells[name]) is None)
                raise RecordRejected("missing_key", f"no value in the column {empty}")
            if label is not None and label not in self.data_set.class_names:
                raise RecordRejected("unknown_class", f"{label!r} is none of {', '.join(self.data_set.class_names)}")
            attributes = self._attributes(cells)
        except RecordRejected as error:
            self.rejected.append(Rejected(error.reason, error.detail, number, patient, exam, image))
        else:
            self._kept[exam].append(_Row(number, patient, exam, photo, label, attributes))

    def _key(self, cell: Any) -> str | None:
        return None if is_missing(cell, self.data_set.missing) else str(cell).strip()

    def _photo(self, image: str, number: int) -> Photo:
        file: PhotoFile = self.folder.find(image)
        first = self._named.setdefault(file.path, number)
        if first != number:
            raise RecordRejected("duplicate_image", f"row {first} names the same photo, {file.path}")
        return Photo(image, file.path, number, file.size, file.modified_ns)

    def _label(self, cells: Mapping[str, Any]) -> str | None:
        """The class name, or the cell as it stands where it names no class; None without a diagnosis."""
        if self.columns.label is None:
            return None
        raw = str(cells[self.columns.label] or "").strip()
        found = self._classes.get(raw.lower())
        return found if found is not None else self._key(raw)

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
            labels = sorted(self._labels[exam])
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

    def reject_photos_without_row(self) -> None:
        """Photos that no row names."""
        for file in self.folder.photos:
            if file.path not in self._named:
                self.rejected.append(Rejected("no_row", "no row of the table names this photo", image_id=file.path))

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


def _exam_id(parts: list[str | None]) -> str | None:
    """The exam's key columns in one text; None where one is missing."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    # ("a/b", "c") and ("a", "b/c") are two exams.
    return known[0] if len(known) == 1 else "/".join(part.replace("%", "%25").replace("/", "%2F") for part in known)
