from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.data.leaks import (
    LeaksConfig,
    associations,
    cramers_v,
    naming_texts,
    refuse_planted_leaks,
    report,
    warnings,
)

DRAW = random.Random(3)
LABELS: list[str | None] = [("MEL", "NEV", "SEK")[DRAW.randrange(3)] for _ in range(60)]
FOLDS = np.array([position % 4 for position in range(60)], dtype=np.int32)


def data_set(*attributes: dict[str, Any], **keys: Any) -> DataSetConfig:
    classes = [
        {"name": "MEL", "phrase": "melanoma", "synonyms": ["malignant melanoma"]},
        {"name": "NEV", "phrase": "nevus"},
        {"name": "SEK", "phrase": "seborrheic keratosis"},
    ]
    return DataSetConfig(**{"name": "d", "classes": classes, "attributes": attributes, **keys})


def categorical(name: str, **keys: Any) -> dict[str, Any]:
    return {"kind": "categorical", "name": name, "phrase": "{value}", **keys}


NOTES = {"kind": "text", "name": "notes", "phrase": "{value}"}


def check(
    values: Sequence[str | None],
    attribute: dict[str, Any],
    *,
    labels: Sequence[str | None] = LABELS,
    declared: dict[str, list[str | None]] | None = None,
    **keys: Any,
) -> str | None:
    """What is refused, None where nothing is."""
    rows = [{} if value is None else {str(attribute["name"]): value} for value in values]
    try:
        refuse_planted_leaks(rows, labels, declared or {}, data_set(attribute), LeaksConfig(**keys))
    except PrimaError as error:
        return str(error)
    return None


def test_a_recoded_copy_of_the_label_is_refused():
    for code in ({"MEL": "1", "NEV": "2", "SEK": "0"}, {"MEL": "x", "NEV": "y", "SEK": "y"}):
        assert check([code[str(label)] for label in LABELS], categorical("code")) == (
            "attribute 'code' is a recoded copy of the diagnosis\n"
            "  Remove it from data_set.attributes; if it may be known at prediction time, add it to leaks.accept."
        )
    finer = [f"{label}{position % 2}" for position, label in enumerate(LABELS)]
    assert check(finer, categorical("finer")) is not None
    assert check(finer, categorical("finer"), accept=["finer"]) is None
    slips = ["MEL" if position == 5 else label for position, label in enumerate(LABELS)]
    assert check(slips, categorical("slips")) is not None


def test_what_tells_the_label_well_but_not_surely_is_no_copy():
    noisy = ["M" if position % 10 == 0 else str(label)[0] for position, label in enumerate(LABELS)]
    assert check(noisy, categorical("noisy")) is None


def test_many_values_in_a_small_data_set_are_no_recoding():
    assert check([str(position) for position in range(60)], categorical("number")) is None
    ages = [str(20 + DRAW.randrange(45)) for _ in range(60)]
    assert check(ages, {"kind": "numeric", "name": "age", "phrase": "{value}", "minimum": 0, "maximum": 99}) is None
    nearly_constant = ["yes" if position else "no" for position in range(60)]
    assert check(nearly_constant, categorical("nearly_constant")) is None
    few = [str(label)[0] for label in LABELS[:9]]
    assert check(few, categorical("few"), labels=LABELS[:9]) is None


def test_a_copy_of_a_declared_leak_is_refused_under_any_name_and_cannot_be_accepted():
    biopsed: list[str | None] = [("True", "False")[DRAW.randrange(2)] for _ in LABELS]
    text = (
        "attribute 'seen' says the same as the column 'biopsed', which `leaks` says gives the label away\n"
        "  Remove it from data_set.attributes."
    )
    for copy in ({"True": "true", "False": "false"}, {"True": "no", "False": "yes"}):
        values = [copy[str(cell)] for cell in biopsed]
        assert check(values, categorical("seen"), declared={"biopsed": biopsed}, accept=["seen"]) == text
    values[::7] = [None] * len(values[::7])
    assert check(values, categorical("seen"), declared={"biopsed": biopsed}) == text
    other = [("a", "b")[DRAW.randrange(2)] for _ in LABELS]
    assert check(other, categorical("seen"), declared={"biopsed": biopsed}) is None


