from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pyarrow import fs as pafs

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.config import validate_config
from prima_ray.data import ingest as ingest_module
from prima_ray.data import schema
from prima_ray.data.plan import ExamIndex
from prima_ray.data.schema import FOLDS_SCHEMA, QUARANTINE_SCHEMA, SHARD_SCHEMA, read_manifest
from prima_ray.stages import ingest as stage_module
from prima_ray.stages.ingest import IngestConfig, run
from prima_ray.stages.out_lock import LOCK
from tests.unit.raw_data_set import DATA_SET, NUM_EXAMS, NUM_PHOTOS, RawDataSet, encoded, picture

JPEG = encoded(picture(9999))
CONTENT = ("manifest.json", "folds.parquet", "quarantine.parquet", "leaks.json", "near_duplicates.json")


@pytest.fixture
def raw(tmp_path: Path) -> RawDataSet:
    return RawDataSet(tmp_path / "raw")


def ingest(raw: RawDataSet, out: Path, **sections: Any) -> Path:
    return Path(run(validate_config(IngestConfig, raw.config(out, **sections), where="test")))


def mistake(raw: RawDataSet, out: Path, **sections: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        ingest(raw, out, **sections)
    return str(caught.value).replace(str(raw.folder), "RAW").replace(str(out), "OUT")


def shard_rows(out: Path) -> list[dict[str, Any]]:
    return [row for file in read_manifest(str(out)).files for row in pq.read_table(out / file.path).to_pylist()]


def quarantine(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "quarantine.parquet").to_pylist()


def content(out: Path) -> dict[str, bytes]:
    names = [*CONTENT, *(path.name for path in out.glob("part-*"))]
    return {name: (out / name).read_bytes() for name in names}


def test_the_shards_are_what_the_contract_says(raw: RawDataSet, tmp_path: Path):
    raw.write()
    out = ingest(raw, tmp_path / "out")
    manifest = read_manifest(str(out))
    assert (manifest.schema_version, manifest.num_exams, manifest.num_images) == (1, NUM_EXAMS, NUM_PHOTOS)
    assert (manifest.num_quarantined, manifest.num_folds) == (0, 3)
    assert manifest.class_counts == {"BCC": 10, "NEV": 10}
    assert [(file.path, file.rows) for file in manifest.files] == [
        ("part-00000.parquet", 8),
        ("part-00001.parquet", 8),
        ("part-00002.parquet", 4),
    ]
    assert pq.read_schema(out / "part-00000.parquet").equals(SHARD_SCHEMA)
    assert pq.read_schema(out / "folds.parquet").equals(FOLDS_SCHEMA)
    assert pq.read_schema(out / "quarantine.parquet").equals(QUARANTINE_SCHEMA)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*CONTENT, "config.yaml", "run.json", *(file.path for file in manifest.files)]
    )
    index = ExamIndex.read(str(out), sha256=True)
    folds = pq.read_table(out / "folds.parquet").to_pylist()
    assert [row["exam_id"] for row in folds] == index.exam_ids.tolist() == [row["exam_id"] for row in shard_rows(out)]
    for patient in set(index.patient_ids):
        assert len(set(index.patient_fold[index.patient_ids == patient])) == 1
    for split in (index.patient_fold, index.lesion_fold):
        assert set(split.tolist()) == {0, 1, 2}
    assert shard_rows(out)[0]["images"][1]["image_id"] == "e00_1"


