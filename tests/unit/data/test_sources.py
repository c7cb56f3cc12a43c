from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.data.sources import Intake, Rejected, SourceConfig, read_source
from tests.unit.raw_data_set import NUM_EXAMS, NUM_PHOTOS, RawDataSet, encoded, picture

JPEG = encoded(picture(9999))


@pytest.fixture
def raw(tmp_path: Path) -> RawDataSet:
    return RawDataSet(tmp_path / "raw")


def intake(raw: RawDataSet, **sections: Any) -> Intake:
    config = raw.config("out", **sections)
    return read_source(SourceConfig(**config["source"]), DataSetConfig(**config["data_set"]))


def reasons(found: Intake) -> list[tuple[int | None, str, str]]:
    return [(item.row, item.reason, item.detail) for item in found.rejected]


def message(raw: RawDataSet, **sections: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        intake(raw, **sections)
    return str(caught.value).replace(str(raw.folder), "RAW")


def test_rows_and_photos_become_exams(raw: RawDataSet):
    raw.write()
    found = intake(raw)
    assert not found.rejected
    assert (found.num_rows, found.num_files, len(found.exams)) == (NUM_PHOTOS, NUM_PHOTOS, NUM_EXAMS)
    first = found.exams[0]
    assert (first.exam_id, first.patient_id, first.label) == ("p00/0", "p00", "BCC")
    assert [(photo.image_id, photo.path, photo.row) for photo in first.photos] == [
        ("e00_0", "e00_0.jpg", 1),
        ("e00_1", "e00_1.jpg", 2),
    ]
    assert first.attributes == {"age": "30", "itch": "true", "region": "FACE"}
    assert [exam.exam_id for exam in found.exams] == sorted(exam.exam_id for exam in found.exams)


@pytest.mark.parametrize(
    ("cells", "reason", "detail"),
    [
        ({"diagnostic": "FOO"}, "unknown_class", "'FOO' is none of BCC, NEV"),
        ({"patient_id": ""}, "missing_key", "no value in the column patient_id"),
        ({"lesion_id": "UNK"}, "missing_key", "no value in the column lesion_id"),
        ({"age": "old"}, "attribute_type", "age: 'old' is not a number"),
        ({"age": "41,5"}, "attribute_type", "age: '41,5' is not a number"),
        ({"age": "121"}, "attribute_range", "age: 121 is outside 0 to 120"),
        ({"age": "-3"}, "attribute_range", "age: -3 is outside 0 to 120"),
        ({"age": "inf"}, "attribute_range", "age: inf is outside 0 to 120"),
        ({"age": "9" * 400}, "attribute_range", "age: inf is outside 0 to 120"),
        ({"itch": "maybe"}, "attribute_type", "itch: 'maybe' is neither true nor false"),
        ({"region": "TAIL"}, "attribute_value", "region: 'TAIL' is none of FACE, ARM"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(raw: RawDataSet, cells: dict[str, str], reason: str, detail: str):
    number = raw.add("extra", JPEG, **cells)
    raw.write()
    found = intake(raw)
    assert reasons(found) == [(number, reason, detail)]
    assert found.rejected[0].image_id == "extra"
    assert len(found.exams) == NUM_EXAMS


@pytest.mark.parametrize("spelling", ["bcc", " BCC ", "Basalioma", "BASALIOMA"])
def test_classes_are_known_in_any_case_and_by_their_synonyms(raw: RawDataSet, spelling: str):
    raw.add("extra", JPEG, diagnostic=spelling)
    raw.write()
    found = intake(raw)
    assert not found.rejected
    assert next(exam for exam in found.exams if exam.photos[0].image_id == "extra").label == "BCC"


def test_rows_without_a_diagnosis_are_kept_without_one(raw: RawDataSet):
    raw.add("extra", JPEG, diagnostic="UNK")
    raw.rows[0]["diagnostic"] = ""
    raw.write()
    labels = {exam.exam_id: exam.label for exam in intake(raw).exams}
    assert labels["p00/0"] == "BCC", "the exam's other row has it"
    assert list(labels.values()).count(None) == 1


def test_a_class_may_be_called_what_means_missing_elsewhere(raw: RawDataSet):
    for row in raw.rows:
        row["diagnostic"] = {"BCC": "None", "NEV": "NEV"}[row["diagnostic"]]
    raw.write()
    classes = [{"name": "None", "phrase": "no lesion"}, {"name": "NEV", "phrase": "nevus"}]
    assert {exam.label for exam in intake(raw, data_set={"classes": classes}).exams} == {"None", "NEV"}


def test_without_a_label_column_no_exam_has_one(raw: RawDataSet):
    raw.write()
    columns = {"patient": "patient_id", "exam": ["lesion_id"], "image": "img_id"}
    assert {exam.label for exam in intake(raw, source={"columns": columns}).exams} == {None}


def test_a_row_without_a_photo_and_a_photo_without_a_row(raw: RawDataSet):
    number = raw.add("absent")
    blank = raw.add("")
    raw.photo("sub/stray.JPG", JPEG)
    raw.photo("notes.txt", b"not a photo, and nobody says it is")
    raw.photo("._e00_0.jpg", b"what a Mac leaves behind")
    raw.write()
    found = intake(raw)
    assert reasons(found) == [
        (number, "no_photo", "no file of this name in the image folder"),
        (blank, "no_photo", "no value in the column img_id"),
        (None, "no_row", "no row of the table names this photo"),
    ]
    assert found.rejected[2].image_id == "sub/stray.JPG"
    assert found.num_files == NUM_PHOTOS + 1


def test_a_photo_belongs_to_the_first_row_that_names_it(raw: RawDataSet):
    same, other_spelling = raw.add("e00_0"), raw.add("e00_1.jpeg")
    raw.write()
    assert reasons(intake(raw)) == [
        (same, "duplicate_image", "row 1 names the same photo, e00_0.jpg"),
        (other_spelling, "duplicate_image", "row 2 names the same photo, e00_1.jpg"),
    ]


def test_a_photo_whose_row_is_turned_away_still_has_a_row(raw: RawDataSet):
    raw.add("extra", JPEG, patient_id="")
    raw.write()
    assert [item.reason for item in intake(raw).rejected] == ["missing_key"]


def test_one_lesion_with_two_diagnoses_goes_with_all_its_rows(raw: RawDataSet):
    raw.rows[1]["diagnostic"] = "NEV"
    raw.write()
    found = intake(raw)
    assert reasons(found) == [(row, "conflicting_labels", "the exam's rows say BCC and NEV") for row in (1, 2)]
    assert len(found.exams) == NUM_EXAMS - 1


def test_a_second_diagnosis_counts_though_its_row_has_no_photo(raw: RawDataSet):
    raw.rows.append({**raw.rows[0], "img_id": "absent", "diagnostic": "NEV"})
    raw.write()
    assert [item.reason for item in intake(raw).rejected] == ["conflicting_labels", "conflicting_labels", "no_photo"]


def test_an_exam_of_two_patients_is_no_exam(raw: RawDataSet):
    raw.rows[1]["patient_id"] = "p77"
    raw.write()
    columns = {"patient": "patient_id", "exam": ["lesion_id"], "image": "img_id", "label": "diagnostic"}
    assert reasons(intake(raw, source={"columns": columns})) == [
        (row, "conflicting_patients", "the exam's rows say p00 and p77") for row in (1, 2)
    ]


def test_exam_ids_of_several_columns_cannot_collide(raw: RawDataSet):
    raw.add("one", JPEG, patient_id="a/b", lesion_id="c")
    raw.add("two", encoded(picture(5)), patient_id="a", lesion_id="b/c")
    raw.write()
    ids = {exam.exam_id for exam in intake(raw).exams}
    assert {"a%2Fb/c", "a/b%2Fc"} < ids


def test_the_first_recorded_value_counts_where_rows_of_an_exam_disagree(raw: RawDataSet):
    raw.rows[0].update(age="", itch="True")
    raw.rows[1].update(age="55", itch="False")
    raw.write()
    found = intake(raw)
    assert found.exams[0].attributes == {"age": "55", "itch": "true", "region": "FACE"}
    assert found.num_inconsistent == 1


def test_a_missing_column_names_the_nearest(raw: RawDataSet):
    for row in raw.rows:
        row["diagnosis"] = row.pop("diagnostic")
    raw.write()
    assert message(raw) == (
        "RAW/table.csv: the table has no column 'diagnostic' (source.columns.label)\n  Did you mean 'diagnosis'?"
    )


def test_the_label_is_no_attribute(raw: RawDataSet):
    raw.write()
    attributes = [{"kind": "categorical", "name": "finding", "column": "diagnostic", "phrase": "{value}"}]
    assert message(raw, data_set={"attributes": attributes}) == (
        "attribute 'finding' reads the label's column 'diagnostic'\n  Remove it from data_set.attributes."
    )


def test_a_declared_leak_that_the_table_lacks_is_said(raw: RawDataSet, caplog: pytest.LogCaptureFixture):
    raw.write()
    with caplog.at_level(logging.WARNING, logger="prima_ray"):
        intake(raw, data_set={"leaks": ["biopsied"]})
    assert caplog.messages == [
        "data_set.leaks: the table has no column 'biopsied', so copies of it cannot be found; did you mean 'biopsed'?"
    ]


cells = {
    "patient_id": st.sampled_from(["p1", "p2", "", "UNK"]),
    "lesion_id": st.sampled_from(["1", "2", "a/b", ""]),
    "img_id": st.sampled_from([f"e{exam:02}_0" for exam in range(6)] + ["absent", "../e00_0", "", "e00_0.png"]),
    "diagnostic": st.sampled_from(["BCC", "nev", "FOO", ""]),
    "age": st.sampled_from(["50", "-1", "x", ""]),
    "itch": st.sampled_from(["True", "2"]),
    "region": st.sampled_from(["FACE", "?"]),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries(cells), min_size=1, max_size=12))
def test_nothing_is_lost(raw: RawDataSet, rows: list[dict[str, str]]):
    raw.write(rows)
    found = intake(raw)
    kept = [photo.row for exam in found.exams for photo in exam.photos]
    turned_away = [item.row for item in found.rejected if item.row is not None]
    assert sorted(kept + turned_away) == list(range(1, len(rows) + 1))
    named = {photo.path for exam in found.exams for photo in exam.photos}
    unnamed = {item.image_id for item in found.rejected if item.reason == "no_row"}
    assert not named & unnamed
    used_or_turned_away = len(named) + len(unnamed) + len(turned_away)
    assert used_or_turned_away >= found.num_files
    assert all(isinstance(item, Rejected) and item.detail for item in found.rejected)
