from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from prima_ray.base import PrimaError
from prima_ray.data.images import ImageRejected, decode_image
from prima_ray.data.schema import SHARD_SCHEMA
from prima_ray.inference.bundle import model_version
from prima_ray.inference.diagnosis import Diagnoser, Diagnosis
from prima_ray.inference.explanation import NO_ATTRIBUTES, NO_CORPUS, NO_HEADS, NO_WORDS
from prima_ray.inference.predictor import UNCALIBRATED, Exam, Predictor
from tests.conftest import jpeg


def photo(seed: int = 0) -> bytes:
    return jpeg(np.random.default_rng(seed), 50, 40)


@pytest.fixture
def run(tiny_fuse: Path, tmp_path: Path) -> Path:
    """A run of one's own: its model alone."""
    shutil.copytree(tiny_fuse / "model", tmp_path / "run" / "model")
    return tmp_path / "run"


def recalibrate(run: Path, **changes: object) -> None:
    path = run / "model" / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_answer_says_what_it_is(tiny_fuse: Path) -> None:
    exam = Exam((photo(),), {"itch": True, "age": "61"})
    found = Diagnoser.load(tiny_fuse).diagnose_one(exam)
    wanted = Predictor.load(tiny_fuse).predict([exam])[0]
    assert list(found.probabilities) == ["BCC", "NEV", "SEK"]
    assert list(found.probabilities.values()) == pytest.approx(wanted.tolist(), abs=1e-12)
    assert found.prediction == found.prediction_set[0] == ("BCC", "NEV", "SEK")[int(wanted.argmax())]
    assert found.confidence == pytest.approx(wanted.max())
    assert (found.model, found.version) == ("toy-fuse", model_version(tiny_fuse / "model"))
    assert (found.attributes_used, found.attributes_missing) == ({"itch": "true", "age": "61"}, ("region",))
    assert set(found.timings) >= {"decode", "encode", "fuse"}
    assert json.loads(json.dumps(found.as_dict()))["prediction_set"] == list(found.prediction_set)


def test_rows_of_shards_get_the_answers_of_exams(tiny_fuse: Path) -> None:
    """Of more photos than the model reads the first count; what it does not read may be anything."""
    diagnoser = Diagnoser.load(tiny_fuse)
    most = diagnoser.predictor.config.views.max_photos
    exams = [
        Exam((photo(0),), {}),
        Exam((photo(1), photo(2)), {"itch": True, "age": 61}),
        Exam(tuple(photo(seed) for seed in range(most)), {"region": "face"}),
    ]
    rows = [diagnoser.predictor.exam_table(exam).to_pylist()[0] for exam in exams]
    rows[2]["images"].append(rows[0]["images"][0])
    rows[1]["attributes"].append(("of another data set", "?"))
    found = diagnoser.diagnose_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))
    for one, other in zip(found, diagnoser.diagnose(exams), strict=True):
        assert isinstance(other, Diagnosis)
        mine, theirs = one.as_dict(), other.as_dict()
        for key in ("probabilities", "confidence", "novelty"):
            assert mine.pop(key) == pytest.approx(theirs.pop(key), abs=1e-6), key
        # Words with figures in them, which may differ in their last digit.
        assert [item["cause"] for item in mine.pop("reasons")] == [item["cause"] for item in theirs.pop("reasons")]
        assert mine == theirs


def test_a_bad_exam_spoils_no_other(tiny_fuse: Path) -> None:
    diagnoser = Diagnoser.load(tiny_fuse)
    good = [Exam((photo(seed),), {"age": 40 + seed}) for seed in range(3)]
    bad = [Exam((), {}), Exam((b"text",), {}), Exam((photo(),), {"aeg": 3})]
    found = diagnoser.diagnose([good[0], bad[0], good[1], bad[1], bad[2], good[2]])
    assert [type(item) for item in found] == [Diagnosis, PrimaError, Diagnosis, PrimaError, PrimaError, Diagnosis]
    for exam, answer in zip(good, (found[0], found[2], found[5]), strict=True):
        assert isinstance(answer, Diagnosis)
        alone = diagnoser.diagnose_one(exam)
        assert list(answer.probabilities.values()) == pytest.approx(list(alone.probabilities.values()), abs=1e-6)
        assert answer.prediction_set == alone.prediction_set
    assert str(found[3]) == ("exam: photo 1 cannot be used: neither JPEG nor PNG (4 bytes) (not_an_image)")
    with pytest.raises(PrimaError, match="unknown attribute 'aeg'"):
        diagnoser.diagnose_one(bad[2])
    assert [str(item) for item in diagnoser.diagnose(bad)] == [str(found[place]) for place in (1, 3, 4)]
    assert diagnoser.diagnose([]) == []


