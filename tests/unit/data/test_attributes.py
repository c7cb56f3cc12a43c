from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from prima_ray.base import PrimaError
from prima_ray.data.attributes import AttributeRejected, is_missing, normalise_attributes, normalise_value
from prima_ray.data.description import AttributeConfig, DataSetConfig

MISSING = ("NA", "UNK", "None")
ADAPTER: TypeAdapter[Any] = TypeAdapter(AttributeConfig)


def attribute(kind: str, **keys: Any) -> Any:
    more = {"numeric": {"minimum": -10, "maximum": 1000}, "boolean": {"phrase_false": "not"}}.get(kind, {})
    return ADAPTER.validate_python({"kind": kind, "name": "x", "phrase": "{value}", **more, **keys})


AGE = attribute("numeric")
ITCH = attribute("boolean", true_values=["sim", "1"], false_values=["não", "0"])
REGION = attribute("categorical", values={"FACE": "face", "None": "nowhere"}, synonyms={"cheek": "FACE"})
STAGE = attribute("ordinal", values={"1": "I", "2": "II"})
OPEN = attribute("categorical", synonyms={"BRASIL": "BRAZIL"})
NOTE = attribute("text", max_chars=12)


@pytest.mark.parametrize(
    ("item", "raw", "value"),
    [
        (AGE, " 41 ", "41"),
        (AGE, "41.0", "41"),
        (AGE, "41.50", "41.5"),
        (AGE, 41, "41"),
        (AGE, "1e2", "100"),
        (AGE, "-0.0000001", "0"),
        (AGE, "0.1234567", "0.123457"),
        (AGE, "", None),
        (AGE, "   ", None),
        (AGE, float("nan"), None),
        (AGE, "na", None),
        (attribute("numeric", decimals=0), "2.6", "3"),
        (attribute("numeric", decimals=2), "2.6", "2.60"),
        (attribute("numeric", missing=["-1"]), "-1", None),
        (ITCH, "SIM", "true"),
        (ITCH, "não", "false"),
        (ITCH, True, "true"),
        (ITCH, "False", "false"),
        (ITCH, "UNK", None),
        (REGION, "face", "FACE"),
        (REGION, "Cheek", "FACE"),
        (REGION, "none", "None"),
        (REGION, "unk", None),
        (STAGE, "2.0", "2"),
        (OPEN, "brasil", "BRAZIL"),
        (OPEN, "POMERANIA", "POMERANIA"),
        (NOTE, " red \n spot  grew fast", "red spot gre"),
        (NOTE, "eleven char s", "eleven char"),
    ],
)
def test_cells_become_canonical_values(item: Any, raw: object, value: str | None):
    assert normalise_value(item, raw, missing=MISSING) == value


@pytest.mark.parametrize(
    ("item", "raw", "text"),
    [
        (AGE, "old", "attribute_type: x: 'old' is not a number"),
        (AGE, "1_000", "attribute_type: x: '1_000' is not a number"),
        (AGE, "4 1", "attribute_type: x: '4 1' is not a number"),
        (AGE, "3,5", "attribute_type: x: '3,5' is not a number"),
        (AGE, "nan", "attribute_range: x: nan is outside -10 to 1000"),
        (AGE, "1e999", "attribute_range: x: inf is outside -10 to 1000"),
        (ITCH, "yes", "attribute_type: x: 'yes' is neither true nor false"),
        (REGION, "TAIL", "attribute_value: x: 'TAIL' is none of FACE, None"),
        (STAGE, "3", "attribute_value: x: '3' is none of 1, 2"),
        (STAGE, "z" * 90, f"attribute_value: x: '{'z' * 57}...' is none of 1, 2"),
    ],
)
def test_values_that_an_attribute_cannot_have(item: Any, raw: object, text: str):
    with pytest.raises(AttributeRejected) as caught:
        normalise_value(item, raw, missing=MISSING)
    assert str(caught.value) == text


def test_the_attribute_may_call_one_of_its_own_values_missing():
    item = attribute("categorical", values={"FACE": "face", "None": "nowhere"}, missing=["none"])
    assert normalise_value(item, "None", missing=()) is None


raw_cells = st.one_of(
    st.text(max_size=30),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(),
    st.booleans(),
    st.none(),
    st.sampled_from(["sim", "FACE", "cheek", "none", "2.0", "-0.4", "0.5", "999.9999999", "BRASIL", "true"]),
)