def test_a_copied_number_with_many_values_is_found():
    days: list[str | None] = [f"{DRAW.random() * 900:.1f}" for _ in LABELS]
    numeric = {"kind": "numeric", "name": "wait", "phrase": "{value}", "minimum": 0, "maximum": 999}
    copied = [f"{float(str(cell)):.2f}" for cell in days]
    found = check(copied, numeric, declared={"days_to_biopsy": days})
    assert found is not None
    assert "says the same as the column 'days_to_biopsy'" in found
    assert check([str(DRAW.random()) for _ in LABELS], numeric, declared={"days_to_biopsy": days}) is None


@pytest.mark.parametrize("attribute", [NOTES, categorical("notes")])
@pytest.mark.parametrize(
    "text",
    [
        "excised, MELANOMA.",
        "a malignant  melanoma, II",
        "mel?",
        "two melanomas",
        "Malignant-Melanoma",
        "MalignantMelanoma",
        "case_MEL_7",
        "MEL7",
        "two melanomata",
        "mel\u200banoma",
        "m\u00e9la\u00adnoma",
        "\uff2d\uff25\uff2c",
    ],
)
def test_free_text_that_names_the_diagnosis_is_refused(attribute: dict[str, Any], text: str):
    labels = ["MEL"] * 20 + ["NEV"] * 20
    values = ["grew since May"] * 40
    values[:2] = [text] * 2
    assert check(values, attribute, labels=labels) == (
        "attribute 'notes': the text names the exam's own diagnosis in 5.0% of the exams\n"
        "  Remove it from data_set.attributes; if it may be known at prediction time, add it to leaks.accept."
    )


@pytest.mark.parametrize("text", ["three nevi", "nevuses", "NEV_1", "Nevus2b"])
def test_a_latin_plural_names_the_diagnosis(text: str):
    assert check([text, "harmless"] * 10, NOTES, labels=["NEV", "SEK"] * 10) is not None


def test_a_part_of_a_word_or_number_names_nothing():
    described = data_set(NOTES, classes=[{"name": "T1", "phrase": "stage one"}, {"name": "MEL", "phrase": " "}])
    rows = [{"notes": text} for text in ("T10", "at1", "caramel", "melody", "-")]
    assert naming_texts(rows, ["T1", "T1", "MEL", "MEL", "MEL"], described) == {}
    assert naming_texts([{"notes": "x_t1_"}], ["T1"], described) == {"notes": 1}


def test_text_about_other_diagnoses_or_other_words_is_fine():
    values = ["father had melanoma", "caramel coloured", "no nevi, nevus count 0", None] * 15
    labels: list[str | None] = ["SEK", "MEL", "MEL", "NEV"] * 15
    labels[:12] = ["NEV", "SEK", "SEK", "MEL"] * 3
    assert check(values, NOTES, labels=labels) is None
    assert check(["no label to name"] * 60, NOTES, labels=[None] * 60) is None


def test_a_single_text_that_names_the_diagnosis_is_reported():
    rows = [{"notes": "looks fine"} for _ in LABELS]
    rows[LABELS.index("MEL")] = {"notes": "melanoma"}
    naming = naming_texts(rows, LABELS, data_set(NOTES))
    assert naming == {"notes": 1 / 60}
    assert warnings([], naming, data_set(NOTES), LeaksConfig()) == [
        "notes: the text names the exam's own diagnosis in 1.7% of the exams"
    ]
    assert report([], naming)["texts_naming_the_diagnosis"] == naming


