from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from prima_ray.base import PrimaError
from prima_ray.data.description import DataSetConfig
from prima_ray.evaluation.metrics import headline
from prima_ray.evaluation.statistics import resample_patients
from prima_ray.evaluation.subgroups import Subgroup, SubgroupsConfig, find_subgroups, subgroup_evidence
from tests.conftest import TOY

DATA_SET = DataSetConfig.model_validate(TOY)
ROWS = [
    {"region": "FACE", "itch": "true", "age": "39.5"},
    {"region": "FACE", "itch": "false", "age": "40"},
    {"region": "ARM", "age": "75"},
    {"itch": "true"},
]


def groups(rows: list[dict[str, str]] = ROWS, others: list[dict[str, str]] | None = None, **config: Any) -> Any:
    found = find_subgroups(rows, others or [], DATA_SET, SubgroupsConfig.model_validate(config))
    return [(item.attribute, item.value, np.flatnonzero(item.members).tolist()) for item in found]


def test_values_bands_and_what_is_missing() -> None:
    bands = {"age": [40, 60]}
    assert groups(bands=bands) == [
        ("region", "face", [0, 1]),
        ("region", "arm", [2]),
        ("region", "not recorded", [3]),
        # An edge begins the next band; nobody is between 40 and 60 but the one at 40.
        ("age", "below 40 years", [0]),
        ("age", "40 to below 60 years", [1]),
        ("age", "60 years or more", [2]),
        ("age", "not recorded", [3]),
        ("metadata", "complete", [0, 1, 2]),
        ("metadata", "a block is missing", [3]),
    ]
    assert groups(attributes=["itch"])[:3] == [
        ("itch", "yes", [0, 3]),
        ("itch", "no", [1]),
        ("itch", "not recorded", [2]),
    ]


def test_bands_that_are_not_named_are_thirds_of_other_exams() -> None:
    others = [{"age": str(age)} for age in range(10, 71)]
    assert [item[1:] for item in groups(attributes=["history"], others=others)[:3]] == [
        ("30 to below 50 years", [0, 1]),
        ("50 years or more", [2]),
        ("not recorded", [3]),
    ]
    assert groups(attributes=["age"])[0] == ("age", "all values", [0, 1, 2])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"attributes": ["regoin"]}, "subgroups.attributes: toy has no attribute 'regoin'\n  Did you mean 'region'?"),
        ({"bands": {"agee": [3]}}, "subgroups.bands: toy has no attribute 'agee'\n  Did you mean 'age'?"),
        ({"bands": {"itch": [3]}}, "subgroups.bands: itch is no numeric attribute\n  Leave it out: values are groups."),
    ],
)
def test_what_the_data_set_does_not_have_is_named(config: dict[str, Any], said: str) -> None:
    with pytest.raises(PrimaError) as caught:
        groups(**config)
    assert str(caught.value) == said


def test_edges_must_rise() -> None:
    with pytest.raises(ValueError, match="the edges of age must rise, and be one at least"):
        SubgroupsConfig(bands={"age": (60.0, 40.0)})


def exams(seed: int = 0, count: int = 120) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    probabilities = rng.dirichlet(np.ones(3), count) + 0.8 * np.eye(3)[labels]
    return labels, probabilities / probabilities.sum(1, keepdims=True), [f"p{number // 2}" for number in range(count)]


def test_a_group_beside_all_others_on_the_same_resamples() -> None:
    labels, probabilities, patients = exams()
    members = np.arange(120) % 3 == 0
    (found,) = subgroup_evidence(labels, probabilities, patients, [Subgroup("a", "b", members)], num_resamples=60)
    inside = headline(labels[members], probabilities[members])
    outside = headline(labels[~members], probabilities[~members])
    gaps = []
    for rows in resample_patients(patients, num_resamples=60, seed=0):
        mine, others = rows[members[rows]], rows[~members[rows]]
        gaps.append(
            headline(labels[mine], probabilities[mine])["macro_f1"]
            - headline(labels[others], probabilities[others])["macro_f1"]
        )
    assert (found["num_exams"], found["num_patients"]) == (40, len({patients[row] for row in np.flatnonzero(members)}))
    assert found["figures"]["macro_f1"]["value"] == pytest.approx(inside["macro_f1"])
    gap = found["differences"]["macro_f1"]
    assert gap["value"] == pytest.approx(inside["macro_f1"] - outside["macro_f1"])
    assert (gap["low"], gap["high"]) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))


def test_a_group_that_is_served_worse_is_found_and_a_small_one_is_not_judged() -> None:
    labels, probabilities, patients = exams()
    members = np.arange(120) < 40
    harmed = probabilities.copy()
    harmed[members] = np.roll(harmed[members], 1, axis=1)
    small, rest = np.arange(120) < 29, np.arange(120) >= 29
    found = subgroup_evidence(
        labels,
        harmed,
        patients,
        [Subgroup("a", "harmed", members), Subgroup("a", "small", small), Subgroup("a", "nearly all", rest)],
        num_resamples=100,
    )
    assert found[0]["verdicts"]["accuracy"] == "worse"
    assert (found[1]["num_exams"], found[1]["figures"], found[1]["verdicts"]) == (29, None, None)
    # Few are left outside: there is a figure, and nothing to compare it with.
    assert math.isfinite(found[2]["figures"]["accuracy"]["low"])
    assert (found[2]["differences"], found[2]["verdicts"]) == (None, None)
