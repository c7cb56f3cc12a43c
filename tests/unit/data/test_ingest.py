from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from pyarrow import fs as pafs

from prima_ray.base import hash_file
from prima_ray.data.images import ImageRejected
from prima_ray.data.ingest import ImagesConfig, Part, ShardsConfig, cut, read_photo, write_part
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.data.sources import Exam, Photo
from tests.unit.raw_data_set import encoded, picture

LOCAL = pafs.LocalFileSystem()


def photo(image_id: str, path: Path, row: int = 1) -> Photo:
    return Photo(image_id, path.name, row, path.stat().st_size, path.stat().st_mtime_ns)


def make_exams(folder: Path, count: int, data: bytes | None = None) -> list[Exam]:
    folder.mkdir(exist_ok=True)
    exams = []
    for number in range(count):
        path = folder / f"i{number}.jpg"
        path.write_bytes(data or encoded(picture(number)))
        label = ("A", None)[number % 2]
        exams.append(Exam(f"e{number:03}", "p", (photo(f"i{number}", path, number + 1),), {"b": "2", "a": "1"}, label))
    return exams


def make_part(folder: Path, exams: list[Exam], config: ImagesConfig | None = None, **keys: int) -> Part:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    shards = ShardsConfig(**{"rows_per_file": 1000, "rows_per_group": 4, **keys})
    images = str(folder / "images")
    return cut(exams, images=images, out=str(out), config=config or ImagesConfig(), shards=shards)[0]


def kept(data: bytes, folder: Path, config: ImagesConfig | None = None) -> tuple[bytes, int, int]:
    path = folder / "photo"
    path.write_bytes(data)
    return read_photo(LOCAL, str(path), config or ImagesConfig())[:3]


def pixels(data: bytes) -> NDArray[np.int16]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).astype(np.int16)


def test_a_part_holds_its_exams_as_the_contract_says(tmp_path: Path):
    exams = make_exams(tmp_path / "images", 10)
    written = write_part(make_part(tmp_path, exams))
    path = tmp_path / "out" / "part-00000.parquet"
    table = pq.read_table(path)
    assert table.schema.equals(SHARD_SCHEMA)
    assert pq.ParquetFile(path).num_row_groups == 3
    row = table.to_pylist()[1]
    assert (row["exam_id"], row["patient_id"], row["label"]) == ("e001", "p", None)
    assert row["attributes"] == [("a", "1"), ("b", "2")]
    image = row["images"][0]
    assert (image["image_id"], image["width"], image["height"]) == ("i1", 40, 32)
    assert image["bytes"] == (tmp_path / "images" / "i1.jpg").read_bytes()
    assert written.file.rows == 10
    assert written.file.bytes == path.stat().st_size
    assert written.exam_ids == tuple(exam.exam_id for exam in exams)
    assert len(written.hashes) == len(written.image_ids) == len(written.patient_ids) == 10
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_photos_that_cannot_be_used_are_turned_away_and_the_exam_stays_if_it_has_another(tmp_path: Path):
    exams = make_exams(tmp_path / "images", 3)
    folder = tmp_path / "images"
    (folder / "i0.jpg").write_text("a letter")
    (folder / "i2.jpg").unlink()
    (folder / "bad.jpg").write_bytes(encoded(picture(1, 300, 300))[:-200])
    exams[1] = replace(exams[1], photos=(photo("bad", folder / "bad.jpg", 9), *exams[1].photos))
    written = write_part(make_part(tmp_path, exams))
    assert written.exam_ids == ("e001",)
    assert [(item.row, item.exam_id, item.image_id, item.reason) for item in written.rejected] == [
        (1, "e000", "i0", "not_an_image"),
        (9, "e001", "bad", "truncated_image"),
        (3, "e002", "i2", "unreadable_file"),
    ]


def test_a_part_without_a_usable_photo_is_a_file_without_rows(tmp_path: Path):
    written = write_part(make_part(tmp_path, make_exams(tmp_path / "images", 2, b"x")))
    assert (written.file.rows, written.exam_ids) == (0, ())
    assert pq.read_table(tmp_path / "out" / "part-00000.parquet").schema.equals(SHARD_SCHEMA)


