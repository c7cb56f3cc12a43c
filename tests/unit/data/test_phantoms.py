"""The phantoms' truth: the bounds against hand-computed values and drawn exams, the files against their description."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prima_ray.base import PrimaError
from prima_ray.config import load_config, read_yaml
from prima_ray.data.description import CategoricalAttribute, DataSetConfig, OrdinalAttribute
from prima_ray.data.phantom_pictures import Look, render
from prima_ray.data.phantoms import (
    CLASSES,
    LEAK,
    PhantomConfig,
    PhantomRecord,
    bayes_accuracy,
    data_set_description,
    generate,
    ingest_config,
    sample_sheet,
    write_phantoms,
)

ROOT = Path(__file__).parents[3]
TINY = PhantomConfig(num_patients=12, seed=5, image_side=24)


@pytest.fixture(scope="module")
def many() -> list[PhantomRecord]:
    return list(generate(PhantomConfig(num_patients=900, seed=3, image_side=16)))


def test_neither_modality_alone_passes_0_65_and_both_together_pass_0_90() -> None:
    bound = bayes_accuracy()
    assert 0.25 < bound.image <= 0.65
    assert 0.25 < bound.attributes <= 0.65
    assert bound.both >= 0.90


def test_the_image_bound_is_the_hand_computed_one() -> None:
    # Given v, the two classes of that v have (1 - e)/2 + e/6 each.
    assert bayes_accuracy(PhantomConfig(label_noise=0.06)).image == pytest.approx(0.94 / 2 + 0.01)
    assert bayes_accuracy(PhantomConfig(label_noise=0.0)).image == pytest.approx(0.5)


def test_where_every_sign_is_missing_the_attributes_are_worth_a_guess() -> None:
    blind = bayes_accuracy(PhantomConfig(missing_rate=0.999999))
    assert blind.attributes == pytest.approx(0.25, abs=1e-5)
    assert blind.both == pytest.approx(blind.image, abs=1e-5)


def test_shuffling_one_modality_leaves_the_bound_of_the_other() -> None:
    bound = bayes_accuracy()
    assert bound.image_shuffled == pytest.approx(bound.attributes)
    assert bound.attributes_shuffled == pytest.approx(bound.image)


def test_more_label_noise_lowers_every_bound() -> None:
    clean, noisy = (dataclasses.astuple(bayes_accuracy(PhantomConfig(label_noise=e))) for e in (0.0, 0.2))
    assert all(low < high for low, high in zip(noisy, clean, strict=True))


def _signs_say_restless(record: PhantomRecord) -> bool:
    """The Bayes rule, written down again from the published tables."""
    told = record.attributes
    score = 0.0
    for name, quiet, restless in (("grew", 0.07, 0.93), ("itch", 0.10, 0.90), ("bleed", 0.05, 0.85)):
        log_odds = {"True": np.log(restless / quiet), "False": np.log((1 - restless) / (1 - quiet))}
        score += log_odds.get(told[name], 0.0)
    surface = {"SMOOTH": 0.04 / 0.60, "ROUGH": 0.12 / 0.28, "SCALY": 0.34 / 0.08, "CRUSTED": 0.50 / 0.04}
    score += np.log(surface.get(told["surface"], 1.0))
    if told["months"] not in ("", "UNK"):
        month = np.log(float(told["months"]))
        score += ((month - np.log(60)) ** 2 - (month - np.log(9)) ** 2) / (2 * 0.7**2)
    return score > 0


def test_an_independent_bayes_rule_reaches_the_bounds_on_drawn_exams(many: list[PhantomRecord]) -> None:
    bound = bayes_accuracy()
    told = np.array([_signs_say_restless(record) for record in many])
    veiled = np.array([record.veiled for record in many])
    label = np.array([CLASSES.index(record.label) for record in many])
    shuffled = np.random.default_rng(0).permutation(veiled)
    for chosen, expected in (
        (2 * veiled + told, bound.both),
        (2 * veiled, bound.image),
        (2 * veiled + 1, bound.image),
        (told * 1, bound.attributes),
        (2 * shuffled + told, bound.image_shuffled),
    ):
        error = np.sqrt(expected * (1 - expected) / len(many))
        assert abs((chosen == label).mean() - expected) < 3.5 * error


def test_the_coins_and_the_shared_traits_are_independent(many: list[PhantomRecord]) -> None:
    veiled = np.array([record.veiled for record in many], float)
    restless = np.array([record.restless for record in many], float)
    shared = {
        "hairy": [record.attributes["region"] in ("SCALP", "CHEST", "ARM", "LEG") for record in many],
        "history": [record.attributes["smoke"] in ("", "UNK") for record in many],
        "incomplete": [record.attributes["grew"] in ("", "UNK") for record in many],
        "two photos": [len(record.photos) == 2 for record in many],
    }
    columns = [veiled, restless, *(np.array(values, float) for values in shared.values())]
    for left, right in itertools.product(columns[:2], columns[1:]):
        if left is not right:
            assert abs(np.corrcoef(left, right)[0, 1]) < 3.5 / np.sqrt(len(many))


def test_the_label_noise_changes_labels_and_nothing_else() -> None:
    clean = list(generate(TINY.model_copy(update={"label_noise": 0.0})))
    noisy = list(generate(TINY.model_copy(update={"label_noise": 0.75})))
    assert all(record.label == CLASSES[2 * record.veiled + record.restless] for record in clean)
    assert [record.label for record in clean] != [record.label for record in noisy]
    same_label = [dataclasses.replace(record, label=truth.label) for record, truth in zip(noisy, clean, strict=True)]
    assert same_label == clean


def test_more_patients_add_records_and_change_none() -> None:
    fewer = list(generate(TINY))
    more = list(generate(TINY.model_copy(update={"num_patients": 14})))
    assert more[: len(fewer)] == fewer
    assert len(more) > len(fewer)


def test_every_exam_has_one_or_two_photos_and_every_patient_one_to_three_exams(many: list[PhantomRecord]) -> None:
    assert {len(record.photos) for record in many} == {1, 2}
    per_patient = [len(list(group)) for _, group in itertools.groupby(record.patient_id for record in many)]
    assert set(per_patient) == {1, 2, 3}
    assert {record.label for record in many} == set(CLASSES)
    ids = [image_id for record in many for image_id in record.photos]
    assert len(set(ids)) == len(ids)


def test_the_history_goes_missing_as_a_block(many: list[PhantomRecord]) -> None:
    block = ("family_history", "smoke", "sunburns")
    gone = [sum(record.attributes[name] in ("", "UNK") for name in block) == 3 for record in many]
    assert 0.15 < np.mean(gone) < 0.27


@pytest.mark.parametrize("skin_type", [1, 2, 3, 4, 5, 6])
def test_the_veil_shows_on_every_skin_and_not_without_it(skin_type: int) -> None:
    def bluest(*, veiled: bool, seed: int) -> float:
        look = Look(veiled=veiled, skin_type=skin_type, diameter_mm=5, num_hairs=8)
        photo = render(look, side=64, lesion=np.random.default_rng(seed), photo=np.random.default_rng(99 + seed))
        pixels = np.asarray(photo.resize((16, 16), Image.Resampling.BOX), float)
        return float(np.max(pixels[4:12, 4:12, 2] - pixels[4:12, 4:12, 0]))

    veiled = [bluest(veiled=True, seed=seed) for seed in range(6)]
    plain = [bluest(veiled=False, seed=seed) for seed in range(6)]
    assert min(veiled) > max(plain)


def test_two_photos_of_one_lesion_differ_and_the_same_photo_does_not() -> None:
    look = Look(veiled=True, skin_type=3, diameter_mm=10, num_hairs=5)

    def draw(photo: int) -> bytes:
        return render(look, side=32, lesion=np.random.default_rng(1), photo=np.random.default_rng(photo)).tobytes()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_same_config_writes_the_same_bytes(tmp_path: Path) -> None:
    def contents(name: str, config: PhantomConfig) -> dict[str, bytes]:
        write_phantoms(tmp_path / name, config)
        folder = tmp_path / name
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first = contents("a", TINY)
    assert contents("b", TINY) == first
    assert contents("c", TINY.model_copy(update={"seed": 6})) != first


def test_a_broken_off_writing_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(config: PhantomConfig) -> list[PhantomRecord]:
        return [next(generate(config)), None]  # type: ignore[list-item]

    monkeypatch.setattr("prima_ray.data.phantoms.generate", breaks)
    with pytest.raises(AttributeError):
        write_phantoms(tmp_path, TINY)
    assert not (tmp_path / "metadata.csv").exists()


def test_the_table_has_a_row_per_photo_and_what_the_description_names(tmp_path: Path) -> None:
    write_phantoms(tmp_path, TINY)
    description = DataSetConfig(**data_set_description())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "metadata.csv").read_text())))
    assert {row["image_id"] for row in rows} == {path.stem for path in (tmp_path / "images").glob("*.jpg")}
    assert len(rows) == sum(len(record.photos) for record in generate(TINY))
    assert {row["diagnosis"] for row in rows} <= set(description.class_names)
    assert LEAK in rows[0]
    assert LEAK in description.leaks
    for item in description.attributes:
        seen = {row[item.table_column] for row in rows} - set(description.missing)
        if isinstance(item, CategoricalAttribute | OrdinalAttribute):
            assert seen <= set(item.values)
        elif item.kind == "numeric":
            assert all(item.minimum <= float(value) <= item.maximum for value in seen)
        else:
            assert seen <= {"True", "False"}
    for path in (tmp_path / "images").glob("*.jpg"):
        with Image.open(path) as photo:
            assert (photo.format, photo.mode, photo.size) == ("JPEG", "RGB", (24, 24))


def test_the_shipped_config_is_the_generated_one() -> None:
    shipped = read_yaml(ROOT / "jobs/configs/phantoms/ingest.yaml")
    expected = ingest_config("../../../runs/phantoms/raw")
    assert DataSetConfig(**shipped.pop("data_set")) == DataSetConfig(**expected.pop("data_set"))
    assert shipped == expected


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "phantoms.yaml").write_text("num_patient: 3\n")
    with pytest.raises(PrimaError, match="num_patients"):
        load_config(PhantomConfig, tmp_path / "phantoms.yaml")


def test_the_sample_sheet_is_four_rows_of_pictures() -> None:
    assert sample_sheet(columns=2, side=32).size == (64, 128)
