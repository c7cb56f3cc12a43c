from __future__ import annotations

import numpy as np
import pytest

from prima_ray.evaluation.evidence import BEFORE, calibration_evidence, operating_evidence
from prima_ray.evaluation.metrics import headline
from prima_ray.evaluation.reliability import reliability
from prima_ray.evaluation.report import Section
from prima_ray.evaluation.sections import (
    calibration_section,
    interval_cell,
    operating_section,
    selective_section,
    subgroup_section,
)
from prima_ray.evaluation.selective import selective_figures
from prima_ray.evaluation.subgroups import Subgroup, subgroup_evidence

NAMES = ("A", "B", "C")


def exams(seed: int, count: int = 80) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    probabilities = rng.dirichlet(np.ones(3), count) + np.eye(3)[labels]
    return labels, probabilities / probabilities.sum(1, keepdims=True), [f"p{number}" for number in range(count)]


def flat(probabilities: np.ndarray) -> np.ndarray:
    powered = probabilities**0.2
    return powered / powered.sum(1, keepdims=True)


def cells(section: Section) -> str:
    return " ".join(str(cell) for grid in section.grids for row in grid.rows for cell in row)


def test_what_calibration_was_worth() -> None:
    labels, probabilities, patients = exams(0)
    record = calibration_evidence(
        labels,
        {"ours": probabilities, "rival": np.roll(probabilities, 1, axis=0)},
        flat(probabilities),
        probabilities > 0.2,
        patients,
        class_names=NAMES,
        asked_coverage=0.9,
        num_resamples=60,
    )
    models = record["figures"]["models"]
    assert list(models) == ["ours", BEFORE, "rival"]
    for name, given in (("ours", probabilities), (BEFORE, flat(probabilities))):
        wanted = {**reliability(labels, given), **selective_figures(labels, given)}
        assert {figure: item["value"] for figure, item in models[name].items()} == pytest.approx(wanted)
    # Five times too unsure: the loss is higher, the order of the confidences hardly another.
    assert record["figures"]["verdicts"][BEFORE]["nll"] == "better"
    assert record["figures"]["differences"][BEFORE]["nll"]["high"] < 0
    held = (probabilities > 0.2)[np.arange(80), labels]
    assert record["sets"]["coverage"]["value"] == pytest.approx(held.mean())
    assert record["sets"]["by_class"][1]["coverage"] == pytest.approx(held[labels == 1].mean())
    assert record["curve"]["risk"][-1] == pytest.approx(1 - headline(labels, probabilities)["accuracy"])
    page = calibration_section(record, num_exams=80)
    assert "NLL better" in page.note
    assert len(page.pictures) == 1
    assert BEFORE not in cells(selective_section(record))


def test_a_group_of_classes_beside_a_rival() -> None:
    labels, probabilities, patients = exams(1)
    models = {"ours": probabilities, "rival": np.roll(probabilities, 1, axis=0)}
    val = exams(2)[:2]
    record = operating_evidence(labels, models, patients, (0, 2), thresholds_from=val, num_resamples=60)
    assert (record["num_positive"], record["num_negative"]) == ((labels != 1).sum(), (labels == 1).sum())
    assert record["verdicts"]["rival"]["auroc"] == "better"
    gap = record["models"]["ours"]["auroc"]["value"] - record["models"]["rival"]["auroc"]["value"]
    assert record["differences"]["rival"]["auroc"]["value"] == pytest.approx(gap)
    assert [item["asked"] for item in record["thresholds"]] == [0.9, 0.95]
    assert record["thresholds"][0]["num_negatives"] == (val[0] == 1).sum()
    page = operating_section(["A", "C"], {"All exams": record})
    assert page.title == "A, C against the rest"
    assert page.grids[0].heads == [
        "model",
        "AUROC",
        "sensitivity at 90%",
        "sensitivity at 95%",
        "ours, by AUROC",
    ]
    assert page.grids[0].caption == f"All exams: {(labels != 1).sum()} against {(labels == 1).sum()}"
    assert "better" in cells(page)


def test_small_groups_are_named_and_not_judged() -> None:
    labels, probabilities, patients = exams(3)
    groups = [Subgroup("age", "old", np.arange(80) < 40), Subgroup("age", "young", np.arange(80) < 5)]
    records = subgroup_evidence(labels, probabilities, patients, groups, num_resamples=20)
    page = subgroup_section(records, min_exams=30)
    assert [row[0] for row in page.grids[0].rows] == [("old", "age")]
    assert page.grids[1].rows == [("age: young (5)",)]


def test_cells() -> None:
    nothing = float("nan")
    assert interval_cell({"value": 0.5, "low": 0.25, "high": 0.75}) == ("50.0", "25.0\u201375.0")
    assert interval_cell({"value": 0.5, "low": -0.25, "high": 0.75}, sign=True) == ("+50.0", "-25.0 to +75.0")
    assert interval_cell({"value": nothing, "low": nothing, "high": nothing}) == ("n/a", "")
    assert interval_cell(None) == "-"