def test_plain_photos_keep_their_bytes_and_others_are_written_anew(tmp_path: Path):
    plain = encoded(picture(1))
    assert kept(plain, tmp_path) == (plain, 40, 32)
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    for data in (
        encoded(picture(1), exif=exif),
        encoded(picture(1), comment="Jane Doe"),
        encoded(picture(1), xmp=b"Jane Doe"),
        encoded(picture(1).convert("L")),
        encoded(picture(1).convert("CMYK")),
        encoded(picture(1), "PNG"),
    ):
        new, width, height = kept(data, tmp_path)
        assert (width, height) == (40, 32)
        assert new != data
        with Image.open(io.BytesIO(new)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
        assert b"Jane Doe" not in new


def planted(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2) + body


@pytest.mark.parametrize("progressive", [False, True])
def test_what_is_planted_around_the_picture_does_not_come_along(tmp_path: Path, progressive: bool):
    plain = encoded(picture(1), progressive=progressive)
    assert kept(plain, tmp_path)[0] == plain
    name = b"Jane Doe"
    thumbnail = planted(0xE0, b"JFIF\0\1\1\0\0\1\0\1\1\3" + name + b"\0")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    scan = plain.index(b"\xff\xda")
    for data in (
        plain + name,
        plain + plain,
        plain[:2] + thumbnail + plain[20:],
        *(plain[:20] + planted(marker, name) + plain[20:] for marker in range(0xE1, 0xF0)),
        plain[:20] + planted(0xE0, b"JFXX\0" + name) + plain[20:],
        plain[:20] + planted(0xE2, b"ICC_PROFILE\0\1\1" + srgb + name) + plain[20:],
        plain[:scan] + planted(0xED, name) + plain[scan:],
    ):
        assert kept(data, tmp_path)[0] == plain
    # Read, but unusual: written anew.
    for data in (
        plain[:20] + planted(0xFE, name) + plain[20:],
        plain[:20] + plain[2:20] + plain[20:],
    ):
        new = kept(data, tmp_path)[0]
        assert new != plain
        assert name not in new
        assert np.abs(pixels(new) - pixels(plain)).max() < 40


def test_the_colours_of_another_profile_become_srgb(tmp_path: Path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same profile under another name, with red and green colourants exchanged.
    swapped = srgb.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")).replace(b"sRGB", b"mine")
    swapped = swapped.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    red = Image.new("RGB", (32, 32), (200, 0, 0))
    for kind in ("JPEG", "PNG"):
        green = pixels(kept(encoded(red, kind, icc_profile=swapped), tmp_path)[0])[16, 16]
        assert green[0] < 50
        assert green[1] > 150
        for useless in (lab, b"no profile"):
            new = kept(encoded(red, kind, icc_profile=useless), tmp_path)[0]
            assert pixels(new)[16, 16, 0] > 190
            assert b"no profile" not in new


def test_a_picture_behind_the_picture_does_not_come_along(tmp_path: Path):
    behind = encoded(picture(1), "MPO", save_all=True, append_images=[picture(2, 90, 90)])
    new, _, _ = kept(behind, tmp_path)
    assert len(new) < len(encoded(picture(1), quality=92)) + 100


def test_long_photos_are_shrunk_to_the_configured_side(tmp_path: Path):
    config = ImagesConfig(max_side=64)
    for size, expected in (((256, 128), (64, 32)), ((128, 128), (64, 64)), ((64, 10), (64, 10))):
        data = encoded(picture(1, *size))
        new, *found = kept(data, tmp_path, config)
        assert tuple(found) == expected
        with Image.open(io.BytesIO(new)) as image:
            assert image.size == expected
    data = encoded(picture(1, 2000, 10))
    assert kept(data, tmp_path, ImagesConfig(max_side=None)) == (data, 2000, 10)


def test_a_file_too_large_is_not_read(tmp_path: Path):
    with pytest.raises(ImageRejected) as caught:
        kept(bytes(100), tmp_path, ImagesConfig(max_bytes=99))
    assert str(caught.value) == "too_many_bytes: 100 bytes, at most 99 are read"


def test_a_written_part_is_found_and_a_changed_one_is_written_again(tmp_path: Path):
    exams = make_exams(tmp_path / "images", 5)
    part = make_part(tmp_path, exams)
    path = tmp_path / "out" / part.name
    first = write_part(part)
    stamp = path.stat().st_mtime_ns
    assert write_part(part) == first
    assert path.stat().st_mtime_ns == stamp, "found, not written again"

    path.write_bytes(path.read_bytes()[:-9])
    assert write_part(part) == first, "a part that was cut short is written again"
    assert path.stat().st_size == first.file.bytes

    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert write_part(part) == first, "a part of the right size with a bit turned is written again"
    assert hash_file(path) == first.file.sha256

    marker = tmp_path / "out" / "_parts" / f"{part.name}.json"
    for damage in ("", "[]", '{"key": '):
        marker.write_text(damage)
        assert write_part(part) == first

    replaced = tmp_path / "images" / "i3.jpg"
    replaced.write_bytes(encoded(picture(77)))
    exams[3] = replace(exams[3], photos=(photo("i3", replaced, 4),))
    mended = write_part(make_part(tmp_path, exams))
    assert mended.hashes[3] != first.hashes[3]
    assert mended.hashes[:3] == first.hashes[:3]


def test_the_same_exams_give_the_same_bytes(tmp_path: Path):
    exams = make_exams(tmp_path / "images", 5)
    first = write_part(make_part(tmp_path, exams))
    other = tmp_path / "other"
    other.mkdir()
    again = write_part(replace(make_part(tmp_path, exams), out=str(other)))
    assert again.file == first.file


def test_exams_are_cut_into_files():
    exams = [Exam(f"e{number}", "p", (), {}, None) for number in range(7)]
    parts = cut(exams, images="i", out="o", config=ImagesConfig(), shards=ShardsConfig(rows_per_file=3))
    assert [(part.name, len(part.exams)) for part in parts] == [
        ("part-00000.parquet", 3),
        ("part-00001.parquet", 3),
        ("part-00002.parquet", 1),
    ]
    assert len({part.key for part in parts}) == 3


def test_memory_does_not_grow_with_the_number_of_exams(tmp_path: Path):
    # Pictures of noise: 30 kB each, so that ten times as many would show.
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), quality=95)
    peaks = []
    for count in (10, 20, 200):
        part = make_part(tmp_path, make_exams(tmp_path / "images", count, data))
        tracemalloc.start()
        write_part(part)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    photos = 180 * len(data)
    assert peaks[2] < peaks[1] + photos / 10, f"{peaks} bytes for 10, 20 and 200 exams of {len(data)} bytes"
