from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prima_ray.evaluation.faithfulness import Deleted, area, by_attribute, faithfulness_evidence, order_of
from prima_ray.evaluation.statistics import mean_interval


def test_the_area_is_the_mean_height_of_the_first_part() -> None:
    curve = np.array([1.0, 0.5, 0.0, 0.8, 1.0])
    assert area(curve, 1.0) == pytest.approx((0.75 + 0.25 + 0.4 + 0.9) / 4)
    assert area(curve, 0.5) == pytest.approx(0.5)
    # Between two steps: 0.3 is past the first quarter, where the curve is at 0.4.
    assert area(curve, 0.3) == pytest.approx((0.75 * 0.25 + 0.45 * 0.05) / 0.3)


def test_the_highest_score_goes_first() -> None:
    assert order_of(np.array([0.1, 0.9, -1.0, 0.9])).tolist() == [1, 3, 0, 2]


def exams(count: int, fall: float) -> list[Deleted]:
    """A method that takes `fall` with the first cell; random orders take it with each place equally often."""
    found = []
    for number in range(count):
        steps = np.arange(5)
        mine = np.where(steps > 0, 1 - fall, 1.0)
        random = np.stack([np.where(steps > place, 1 - fall, 1.0) for place in range(4)])
        scores = np.array([3.0, 2.0, 1.0, 0.0])
        found.append(
            Deleted(
                patient=f"p{number}",
                curves={"map": mine, "flat": random[3]},
                random=random,
                scores={"map": scores, "flat": scores[::-1]},
            )
        )
    return found


def test_a_map_that_knows_gains_over_chance_and_one_that_does_not_loses() -> None:
    found = faithfulness_evidence(exams(12, fall=0.8), share=1.0, num_resamples=50, seed=0)
    # By trapezoids: the fall is half done in the first step, random ones are 1.5 steps later on average.
    assert found["methods"]["map"]["gain"]["value"] == pytest.approx(0.8 * 1.5 / 4)
    assert found["methods"]["map"]["verdict"] == "better"
    assert found["methods"]["flat"]["verdict"] == "worse"
    assert found["agreement"]["flat"]["value"] == pytest.approx(-1)
    assert found["random"]["curve"][0] == 1
    assert found["random"]["curve"][-1] == pytest.approx(0.2)
    assert (found["num_exams"], found["num_patients"]) == (12, 12)


def test_a_method_that_says_nothing_of_an_exam_is_judged_by_the_others() -> None:
    some = exams(12, fall=0.8)
    for place in (0, 5):
        item = some[place]
        some[place] = replace(item, curves={"flat": item.curves["flat"]}, scores={"flat": item.scores["flat"]})
    found = faithfulness_evidence(some, share=1.0, num_resamples=50, seed=0)
    assert found["methods"]["map"]["num_exams"] == 10
    assert found["methods"]["flat"]["num_exams"] == 12
    assert found["methods"]["map"]["gain"]["value"] == pytest.approx(0.8 * 1.5 / 4)


def test_where_nothing_falls_nobody_gains() -> None:
    found = faithfulness_evidence(exams(12, fall=0.0), share=0.3, num_resamples=50, seed=0)
    assert found["methods"]["map"]["gain"]["value"] == 0
    assert found["methods"]["map"]["verdict"] == "not distinguishable"


def test_of_no_exam_nothing_is_said() -> None:
    found = faithfulness_evidence([], share=0.3, num_resamples=50, seed=0)
    assert found["methods"] == {}
    assert found["num_exams"] == 0


def test_sizes_are_over_the_exams_that_give_an_attribute() -> None:
    found = by_attribute([{"age": -2.0, "itch": 0.5}, {"age": 1.0}])
    assert found == [
        {"attribute": "age", "mean_absolute": 1.5, "num_exams": 2},
        {"attribute": "itch", "mean_absolute": 0.5, "num_exams": 1},
    ]


def test_a_mean_is_drawn_over_patients() -> None:
    values = np.array([1.0, 1.0, 0.0, np.nan])
    found = mean_interval(values, ["a", "a", "b", "c"], num_resamples=400, seed=0)
    assert found.value == pytest.approx(2 / 3)
    # Both exams of a patient go together: never one of them.
    assert (found.low, found.high) == (0.0, 1.0)
    alone = mean_interval(values[:2], ["a", "a"], num_resamples=400, seed=0)
    assert alone.value == 1
    assert np.isnan(alone.low)
    assert np.isnan(mean_interval(values[3:], ["c"], num_resamples=4, seed=0).value)
