from __future__ import annotations

import math

import numpy as np
import pytest

from prima_ray.data.description import DataSetConfig
from prima_ray.inference.reference import (
    Reference,
    Variable,
    attribute_variables,
    exam_values,
    of_numbers,
    of_texts,
)
from tests.conftest import TOY

DATA_SET = DataSetConfig.model_validate(TOY)


def test_texts_are_counted_and_rare_ones_together() -> None:
    found = of_texts(["a"] * 6 + ["b"] * 3 + [None] * 5 + ["c"] * 6)
    assert found.shares == {"a": 0.3, "c": 0.3, "missing": 0.25, "other": 0.15}
    assert [found.answer(value) for value in ("a", "b", "never seen", None)] == ["a", "other", "other", "missing"]


def test_numbers_fall_into_bins_of_about_equal_size() -> None:
    found = of_numbers([float(value) for value in range(100)] + [None] * 100)
    assert found.edges is not None
    assert len(found.edges) == 9
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["missing"] == 0.5
    bins = [share for name, share in found.shares.items() if name != "missing"]
    assert bins == pytest.approx([0.05] * 10, abs=0.006)
    assert found.answer(-5) == f"below {found.edges[0]:.6g}"
    assert found.answer(found.edges[0]) == f"{found.edges[0]:.6g} to {found.edges[1]:.6g}"
    assert found.answer("99") == f"{found.edges[-1]:.6g} and more"
    assert of_numbers([1.0, 2.0, 3.0]).shares == {"any": 1.0}
    assert of_numbers([7.0] * 30).shares == {"any": 1.0}


def test_attributes_are_counted_by_kind() -> None:
    rows = [{"itch": "true", "age": str(20 + number)} for number in range(30)] + [{"region": "ARM"}] * 10
    found = attribute_variables(rows, DATA_SET)
    assert found["attribute:itch"].shares == {"missing": 0.25, "true": 0.75}
    assert found["attribute:region"].shares == {"ARM": 0.25, "missing": 0.75}
    assert found["attribute:age"].edges is not None


def test_an_exam_becomes_answers() -> None:
    variables = {
        "attribute:itch": of_texts(["true"] * 9 + ["false"] * 9),
        "confidence": Variable(edges=(0.5,), shares={"below 0.5": 0.2, "0.5 and more": 0.8}),
    }
    reference = Reference(num_train=18, num_val=10, variables=variables)
    values = exam_values(DATA_SET, {"itch": "true"}, "BCC", 0.5, np.zeros((2, 16)))
    assert values["attribute:region"] is None
    assert reference.answers(values) == {"attribute:itch": "true", "confidence": "0.5 and more"}


def test_the_stability_index_by_hand() -> None:
    reference = Reference(num_train=1, num_val=1, variables={"v": Variable(shares={"a": 0.5, "b": 0.5})})
    # Half an exam more each: 0.9 and 0.1 of 1000 against a half each.
    a, b = 900.5 / 1001, 100.5 / 1001
    wanted = (a - 0.5) * math.log(a / 0.5) + (b - 0.5) * math.log(b / 0.5)
    assert reference.stability("v", {"a": 900, "b": 100}) == pytest.approx(wanted)
    assert wanted > 0.25
    assert reference.stability("v", {"a": 500, "b": 500}) == pytest.approx(0.0)
    assert 0 < reference.stability("v", {"a": 500, "b": 400, "new": 100}) < math.inf
    assert math.isnan(reference.stability("v", {}))