def test_a_photo_that_fails_only_in_the_batch_spoils_no_other(tiny_fuse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are decoded twice, whole and reduced; the second may find what the first did not."""
    diagnoser = Diagnoser.load(tiny_fuse)
    exams = [Exam((photo(seed),), {}) for seed in range(3)]
    wanted = diagnoser.diagnose(exams)
    whole = decode_image

    def decode(data: bytes, **options: object) -> Image.Image:
        if data == exams[1].images[0]:
            raise ImageRejected("truncated_image", "in the middle")
        return whole(data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("prima_ray.data.collate.decode_image", decode)
    found = diagnoser.diagnose(exams)
    assert [type(item) for item in found] == [Diagnosis, PrimaError, Diagnosis]
    assert "cannot be decoded" in str(found[1])
    for place in (0, 2):
        one, other = found[place], wanted[place]
        assert isinstance(one, Diagnosis)
        assert isinstance(other, Diagnosis)
        assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-6)


def test_probabilities_sets_and_abstention_are_those_of_the_calibration(run: Path) -> None:
    exam = Exam((photo(),), {"age": 50})
    before = np.array(list(Diagnoser.load(run).diagnose_one(exam).probabilities.values()))
    recalibrate(run, temperature=0.25, set_threshold=0.0, min_confidence=0.9999, notes=[])
    found = Diagnoser.load(run).diagnose_one(exam)
    sharper = before**4 / (before**4).sum()
    assert list(found.probabilities.values()) == pytest.approx(sharper.tolist(), abs=1e-9)
    assert Predictor.load(run).predict([exam])[0] == pytest.approx(sharper, abs=1e-9)
    assert found.prediction_set == (found.prediction,)
    assert found.abstained
    assert [item.cause for item in found.reasons] == ["uncertain"]
    assert found.reasons[0].text == (
        f"too uncertain: the most probable diagnosis has {sharper.max():.1%}, less than 100.0%"
    )


@pytest.mark.parametrize(("least", "told"), [(0.9999, "it takes 100.0%"), (1.1, "none is believed")])
def test_told_too_little_it_asks_for_more_confidence(run: Path, least: float, told: str) -> None:
    """Exams of which as much is known as of those that it learned from are held to the usual limits."""
    level = {"completeness": 0.0, "temperature": 2.0, "set_threshold": None, "min_confidence": least}
    scarcity = {"attributes": ["age", "itch", "region"], "patterns": {"110": 40, "111": 60}, "levels": [level]}
    exams = [Exam((photo(),), {"age": 50, "itch": True}), Exam((photo(),), {"age": 50, "itch": "UNK"})]
    recalibrate(run, temperature=1.0, set_threshold=0.0, min_confidence=0.0, num_exams=100, notes=[])
    before = Predictor.load(run).predict(exams)
    recalibrate(run, scarcity=scarcity)
    predictor = Predictor.load(run)
    full, little = Diagnoser.load(run).diagnose(exams)
    assert isinstance(full, Diagnosis)
    assert (full.reasons, full.warnings, full.prediction_set) == ((), (), (full.prediction,))
    assert isinstance(little, Diagnosis)
    assert little.abstained
    assert [item.cause for item in little.reasons] == ["uncertain"]
    assert little.reasons[0].text == (
        f"too uncertain: the most probable diagnosis has {little.confidence:.1%}, and with so few attributes {told}"
    )
    assert len(little.prediction_set) == 3
    assert little.warnings == (
        "only 1 of the 3 attributes that the model reads is given; of the exams that it learned from more was known",
    )
    # Every way of asking goes through the same temperature: half as sure.
    softer = np.sqrt(before[1]) / np.sqrt(before[1]).sum()
    assert list(full.probabilities.values()) == pytest.approx(before[0].tolist(), abs=1e-9)
    assert list(little.probabilities.values()) == pytest.approx(softer.tolist(), abs=1e-9)
    assert predictor.predict(exams) == pytest.approx(np.stack([before[0], softer]), abs=1e-9)
    assert predictor.predict(exams[:1], masked=["itch"])[0] == pytest.approx(softer, abs=1e-6)


def test_a_model_of_before_there_was_a_calibration_answers_and_says_so(run: Path) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    del config["answers"]
    (run / "model" / "config.json").write_text(json.dumps(config))
    for name in ("calibration", "familiarity", "reference", "known_exam"):
        (run / "model" / f"{name}.json").unlink()
    found = Diagnoser.load(run).diagnose_one(Exam((photo(),), {"age": 1, "itch": False}))
    assert found.prediction_set == tuple(sorted(found.probabilities, key=lambda name: -found.probabilities[name]))
    assert found.warnings == (UNCALIBRATED,)
    assert not found.abstained


def test_the_version_is_of_every_byte_of_the_model(run: Path) -> None:
    before = model_version(run / "model")
    recalibrate(run, temperature=1.5)
    assert model_version(run / "model") != before
    recalibrate(run, temperature=0.0)
    with pytest.raises(PrimaError, match="damaged: temperature: Input should be greater than 0"):
        Diagnoser.load(run)


def test_what_cannot_be_explained_is_said(tiny_fuse: Path, tiny_finetune: Path) -> None:
    exam = Exam((photo(),), {"age": 50})
    found = Diagnoser.load(tiny_fuse).diagnose([exam, exam], explain=[False, True])
    assert isinstance(found[0], Diagnosis)
    assert isinstance(found[1], Diagnosis)
    assert found[0].explanation is None
    assert found[1].explanation is not None
    assert found[1].explanation.notes == (NO_HEADS, NO_CORPUS)
    assert found[1].explanation.contributions is not None
    alone = Diagnoser.load(tiny_fuse).diagnose_one(Exam((photo(),), {}), explain=True).explanation
    assert alone is not None
    assert (alone.notes, alone.contributions, alone.maps) == ((NO_ATTRIBUTES, NO_CORPUS), None, ())
    photos = Diagnoser.load(tiny_finetune).diagnose_one(exam, explain=True).explanation
    assert photos is not None
    assert photos.notes == (NO_WORDS, NO_CORPUS)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_photos_that_are_strange_or_cannot_be_used_are_not_answered(run: Path) -> None:
    def limit(distance: float) -> Diagnoser:
        record = run / "model" / "familiarity.json"
        limits = {"limits": {"features": None, "appearance": distance}}
        record.write_text(json.dumps({**json.loads(record.read_text()), **limits}))
        return Diagnoser.load(run)

    usual, black = Exam((photo(),), {}), Exam((photo(), png(np.zeros((64, 64, 3)))), {})
    found = limit(5.0).diagnose([usual, black])
    answers = [item for item in found if isinstance(item, Diagnosis)]
    assert [[reason.cause for reason in item.reasons] for item in answers] == [[], ["image_unusable"] * 2]
    assert answers[1].reasons[1].text == (
        "photo 2 cannot be used: blank or far out of focus: it shows next to no structure"
    )
    assert answers[1].abstained
    strange = limit(0.1).diagnose_one(usual)
    assert [reason.cause for reason in strange.reasons] == ["out_of_distribution"]
    assert answers[0].novelty is not None
    assert strange.novelty == pytest.approx(50 * answers[0].novelty)
    assert strange.reasons[0].text == (
        "unlike the photos that the model was trained on: in light, colour and detail "
        f"{strange.novelty:.1f} times as far from them as the limit"
    )


def test_what_an_exam_says_to_whoever_counts(tiny_fuse: Path) -> None:
    found = Diagnoser.load(tiny_fuse).diagnose_one(Exam((photo(),), {"itch": False, "age": 20}))
    assert found.drift["attribute:itch"] == "false"
    assert found.drift["attribute:region"] == "missing"
    assert found.drift["attribute:age"] == "below 43"
    assert {"prediction", "confidence", "novelty", "photo:brightness"} <= found.drift.keys()
    # The words of a patient are not among them.
    assert "20" not in found.drift.values()