def test_missingness_that_tells_the_label_is_reported_once_for_a_block():
    rows = [{"a": "x", "b": "y", "c": str(DRAW.randrange(2))} if label != "SEK" else {"c": "1"} for label in LABELS]
    described = data_set(*map(categorical, "abc"), blocks=[{"name": "history", "attributes": ["a", "b"]}])
    found = associations(rows, LABELS, FOLDS, described)
    assert [(item.what, item.kind) for item in found[:3]] == [
        ("a", "missing"),
        ("b", "missing"),
        ("history", "block missing"),
    ]
    assert found[0].cramers_v > 0.95
    told = warnings(found, {}, described, LeaksConfig())
    assert len(told) == 1
    assert told[0].startswith("block history: being missing tells the diagnosis (Cramer's V ")
    assert told[0].endswith(f"against 0.33 by chance; missing in {LABELS.count('SEK') / 60:.0%})")


def test_a_block_that_nobody_declared_is_found():
    rows = [{"a": "x", "b": "y"} if label != "SEK" else {} for label in LABELS]
    described = data_set(*map(categorical, "ab"))
    told = warnings(associations(rows, LABELS, FOLDS, described), {}, described, LeaksConfig())
    assert any(text.startswith("block undeclared block: a, b: being missing tells") for text in told)


def test_a_value_that_tells_much_is_reported_unless_accepted():
    rows = [{"a": str(label) if DRAW.random() < 0.9 else "MEL"} for label in LABELS]
    described = data_set(categorical("a"))
    found = associations(rows, LABELS, FOLDS, described)
    assert warnings(found, {}, described, LeaksConfig())[0].startswith(
        "a: its value tells the diagnosis (Cramer's V 0."
    )
    assert warnings(found, {}, described, LeaksConfig(accept=("a",))) == []


def test_a_copy_of_the_label_with_very_many_codes_is_reported():
    labels: list[str | None] = ["MEL", "NEV", "SEK"] * 200
    draw = random.Random(1)
    rows = [{"a": f"{label}{draw.randrange(60)}"} for label in labels]
    described = data_set(categorical("a"))
    found = associations(rows, labels, np.arange(600, dtype=np.int32) // 3 % 4, described)
    assert warnings(found, {}, described, LeaksConfig())[0].startswith("a: its value tells the diagnosis")


def test_cramers_v_of_hand_made_tables():
    assert cramers_v(np.array([0, 0, 1, 1] * 50), np.array([0, 0, 1, 1] * 50)) == pytest.approx(1, abs=1e-3)
    assert cramers_v(np.array([0, 1, 0, 1] * 50), np.array([0, 0, 1, 1] * 50)) == 0
    assert cramers_v(np.array([0, 0, 0]), np.array([0, 1, 2])) == 0
    # chi2 = 100 * (30 * 30 - 20 * 20)^2 / 50^4 = 4; phi2 = 0.04, less 1/99; both corrected sides are 2 - 1/99.
    codes, truth = np.repeat([0, 0, 1, 1], [30, 20, 20, 30]), np.repeat([0, 1, 0, 1], [30, 20, 20, 30])
    assert cramers_v(codes, truth) == pytest.approx(((0.04 - 1 / 99) / (1 - 1 / 99)) ** 0.5)


def test_a_perfect_teller_guesses_everything_and_noise_guesses_nothing():
    rows = [{"a": str(label), "b": str(position % 2)} for position, label in enumerate(LABELS)]
    found = {
        item.what: item
        for item in associations(rows, LABELS, FOLDS, data_set(*map(categorical, "ab")))
        if item.kind == "value"
    }
    assert found["a"].balanced_accuracy == 1
    assert found["a"].chance == pytest.approx(1 / 3)
    assert found["b"].balanced_accuracy < 0.6


def test_exams_without_labels_tell_nothing():
    rows = [{"a": "x"}, {}] * 10
    found = associations(rows, [None] * 20, np.full(20, -1, dtype=np.int32), data_set(categorical("a")))
    assert {item.cramers_v for item in found} == {0.0}
    assert {item.num_exams for item in found} == {0}
