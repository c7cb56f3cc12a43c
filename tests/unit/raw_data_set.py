"""A small raw data set on disk, to break: 24 photos of 20 exams of 16 patients, with its config."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUM_EXAMS, NUM_PHOTOS = 20, 24
DATA_SET: dict[str, Any] = {
    "name": "small",
    "classes": [
        {"name": "BCC", "phrase": "basal cell carcinoma", "synonyms": ["basalioma"]},
        {"name": "NEV", "phrase": "nevus", "synonyms": ["naevus"]},
    ],
    "leaks": ["biopsed"],
    "attributes": [
        {"kind": "numeric", "name": "age", "phrase": "age {value}", "minimum": 0, "maximum": 120},
        {"kind": "boolean", "name": "itch", "phrase": "it itches", "phrase_false": "it does not itch"},
        {"kind": "categorical", "name": "region", "phrase": "on the {value}", "values": {"FACE": "face", "ARM": "arm"}},
    ],
}


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A smooth random picture: two seeds never look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class RawDataSet:
    """Rows and photos; `write` puts the table on disk, photos are there at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        self.rows: list[dict[str, str]] = []
        for exam in range(NUM_EXAMS):
            for photo in range(2 if exam % 5 == 0 else 1):
                name = f"e{exam:02}_{photo}"
                self.photo(f"{name}.jpg", encoded(picture(100 * exam + photo)))
                self.rows.append(
                    {
                        "patient_id": f"p{exam % 16:02}",
                        "lesion_id": f"{exam}",
                        "img_id": name,
                        "diagnostic": ("BCC", "NEV")[exam % 2],
                        "age": f"{30 + exam}",
                        "itch": ("True", "False", "UNK")[exam % 3],
                        "region": ("FACE", "ARM", "FACE", "ARM", "ARM", "FACE")[exam % 6],
                        "biopsed": ("True", "False", "True", "False", "True")[exam % 5],
                    }
                )

    def photo(self, name: str, data: bytes) -> Path:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def add(self, image: str = "extra", data: bytes | None = None, **cells: str) -> int:
        """A row of an exam of its own, and its photo unless ``data`` is None; returns the row's number."""
        number = len(self.rows) + 1
        if data is not None:
            self.photo(f"{image}.jpg", data)
        row = {**self.rows[0], "patient_id": f"q{number}", "lesion_id": f"l{number}", "img_id": image, **cells}
        self.rows.append(row)
        return number

    def write(self, rows: Iterable[dict[str, str]] | None = None, *, delimiter: str = ",", **options: str) -> Path:
        rows = self.rows if rows is None else list(rows)
        path = self.folder / "table.csv"
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with path.open("w", newline="", **options) as file:  # type: ignore[call-overload]
            writer = csv.DictWriter(file, names, delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return path

    def config(self, out: Path | str, **sections: Any) -> dict[str, Any]:
        """The ingest config as plain data; `data_set` and `source` are merged key by key."""
        config: dict[str, Any] = {
            "out": str(out),
            "seed": 7,
            "source": {
                "table": str(self.folder / "table.csv"),
                "images": str(self.images),
                "columns": {
                    "patient": "patient_id",
                    "exam": ["patient_id", "lesion_id"],
                    "image": "img_id",
                    "label": "diagnostic",
                },
            },
            "data_set": copy.deepcopy(DATA_SET),
            "folds": {"count": 3},
            "shards": {"rows_per_file": 8, "rows_per_group": 4},
            "context": {"kind": "local"},
        }
        for name, value in sections.items():
            config[name] = {**config[name], **value} if name in ("source", "data_set") else value
        return config
