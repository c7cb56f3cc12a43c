from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.inference.explanation import NO_CORPUS, NO_HEADS
from prima_ray.stages.predict import predict_folder, read_metadata, run_predict
from tests.conftest import TOY, write_toy_shards

FEW = (
    "8 validation exams are too few (calibration.min_exams is 30): probabilities are not calibrated, and no answer is "
    "called too uncertain"
)


@pytest.fixture(scope="module")
def photos(labelled_shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of exam e000, whose attributes are region FACE and itch true."""
    folder = tmp_path_factory.mktemp("photos")
    row = pq.read_table(Path(labelled_shards) / "part-00000.parquet").to_pylist()[0]
    paths = []
    for number, photo in enumerate(row["images"]):
        path = folder / f"{number}.jpg"
        path.write_bytes(photo["bytes"])
        paths.append(str(path))
    return paths


def ask(run: Path, photos: list[str], *more: str) -> int:
    images = [item for path in photos for item in ("--image", path)]
    return main(["predict", str(run), *images, *more])


def test_one_exam_as_json_and_nothing_else_on_stdout(
    tiny_fuse: Path, photos: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    form = tmp_path / "form.json"
    form.write_text(json.dumps({"region": "face", "itch": True, "age": None}))
    assert ask(tiny_fuse, photos, "--metadata", str(form), "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    recorded = pq.read_table(tiny_fuse / "predictions.parquet").to_pylist()[0]
    assert recorded["exam_id"] == "e000"
    assert answer["prediction"] == recorded["prediction"]
    wanted = {name: recorded[f"prob_{name}"] for name in ("BCC", "NEV", "SEK")}
    assert answer["probabilities"] == pytest.approx(wanted, abs=1e-5)
    assert list(answer["probabilities"]) == ["BCC", "NEV", "SEK"]
    assert answer["attributes_used"] == {"region": "FACE", "itch": "true"}
    assert (answer["attributes_missing"], answer["attributes_ignored"]) == (["age"], [])
    assert answer["text"] == "a skin lesion: on the face; it itches."
    assert answer["warnings"] == [FEW]
    assert answer["prediction"] == answer["prediction_set"][0]
    assert (answer["coverage"], answer["abstained"], answer["reasons"]) == (0.8, False, [])
    assert answer["model"]["name"] == "toy-fuse"


def test_one_exam_for_a_person(tiny_fuse: Path, photos: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(tiny_fuse, photos[:1], "--metadata", '{"age": 61}') == 0
    lines = capfd.readouterr().out.splitlines()
    first = lines[2].split()
    assert lines[0] == f"prediction: {first[0]}"
    shares = [float(line.split()[1].rstrip("%")) for line in lines[2:5]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert lines[6].startswith("one of these, for 80% of exams: ")
    assert lines[7:9] == ["read: a skin lesion: age 61 years.", "not given: region, itch"]
    assert lines[9] == f"warning: {FEW}"
    assert lines[10].startswith("warning: only 1 of the 3 attributes that the model reads is given: if it learned from")


def test_a_model_of_photos_alone_says_that_it_reads_no_attributes(
    tiny_finetune: Path, photos: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert ask(tiny_finetune, photos, "--metadata", '{"age": 61}') == 0
    assert capfd.readouterr().out.splitlines()[7:] == [
        "given, but not read by this model: age",
        f"warning: {FEW}",
    ]


def test_what_an_answer_rests_on(
    tiny_fuse: Path, photos: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("--metadata", '{"age": 61}', "--explain", str(tmp_path / "why"))
    assert ask(tiny_fuse, photos[:1], *asked) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(" by ")[1] for line in lines if " by " in line] == ["age = 61"]
    assert [line for line in lines if line.startswith("note: ")] == [f"note: {NO_HEADS}", f"note: {NO_CORPUS}"]
    assert ask(tiny_fuse, photos[:1], *asked, "--json") == 0
    explanation = json.loads(capfd.readouterr().out)["explanation"]
    assert [item["attribute"] for item in explanation["contributions"]["attributes"]] == ["age"]
    assert explanation["contributions"]["without_attributes"].keys() == {"BCC", "NEV", "SEK"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --shards, or one --image or more"),
        ({"images": ["a.jpg"], "shards": "s"}, "give --shards, or one --image or more"),
        ({"images": ["a.jpg"], "out": "o"}, "--out goes with --shards; one exam is printed"),
        ({"shards": "s"}, "--shards needs --out, the Parquet file to write"),
        ({"shards": "s", "out": "o", "metadata": "{}"}, "--metadata goes with --image"),
        ({"shards": "s", "out": "o", "as_json": True}, "--json goes with --image"),
        ({"shards": "s", "out": "o", "explain": "e"}, "--explain goes with --image"),
    ],
)
def test_arguments_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrimaError) as caught:
        run_predict("none", **options)
    assert str(caught.value) in (message, f"{message}\n  See `prima predict --help`.")


def test_photos_that_cannot_be_used_exit_with_2(
    tiny_fuse: Path, photos: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, gone = tmp_path / "text.jpg", tmp_path / "gone.jpg"
    text.write_text("hello")
    for paths, said in (
        ([str(gone)], f"{gone}: cannot be read (No such file or directory)"),
        ([str(tmp_path)], f"{tmp_path}: cannot be read (Is a directory)"),
        ([photos[0], str(text)], f"{text}: this photo cannot be used: neither JPEG nor PNG (5 bytes) (not_an_image)"),
        (photos[:1] * 9, "exam: 9 photos, the model reads at most 8 of an exam"),
    ):
        assert ask(tiny_fuse, paths, "--json") == 2
        out, err = capfd.readouterr()
        assert (out, err.splitlines()[-1]) == ("", f"prima: {said}")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ('{"aeg": 61}', ["unknown attribute 'aeg'", "  Did you mean 'age'?"]),
        ('{"age": "old"}', ["age: 'old' is not a number"]),
        ('{"age": true}', ["age: 'True' is not a number"]),
        ('{"age": 61000}', ["age: 61000 is outside 0 to 120"]),
        ('{"itch": "perhaps"}', ["itch: 'perhaps' is neither true nor false"]),
        ('{"region": "MOON"}', ["region: 'MOON' is none of FACE, ARM"]),
        ('{"age": NaN}', ["--metadata: not valid JSON (NaN is no JSON; leave out what is missing, or write null)"]),
        ('{"age": 1, "age": 2}', ["--metadata: not valid JSON ('age' is given twice)"]),
        ('{"age": [61]}', ["--metadata: age: expected a text, a number, true, false or null, got a list"]),
        ('{"age": {"v": 1}}', ["--metadata: age: expected a text, a number, true, false or null, got a object"]),
        ("[1]", ["--metadata: expected an object of attributes, got a list"]),
        ('{"age": 61', ["--metadata: not valid JSON (Expecting ',' delimiter: line 1 column 11 (char 10))"]),
    ],
)
def test_metadata_that_cannot_be_read_exits_with_2(
    metadata: str,
    said: list[str],
    tiny_fuse: Path,
    photos: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert ask(tiny_fuse, photos, "--json", "--metadata", metadata) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-len(said) :] == [f"prima: {said[0]}", *said[1:]]


def test_a_metadata_file_that_is_none(tmp_path: Path) -> None:
    example = """\n  Example: --metadata '{"age": 61, "itch": true}'"""
    binary, number = tmp_path / "photo.jpg", tmp_path / "number.json"
    binary.write_bytes(b"\xff\xd8\xff")
    number.write_text("3")
    for path, said in (
        (tmp_path / "none.json", "No such file or directory"),
        (binary, "not UTF-8 text"),
    ):
        with pytest.raises(PrimaError) as caught:
            read_metadata(str(path))
        what = f"--metadata is neither a JSON object nor a file that can be read ({said})"
        assert str(caught.value) == f"{path}: {what}{example}"
    with pytest.raises(PrimaError) as caught:
        read_metadata(str(number))
    assert str(caught.value) == f"{number}: expected an object of attributes, got a int"
    with pytest.raises(PrimaError, match="not valid JSON"):
        read_metadata('{"a":' * 100_000)
    assert read_metadata(None) == {}


def test_a_file_to_write_that_is_there_or_cannot_be_written(
    tiny_fuse: Path, labelled_shards: str, tmp_path: Path
) -> None:
    there = tmp_path / "there.parquet"
    there.write_text("mine")

    def message(out: Path | str) -> str:
        with pytest.raises(PrimaError) as caught:
            run_predict(str(tiny_fuse), shards=labelled_shards, out=str(out))
        return str(caught.value)

    assert message(there) == f"{there}: --out exists\n  Name a new file; nothing is overwritten."
    assert message(tmp_path).startswith(f"{tmp_path}: --out is a folder, not a file")
    assert message(there / "p.parquet") == f"{there / 'p.parquet'}: --out cannot be written (its folder is a file)"
    assert there.read_text() == "mine"
    assert [item.name for item in tmp_path.iterdir()] == ["there.parquet"]


def test_shards_that_speak_another_language_are_refused(
    tiny_fuse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(**changes: Any) -> str:
        monkeypatch.setattr("tests.conftest.TOY", {**TOY, **changes})
        shards = write_toy_shards(tmp_path / f"shards{len(list(tmp_path.iterdir()))}", num_exams=3)
        with pytest.raises(PrimaError) as caught:
            predict_folder(str(tiny_fuse), shards, tmp_path / "p.parquet")
        return caught.value.what

    assert message(classes=TOY["classes"][::-1]) == "the shards' classes are SEK, NEV, BCC, the model's BCC, NEV, SEK"
    months = {**TOY["attributes"][2], "unit": "months"}
    assert message(attributes=[*TOY["attributes"][:2], months]) == (
        "the attribute 'age' of the shards is not the model's: kind, unit or values differ"
    )


def test_a_missing_file_of_the_run_is_told_before_a_cluster_is_started(
    tiny_fuse: Path, labelled_shards: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_fuse, tmp_path / "run"))
    weights = run / "model" / "fusion" / "model.safetensors"
    weights.unlink()
    with pytest.raises(PrimaError) as caught:
        predict_folder(str(run), labelled_shards, tmp_path / "p.parquet")
    assert str(caught.value) == f"{weights}: this file of the run is missing\n  Copy the run again, or train it again."


def test_a_model_that_the_run_did_not_write_is_refused(
    tiny_fuse: Path, photos: list[str], labelled_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(tiny_fuse, tmp_path / "run"))
    weights = run / "model" / "fusion" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    said = f"{weights}: is not the file that the run wrote (checksum)\n  Copy the run again, or train it again."
    assert ask(run, photos, "--json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    with pytest.raises(PrimaError) as caught:
        predict_folder(str(run), labelled_shards, tmp_path / "p.parquet")
    assert str(caught.value) == said
    # The predictions are not read.
    shutil.copy(tiny_fuse / "model" / "fusion" / "model.safetensors", weights)
    (run / "predictions.parquet").unlink()
    assert ask(run, photos, "--json") == 0