def test_every_kind_of_bad_record_is_named_and_nothing_is_lost(
    raw: RawDataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    long = encoded(picture(5, 400, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "Jane Doe"
    good = {
        "turned": raw.add("turned", encoded(picture(6, 64, 48), exif=exif)),
        "cmyk": raw.add("cmyk", encoded(picture(7).convert("CMYK"))),
        "deep": raw.add("deep", encoded(Image.fromarray(np.full((20, 30), 40000, dtype=np.uint16)), "PNG")),
        "unlabelled": raw.add("unlabelled", encoded(picture(8)), diagnostic=""),
    }
    expected = {
        raw.add("absent"): "no_photo",
        raw.add("e00_0"): "duplicate_image",
        raw.add("foo", JPEG, diagnostic="FOO"): "unknown_class",
        raw.add("nobody", JPEG, patient_id=""): "missing_key",
        raw.add("../images/e00_0"): "path_outside",
        raw.add("/etc/passwd"): "path_outside",
        raw.add("..\\e00_0"): "path_outside",
        raw.add("leaves"): "path_outside",
        raw.add("type", JPEG, age="old"): "attribute_type",
        raw.add("range", JPEG, age="500"): "attribute_range",
        raw.add("value", JPEG, region="TAIL"): "attribute_value",
        raw.add("cut", long[: len(long) // 2]): "truncated_image",
        raw.add("text", b"see attached letter"): "not_an_image",
        raw.add("empty", b""): "empty_file",
        raw.add("bomb", bomb()): "too_many_pixels",
        raw.add("two", JPEG, patient_id="z", lesion_id="1"): "conflicting_labels",
        raw.add("faces", encoded(picture(9)), patient_id="z", lesion_id="1", diagnostic="NEV"): "conflicting_labels",
    }
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPEG)
    (raw.images / "leaves.jpg").symlink_to(secret)
    raw.photo("stray.jpg", JPEG)
    raw.write()
    with caplog.at_level("INFO", logger="prima_ray"):
        out = ingest(raw, tmp_path / "out")

    found = quarantine(out)
    assert {row["row"]: row["reason"] for row in found if row["row"]} == expected
    assert [(row["reason"], row["image_id"]) for row in found if row["row"] is None] == [
        ("no_row", "leaves.jpg"),
        ("no_row", "stray.jpg"),
    ]
    assert all(row["detail"] for row in found)
    images = {image["image_id"]: image for row in shard_rows(out) for image in row["images"]}
    assert len(raw.rows) == len(images) + len(expected)
    assert set(images) == {row["img_id"] for row in raw.rows[:NUM_PHOTOS]} | set(good)
    manifest = read_manifest(str(out))
    assert (manifest.num_images, manifest.num_quarantined) == (len(images), len(found))

    assert (images["turned"]["width"], images["turned"]["height"]) == (48, 64)
    assert b"Jane Doe" not in images["turned"]["bytes"]
    for image in images.values():
        with Image.open(io.BytesIO(image["bytes"])) as opened:
            assert (opened.format, opened.mode) == ("JPEG", "RGB")
            assert opened.size == (image["width"], image["height"])
            assert not opened.getexif()
    with Image.open(io.BytesIO(images["deep"]["bytes"])) as opened:
        assert abs(opened.getpixel((3, 3))[0] - 40000 / 257) < 2
    counts = Counter(row["reason"] for row in found)
    summary = next(text for text in caplog.messages if "quarantine: " in text)
    assert all(f"{count} {reason}" in summary for reason, count in counts.items())


def bomb() -> bytes:
    from tests.unit.data.test_images import png_of_claimed_size

    return png_of_claimed_size(60_000, 60_000)


def test_beyond_a_share_of_bad_records_the_ingest_stops(raw: RawDataSet, tmp_path: Path):
    first = raw.add("foo", JPEG, diagnostic="FOO")
    raw.add("text", b"a letter")
    raw.write()
    assert mistake(raw, tmp_path / "a", quarantine={"max_share": 0.03}) == (
        "RAW/table.csv: 1 of 26 rows with a photo are unusable (1 unknown_class), more than 3%\n"
        f"  The first, row {first}: 'FOO' is none of BCC, NEV. Mend the table or the description, or raise "
        "quarantine.max_share."
    )
    assert not (tmp_path / "a").exists()
    assert mistake(raw, tmp_path / "b", quarantine={"max_share": 0.05}).startswith(
        "RAW/table.csv: 2 of 26 rows with a photo are unusable (1 unknown_class, 1 not_an_image), more than 5%\n"
    )
    assert not (tmp_path / "b" / "manifest.json").exists()
    assert ingest(raw, tmp_path / "b", quarantine={"max_share": 0.1}), "the limit is no part of what is written"


def test_beyond_a_share_without_counterpart_the_ingest_stops(raw: RawDataSet, tmp_path: Path):
    for number in range(30):
        raw.add(f"absent{number}")
    raw.write()
    assert mistake(raw, tmp_path / "out", quarantine={"max_without_counterpart": 0.5}) == (
        "RAW/table.csv: 30 of 54 rows and photos have no counterpart (30 no_photo), more than 50%\n"
        "  Check source.images and source.columns.image, or raise quarantine.max_without_counterpart."
    )
    assert not (tmp_path / "out").exists()


def test_where_no_record_is_left_that_is_said(raw: RawDataSet, tmp_path: Path):
    everything = {"max_share": 1, "max_without_counterpart": 1}
    for photo in raw.images.iterdir():
        photo.write_text("a letter")
    raw.write()
    assert mistake(raw, tmp_path / "a", quarantine=everything) == (
        "RAW/table.csv: no row is left to make an exam of\n  Quarantined: 24 not_an_image."
    )
    for photo in raw.images.iterdir():
        photo.unlink()
    assert mistake(raw, tmp_path / "b", quarantine=everything) == (
        "RAW/table.csv: no row is left to make an exam of\n  Quarantined: 24 no_photo."
    )


def test_a_class_with_fewer_exams_than_folds_stops_before_anything_is_written(raw: RawDataSet, tmp_path: Path):
    for row in raw.rows[:-2]:
        row["diagnostic"] = "BCC"
    raw.write()
    assert mistake(raw, tmp_path / "out") == (
        "class NEV has 1 exam of 1 patient, fewer than the 3 folds\n"
        "  Lower folds.count, gather more exams, or leave the class out (its rows go to quarantine)."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", ["fixed", "reversed"])
def test_planted_leaks_are_refused(raw: RawDataSet, tmp_path: Path, order: str):
    for row in raw.rows:
        row["had_surgery"] = {"True": "yes", "False": "no"}[row["biopsed"]]
        row["code"] = {"BCC": "7", "NEV": "3"}[row["diagnostic"]]
        row["notes"] = f"grew; {'basal cell carcinoma' if row['diagnostic'] == 'BCC' else 'harmless'}"
    if order == "reversed":
        raw.rows.reverse()
    raw.write()
    surgery = {"kind": "boolean", "name": "had_surgery", "phrase": "x", "phrase_false": "y"}
    code = {"kind": "numeric", "name": "code", "phrase": "{value}", "minimum": 0, "maximum": 9}
    notes = {"kind": "text", "name": "notes", "phrase": "{value}"}

    def planted(attribute: dict[str, Any]) -> str:
        return mistake(raw, tmp_path / "out", data_set={"attributes": [*DATA_SET["attributes"], attribute]})

    mend = "if it may be known at prediction time, add it to leaks.accept."
    assert planted({**surgery, "name": "biopsed"}) == (
        "test: data_set: attribute 'biopsed' reads the column 'biopsed', which `leaks` says gives the label away; "
        "remove it from the attributes"
    )
    assert planted({**surgery, "name": "x", "column": "biopsed"}).startswith(
        "test: data_set: attribute 'x' reads the column 'biopsed', which `leaks` says"
    )
    assert planted(surgery) == (
        "attribute 'had_surgery' says the same as the column 'biopsed', which `leaks` says gives the label away\n"
        "  Remove it from data_set.attributes."
    )
    assert planted(code) == (
        f"attribute 'code' is a recoded copy of the diagnosis\n  Remove it from data_set.attributes; {mend}"
    )
    assert planted({**code, "name": "y", "column": "diagnostic"}).startswith(
        "attribute 'y' reads the label's column 'diagnostic'"
    )
    for row, text in zip(raw.rows, (" a", " b", " c", " d") * 6, strict=True):
        row["notes"] += text
    raw.write()
    assert planted(notes) == (
        "attribute 'notes': the text names the exam's own diagnosis in 50.0% of the exams\n"
        f"  Remove it from data_set.attributes; {mend}"
    )
    assert not (tmp_path / "out").exists()


def test_a_declared_leak_is_found_whatever_its_case_and_blanks(raw: RawDataSet, tmp_path: Path):
    raw.rows = [
        {
            **{key: cell for key, cell in row.items() if key != "biopsed"},
            "Biopsed ": row["biopsed"],
            "sent": row["biopsed"],
        }
        for row in raw.rows
    ]
    raw.write()
    copy = {"kind": "boolean", "name": "sent", "phrase": "x", "phrase_false": "y"}
    assert mistake(raw, tmp_path / "out", data_set={"attributes": [copy]}).startswith(
        "attribute 'sent' says the same as the column 'Biopsed ', which `leaks` says gives the label away"
    )
    assert mistake(raw, tmp_path / "out", data_set={"attributes": [{**copy, "column": "Biopsed "}]}).startswith(
        "test: data_set: attribute 'sent' reads the column 'Biopsed ', which `leaks` says"
    )


def test_only_attributes_can_be_accepted(raw: RawDataSet, tmp_path: Path):
    raw.write()
    assert mistake(raw, tmp_path / "out", leaks={"accept": ["ich"]}) == (
        "test: leaks.accept: there is no attribute 'ich'; did you mean 'itch'?"
    )
    assert mistake(raw, tmp_path / "out", leaks={"accept": ["nope"]}) == (
        "test: leaks.accept: there is no attribute 'nope'; there are age, itch, region"
    )


def test_a_noisy_copy_of_the_label_is_reported(raw: RawDataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number in range(60):
        raw.add(f"n{number}", encoded(picture(5000 + number)), diagnostic=("BCC", "NEV")[number % 2])
    for number, row in enumerate(raw.rows):
        row["score"] = f"{(row['diagnostic'] == 'BCC') + number / 1e4:.4f}"
    raw.write()
    score = {"kind": "numeric", "name": "score", "phrase": "{value}", "minimum": 0, "maximum": 2}
    with caplog.at_level("INFO", logger="prima_ray"):
        ingest(raw, tmp_path / "out", data_set={"attributes": [*DATA_SET["attributes"], score]})
    assert any("warning: score: its value tells the diagnosis" in text for text in caplog.messages)


def test_a_block_whose_missingness_tells_the_label_is_reported(
    raw: RawDataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for row in raw.rows:
        if row["diagnostic"] == "NEV":
            row["age"] = row["region"] = ""
    raw.write()
    with caplog.at_level("INFO", logger="prima_ray"):
        out = ingest(raw, tmp_path / "out", data_set={"blocks": [{"name": "history", "attributes": ["age", "region"]}]})
    assert any("warning: block history: being missing tells the diagnosis" in text for text in caplog.messages)
    found = json.loads((out / "leaks.json").read_text())["associations"][0]
    assert (found["kind"], found["share_missing"]) in (("missing", 0.5), ("block missing", 0.5))


def test_look_alikes_of_two_patients_are_reported(raw: RawDataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    raw.add("copy", (raw.images / "e03_0.jpg").read_bytes())
    raw.write()
    with caplog.at_level("INFO", logger="prima_ray"):
        out = ingest(raw, tmp_path / "out")
    pairs = json.loads((out / "near_duplicates.json").read_text())
    assert [sorted(pair["images"]) for pair in pairs] == [["copy", "e03_0"]]
    assert any("1 pairs of photos of different patients look alike" in text for text in caplog.messages)


def test_classes_that_reach_no_exam_or_not_every_fold_are_said(
    raw: RawDataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    raw.write()
    classes = [*DATA_SET["classes"], {"name": "MEL", "phrase": "melanoma"}]
    with caplog.at_level("INFO", logger="prima_ray"):
        out = ingest(raw, tmp_path / "out", data_set={"classes": classes})
    assert any(text.endswith("warning: class MEL has no exam") for text in caplog.messages)
    assert read_manifest(str(out)).class_counts["MEL"] == 0


def test_a_data_set_without_diagnoses(raw: RawDataSet, tmp_path: Path):
    raw.write()
    columns = {"patient": "patient_id", "exam": ["patient_id", "lesion_id"], "image": "img_id"}
    out = ingest(raw, tmp_path / "out", source={"columns": columns})
    assert set(pq.read_table(out / "folds.parquet")["patient"].to_pylist()) == {-1}
    assert {row["label"] for row in shard_rows(out)} == {None}


class _Killed(BaseException):
    """As a signal would end the run."""


def test_an_interrupted_ingest_looks_unfinished_and_is_completed_bit_for_bit(
    raw: RawDataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raw.write()
    whole = content(ingest(raw, tmp_path / "whole"))
    out = tmp_path / "out"
    calls = 0
    real = ingest_module.read_photo

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise _Killed
        return real(*arguments)

    monkeypatch.setattr(ingest_module, "read_photo", killed)
    with pytest.raises(_Killed):
        ingest(raw, out)
    assert not (out / "manifest.json").exists()
    with pytest.raises(PrimaError, match="no finished shard folder here"):
        ExamIndex.read(str(out))
    assert mistake(raw, out, seed=8) == (
        "OUT: `out` holds a run of another config; it differs in seed\n"
        "  Choose another `out`, or delete the folder if the run is not needed."
    )
    calls = 100
    ingest(raw, out)
    assert content(out) == whole
    assert calls < 100 + NUM_PHOTOS, "finished parts are not read again"
    assert not (out / "_parts").exists()
    assert not list(out.glob("*.tmp"))


def test_a_second_ingest_into_the_folder_is_refused_while_the_first_is_at_work(
    raw: RawDataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raw.write()
    out, told = tmp_path / "out", []
    real = ingest_module.read_photo

    def meanwhile(*arguments: Any) -> Any:
        if not told:
            told.append(mistake(raw, out))
        return real(*arguments)

    monkeypatch.setattr(ingest_module, "read_photo", meanwhile)
    ingest(raw, out)
    assert told == ["OUT: another process is working in this folder\n  Wait for it to end, or choose another `out`."]
    assert not (out / LOCK).exists()


def test_an_ingest_that_another_process_finished_meanwhile_is_taken_as_it_is(
    raw: RawDataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both read the table while there was no folder yet."""
    raw.write()
    out = tmp_path / "out"
    real = stage_module.read_source
    stamps: dict[Path, int] = {}

    def slow(*arguments: Any) -> Any:
        found = real(*arguments)
        monkeypatch.setattr(stage_module, "read_source", real)
        ingest(raw, out)
        stamps.update({path: path.stat().st_mtime_ns for path in out.iterdir()})
        return found

    monkeypatch.setattr(stage_module, "read_source", slow)
    ingest(raw, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps


def test_a_run_that_ended_between_manifest_and_record_is_closed(raw: RawDataSet, tmp_path: Path):
    raw.write()
    out = ingest(raw, tmp_path / "out")
    before = content(out)
    (out / "run.json").unlink()
    (out / "_parts").mkdir()
    (out / "_part-00000.parquet.12345678.tmp").write_bytes(b"x")
    ingest(raw, out)
    assert content(out) == before
    assert (out / "run.json").exists()
    assert not (out / "_parts").exists()
    assert not list(out.glob("*.tmp"))


def test_a_finished_ingest_is_returned_and_another_gives_the_same_content(raw: RawDataSet, tmp_path: Path):
    raw.write()
    out = ingest(raw, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    ingest(raw, out, context={"kind": "ray"})
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    again = ingest(raw, tmp_path / "again")
    assert content(again) == content(out)
    assert read_manifest(str(again)).content_hash == read_manifest(str(out)).content_hash


def test_photos_mended_after_a_stop_are_read_anew(raw: RawDataSet, tmp_path: Path):
    for number in range(0, 20, 2):
        raw.photo(f"e{number:02}_0.jpg", b"a letter")
    raw.write()
    assert "10 of 24 rows" in mistake(raw, tmp_path / "out", quarantine={"max_share": 0.2})
    for number in range(0, 20, 2):
        raw.photo(f"e{number:02}_0.jpg", encoded(picture(number)))
    out = ingest(raw, tmp_path / "out", quarantine={"max_share": 0.2})
    assert read_manifest(str(out)).num_images == NUM_PHOTOS


def test_a_shard_that_was_changed_has_a_wrong_checksum(raw: RawDataSet, tmp_path: Path):
    raw.write()
    out = ingest(raw, tmp_path / "out")
    part = out / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    with pytest.raises(PrimaError) as caught:
        ExamIndex.read(str(out), sha256=True)
    assert caught.value.where == str(part)
    assert caught.value.what.startswith("wrong checksum: sha256 ")


def test_table_and_photos_may_be_uris(raw: RawDataSet, tmp_path: Path):
    table = raw.write()
    plain = content(ingest(raw, tmp_path / "plain"))
    out = ingest(raw, tmp_path / "uris", source={"table": table.as_uri(), "images": raw.images.as_uri()})
    assert content(out) == plain


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> pafs.FileSystem:
    """An object store in memory, at mem://."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(memory))

    def from_uri(uri: str) -> tuple[pafs.FileSystem, str]:
        return (filesystem, uri[6:]) if uri.startswith("mem://") else pafs.FileSystem.from_uri(uri)

    names = {"FileSystem": SimpleNamespace(from_uri=from_uri), "LocalFileSystem": pafs.LocalFileSystem}
    monkeypatch.setattr(schema, "pafs", SimpleNamespace(**names))
    return filesystem


def test_everything_may_lie_on_an_object_store(
    raw: RawDataSet, tmp_path: Path, store: pafs.FileSystem, monkeypatch: pytest.MonkeyPatch
):
    absent = raw.add("absent")
    table = raw.write()
    plain = tmp_path / "plain"
    ingest(raw, plain)
    store.create_dir("bucket/raw/images")
    for path in (table, *raw.images.iterdir()):
        with store.open_output_stream(f"bucket/raw/{path.relative_to(raw.folder)}") as stream:
            stream.write(path.read_bytes())
    out = "mem://bucket/shards"
    config = raw.config(out, source={"table": "mem://bucket/raw/table.csv", "images": "mem://bucket/raw/images"})
    made = validate_config(IngestConfig, config, where="test")

    real = ingest_module.read_photo
    monkeypatch.setattr(ingest_module, "read_photo", lambda *_: (_ for _ in ()).throw(_Killed))
    with pytest.raises(_Killed):
        run(made)
    monkeypatch.setattr(ingest_module, "read_photo", real)
    with pytest.raises(PrimaError, match="manifest.json is missing"):
        read_manifest(out)
    assert run(made) == out
    index = ExamIndex.read(out, sha256=True)
    assert (len(index), index.manifest.num_quarantined, absent) == (NUM_EXAMS, 1, NUM_PHOTOS + 1)
    assert index.manifest.content_hash == read_manifest(str(plain)).content_hash
    listed = {info.base_name for info in store.get_file_info(pafs.FileSelector("bucket/shards"))}
    assert listed == {path.name for path in plain.iterdir()}

    monkeypatch.setattr(ingest_module, "read_photo", None)
    assert run(made) == out, "it is finished: nothing is read"
    with pytest.raises(PrimaError) as caught:
        run(made.model_copy(update={"seed": 8}))
    assert str(caught.value).startswith(f"{out}: `out` holds a run of another config; it differs in seed\n")
    with pytest.raises(PrimaError) as caught:
        run(made.model_copy(update={"out": "mem://bucket/raw"}))
    assert str(caught.value) == (
        "mem://bucket/raw: `out` exists and is no run directory (it has no config.yaml)\n  Choose another `out`."
    )


def test_the_command_says_where_it_wrote_and_what_went_wrong(
    raw: RawDataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    raw.write()
    config = raw.config("made/here", source={"table": "table.csv", "images": "images"})
    path = raw.folder / "ingest.yaml"
    path.write_text(yaml.safe_dump(config))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert main(["ingest", "../raw/ingest.yaml"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "run: made/here\n"
    assert (work / "made" / "here" / "manifest.json").exists()

    assert main(["ingest", "../raw/ingest.yaml", "--set", "folds.count=2"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-2:] == [
        "prima: made/here: `out` holds a run of another config; it differs in folds.count",
        "  Choose another `out`, or delete the folder if the run is not needed.",
    ]
    assert main(["ingest", "../raw/ingest.yaml", "--set", "source.table=absent.csv", "--set", "out=x"]) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"prima: {work}/absent.csv: no such table",
        "  Check source.table.",
    ]
    assert main(["ingest", "../raw/ingest.yaml", "--set", "out=../raw/table.csv"]) == 2
    assert "`out` is a file" in capsys.readouterr().err
    assert main(["ingest", "../raw/ingest.yaml", "--set", "out=/proc/none/x"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "prima: /proc/none/x: `out` cannot be made (No such file or directory)"
    )