@pytest.mark.parametrize("item", [AGE, attribute("numeric", decimals=1), ITCH, REGION, STAGE, OPEN, NOTE])
@given(raw=raw_cells)
def test_a_canonical_value_stays_as_it_is(item: Any, raw: object):
    try:
        value = normalise_value(item, raw, missing=MISSING)
    except AttributeRejected:
        return
    if value is not None:
        assert value == value.strip() != ""
        assert normalise_value(item, value, missing=MISSING) == value


def test_missing_is_a_matter_of_spelling():
    assert all(is_missing(raw, MISSING) for raw in (None, float("nan"), "", "  ", "unk", " NA "))
    assert not any(is_missing(raw, MISSING) for raw in (0, False, "no", "0"))


def test_a_form_names_the_nearest_attribute(data_set: DataSetConfig):
    assert normalise_attributes(data_set, {"x": "7", "y": None}) == {"x": "7"}
    for raw, text in (
        ({"ex": 1}, "unknown attribute 'ex'\n  Did you mean 'x'?"),
        ({"age": 1}, "unknown attribute 'age'\n  Known: x, y."),
        ({"a" * 5000: 1}, f"unknown attribute '{'a' * 57}...'\n  Known: x, y."),
        ({"x": "seven"}, "x: 'seven' is not a number"),
    ):
        with pytest.raises(PrimaError) as caught:
            normalise_attributes(data_set, raw)
        assert str(caught.value) == text


@pytest.fixture
def data_set() -> DataSetConfig:
    return DataSetConfig(**description(attributes=[AGE, AGE.model_copy(update={"name": "y"})]))


def description(**keys: Any) -> dict[str, Any]:
    classes = [{"name": "A", "phrase": "a"}, {"name": "B", "phrase": "b"}]
    return {"name": "d", "classes": classes, **keys}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"kind": "numeric", "minimum": 5, "maximum": 5}, "minimum 5 is not below maximum 5"),
        (
            {"kind": "numeric", "minimum": 0.5, "decimals": 0},
            "minimum 0.5 has more than the 0 decimals that are kept",
        ),
        (
            {"kind": "categorical", "synonyms": {"a": "b", "b": "c"}},
            "synonym 'a' leads to 'b', which is a synonym itself",
        ),
        (
            {"kind": "categorical", "values": {"A": "a"}, "synonyms": {"c": "B"}},
            "synonym 'c' leads to 'B', which is none of A",
        ),
        (
            {"kind": "ordinal", "values": {"low": "l", "LOW": "l"}},
            "value (case is ignored) 'low' is given twice",
        ),
    ],
)
def test_descriptions_that_contradict_themselves(keys: dict[str, Any], text: str):
    with pytest.raises(ValidationError) as caught:
        attribute(**keys)
    assert f"Value error, {text} " in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (
            {"classes": [{"name": "A", "phrase": "a"}, {"name": "B", "phrase": "b", "synonyms": ["a"]}]},
            "the spelling of a class (case is ignored) 'a' is given twice",
        ),
        ({"attributes": [AGE, AGE]}, "attribute 'x' is given twice"),
        (
            {"attributes": [AGE], "leaks": ["x"]},
            "attribute 'x' reads the column 'x', which `leaks` says gives the label away; "
            "remove it from the attributes",
        ),
        (
            {"attributes": [AGE.model_copy(update={"column": "biopsed"})], "leaks": ["biopsed"]},
            "attribute 'x' reads the column 'biopsed', which `leaks` says gives the label away; "
            "remove it from the attributes",
        ),
        (
            {"attributes": [AGE.model_copy(update={"column": "Biopsed "})], "leaks": ["biopsed"]},
            "attribute 'x' reads the column 'Biopsed ', which `leaks` says gives the label away; "
            "remove it from the attributes",
        ),
        ({"blocks": [{"name": "b", "attributes": ["z"]}]}, "block 'b' names the unknown attribute 'z'"),
    ],
)
def test_data_sets_that_contradict_themselves(keys: dict[str, Any], text: str):
    with pytest.raises(ValidationError) as caught:
        DataSetConfig(**description(**keys))
    assert f"Value error, {text} " in str(caught.value)
