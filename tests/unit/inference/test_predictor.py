from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prima_ray.base import PrimaError
from prima_ray.inference.predictor import Exam, Predictor
from tests.conftest import jpeg


@pytest.fixture(scope="module")
def predictor(tiny_fuse: Path) -> Predictor:
    return Predictor.load(tiny_fuse)


@pytest.fixture(scope="module")
def stored(labelled_shards: str) -> dict[str, dict[str, Any]]:
    """Exams as the shards have them."""
    files = sorted(Path(labelled_shards).glob("part-*.parquet"))
    return {row["exam_id"]: row for file in files for row in pq.read_table(file).to_pylist()}


def exam(row: dict[str, Any]) -> Exam:
    return Exam(tuple(photo["bytes"] for photo in row["images"]), dict(row["attributes"]))


def recorded(run: Path) -> dict[str, list[float]]:
    """The run's own predictions."""
    rows = pq.read_table(run / "predictions.parquet").to_pylist()
    return {row["exam_id"]: [row[f"prob_{name}"] for name in ("BCC", "NEV", "SEK")] for row in rows}


@pytest.mark.parametrize("run", ["tiny_fuse", "tiny_finetune"])
def test_an_exam_gets_what_the_run_wrote_of_it(
    run: str, stored: dict[str, dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    """Training streamed stored features in batches of 64; here towers read one exam from its photos."""
    folder: Path = request.getfixturevalue(run)
    wanted = recorded(folder)
    assert len(wanted) > 12
    loaded = Predictor.load(folder)
    found = {name: loaded.predict([exam(stored[name])])[0] for name in wanted}
    for name, probabilities in found.items():
        assert probabilities == pytest.approx(wanted[name], abs=1e-5), name
    assert len({tuple(row.round(6)) for row in found.values()}) == len(found)  # and not because all are the same


@pytest.mark.parametrize(
    ("attributes", "given"),
    [({}, "0 of the 3"), ({"age": 61, "itch": "UNK"}, "1 of the 3"), ({"age": 61, "itch": True}, None)],
)
def test_little_told_of_an_exam_is_a_warning(
    attributes: dict[str, object], given: str | None, predictor: Predictor, tiny_finetune: Path
) -> None:
    """A value that counts as missing is none; a model of photos alone misses nothing."""
    found = predictor.warnings(attributes)
    assert len(found) == (given is not None)
    assert all(f"only {given} attributes" in text for text in found)
    assert Predictor.load(tiny_finetune).warnings({}) == []


def test_the_other_exams_of_a_call_do_not_matter(predictor: Predictor, stored: dict[str, dict[str, Any]]) -> None:
    """Neighbours with more photos and longer texts pad the batch."""
    exams = [exam(stored[name]) for name in sorted(stored)[:12]]
    exams.append(Exam((jpeg(np.random.default_rng(0), 50, 40),) * 8, {}))
    together = predictor.predict(exams)
    assert together.sum(axis=1) == pytest.approx(np.ones(13))
    for position, one in enumerate(exams):
        assert predictor.predict([one])[0] == pytest.approx(together[position], abs=1e-6)
    assert predictor.predict(exams[::-1], batch_size=3)[::-1] == pytest.approx(together, abs=1e-6)
    assert predictor.predict([]).shape == (0, 3)


def test_masked_attributes_count_as_missing(predictor: Predictor, stored: dict[str, dict[str, Any]]) -> None:
    whole = exam(stored["e001"])
    assert "age" in whole.attributes
    bare = Exam(whole.images, {name: value for name, value in whole.attributes.items() if name != "age"})
    masked = predictor.predict([whole], masked=["age"])
    assert (masked == predictor.predict([bare])).all()
    assert (masked != predictor.predict([whole])).any()


def test_labels_and_names_reach_nothing(predictor: Predictor, stored: dict[str, dict[str, Any]]) -> None:
    table = predictor.exam_table(exam(stored["e001"]))
    for name in ("exam_id", "patient_id", "label"):
        column = table.schema.get_field_index(name)
        changed = table.set_column(column, name, [["BCC"]])
        assert (predictor.predict_tables([changed]) == predictor.predict_tables([table])).all()


def test_values_are_read_as_a_form_gives_them(predictor: Predictor, stored: dict[str, dict[str, Any]]) -> None:
    images = exam(stored["e001"]).images
    one = predictor.predict([Exam(images, {"region": "face", "itch": True, "age": 61.0})])
    other = predictor.predict([Exam(images, {"region": "FACE", "itch": "true", "age": "61"})])
    assert (one == other).all()
    assert predictor.text({"itch": True, "age": None}) == "a skin lesion: it itches."
    assert predictor.read_attributes == ("region", "itch", "age")


def test_a_photo_is_read_upright_whatever_its_format(predictor: Predictor) -> None:
    with Image.open(io.BytesIO(jpeg(np.random.default_rng(1), 64, 48))) as image:
        upright, turned, plain = io.BytesIO(), io.BytesIO(), io.BytesIO()
        image.save(upright, "PNG")
        exif = image.getexif()
        exif[0x0112] = 6
        image.rotate(90, expand=True).save(turned, "PNG", exif=exif)
        image.convert("RGBA").save(plain, "PNG")
    found = predictor.predict([Exam((item.getvalue(),), {}) for item in (upright, turned, plain)])
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)


def test_what_cannot_be_read_is_said(predictor: Predictor) -> None:
    photo = jpeg(np.random.default_rng(1), 64, 48)

    def message(*images: bytes, **attributes: object) -> str:
        with pytest.raises(PrimaError) as caught:
            predictor.predict([Exam(images, attributes)])
        return str(caught.value)

    assert message() == "exam: an exam needs at least one photo"
    assert message(*[photo] * 9) == "exam: 9 photos, the model reads at most 8 of an exam"
    assert message(photo, b"") == "exam: photo 2 cannot be used: 0 bytes (empty_file)"
    assert message(b"text") == "exam: photo 1 cannot be used: neither JPEG nor PNG (4 bytes) (not_an_image)"
    assert "truncated_image" in message(photo[:-200])
    assert message(photo, aeg=3) == "unknown attribute 'aeg'\n  Did you mean 'age'?"
    assert message(photo, age=300) == "age: 300 is outside 0 to 120"
    assert message(photo, itch="perhaps") == "itch: 'perhaps' is neither true nor false"


def test_a_model_of_photos_alone_reads_no_attributes(tiny_finetune: Path, stored: dict[str, dict[str, Any]]) -> None:
    loaded = Predictor.load(tiny_finetune)
    images = exam(stored["e001"]).images
    assert not loaded.uses_attributes
    assert (loaded.predict([Exam(images, {"age": 3})]) == loaded.predict([Exam(images, {})])).all()
    assert (loaded.read_attributes, loaded.text({"age": 3})) == ((), None)


def test_a_moved_run_loads(tiny_fuse: Path, tmp_path: Path, stored: dict[str, dict[str, Any]]) -> None:
    (tmp_path / "there").mkdir()
    shutil.copytree(tiny_fuse / "model", tmp_path / "there" / "model")
    found = Predictor.load(tmp_path / "there").predict([exam(stored["e000"])])[0]
    assert found == pytest.approx(recorded(tiny_fuse)["e000"], abs=1e-5)


def test_what_is_no_model_that_diagnoses_is_said(tiny_fuse: Path, labelled_shards: str, tmp_path: Path) -> None:
    mend = "\n  Name the run directory of `prima fuse` or `prima finetune`."

    def message(run: Path | str) -> str:
        with pytest.raises(PrimaError) as caught:
            Predictor.load(run)
        return str(caught.value)

    assert message(tmp_path / "none") == f"{tmp_path / 'none'}: no such run directory{mend}"
    assert message(labelled_shards) == f"{labelled_shards}: no model here{mend}"
    run = tmp_path / "align"
    shutil.copytree(tiny_fuse / "model", run / "model")
    file = run / "model" / "config.json"
    file.write_text(file.read_text().replace('"kind": "fuse"', '"kind": "align"'))
    assert message(run) == f"{run}: a run of align does not diagnose{mend}"
    file.unlink()
    assert message(run) == f"{file}: no such file"
    shutil.copy(tiny_fuse / "model" / "config.json", file)
    file.write_text(file.read_text().replace('"features": "backbone"', '"features": "projected"'))
    assert message(run) == f"{run / 'model'}: the heads are not what config.json says"


def test_what_is_not_a_number_is_no_answer(tiny_fuse: Path, tmp_path: Path, stored: dict[str, dict[str, Any]]) -> None:
    """A model folder without its run, whose checksums nobody knows."""
    shutil.copytree(tiny_fuse / "model", tmp_path / "model")
    weights = tmp_path / "model" / "fusion" / "model.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(weights).items()}, weights)
    with pytest.raises(PrimaError) as caught:
        Predictor.load(tmp_path).predict([exam(stored["e000"])])
    assert str(caught.value).startswith(f"{tmp_path}: the model gives probabilities that are not numbers (NaN)")


@pytest.mark.parametrize("run", ["tiny_fuse", "tiny_finetune"])
def test_classes_that_the_model_does_not_know_are_told(
    run: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shutil.copytree(request.getfixturevalue(run) / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    raw = json.loads(file.read_text())
    raw["data_set"]["classes"].append({**raw["data_set"]["classes"][0], "name": "NEW", "phrase": "something new"})
    file.write_text(json.dumps(raw))
    with pytest.raises(PrimaError) as caught:
        Predictor.load(tmp_path)
    assert str(caught.value).startswith(f"{file}: damaged: it names 4 classes, the model tells 3 apart")
