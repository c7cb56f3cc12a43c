"""The declaration of factors: mistakes and their texts, and the one that is shipped."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from prima_ray.base import PrimaError
from prima_ray.config import load_config, validate_config
from prima_ray.data.description import DataSetConfig
from prima_ray.knowledge.factors import VocabularyConfig, check_vocabulary
from prima_ray.knowledge.vocabulary import Vocabulary
from tests.unit.knowledge.writing import CONFIGS, DATA_SET, VOCABULARY

PAIRS = yaml.safe_load((CONFIGS.parents[2] / "tests/data/risk_pairs.yaml").read_text(encoding="utf-8"))


def config(**changes: Any) -> VocabularyConfig:
    return validate_config(VocabularyConfig, {**VOCABULARY, **changes}, where="factors.yaml")


def factor(**keys: Any) -> VocabularyConfig:
    return config(factors=[{"key": "dust", "phrase": "dust", "terms": ["dust"], **keys}])


def mistake(**keys: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        factor(**keys)
    return str(caught.value)


def test_a_factor_without_terms() -> None:
    assert mistake(terms=[]) == (
        "factors.yaml: factors.0: factor 'dust' has no terms: no sentence could mention it; list how texts call it"
    )


def test_terms_that_cannot_be_read() -> None:
    assert mistake(but_not=["du*st"]) == (
        "factors.yaml: factors.0: factor 'dust': the term 'du*st' holds 'du*st': a term is words, '*' at the end of "
        "one, and '...' between two"
    )


def test_values_need_an_attribute() -> None:
    assert (
        mistake(values=[True])
        == "factors.yaml: factors.0: factor 'dust' has values, but no attribute that could have them"
    )


def test_unknown_keys_and_roles() -> None:
    assert mistake(term=["x"]).startswith("factors.yaml: unknown key 'factors.0.term', did you mean 'factors.0.terms'?")
    assert "factors.0.role" in mistake(role="smell")


def test_what_is_given_twice_or_not_at_all() -> None:
    one = {"key": "dust", "phrase": "dust", "terms": ["dust"]}
    for changes, text in (
        ({"factors": [one, one]}, "factors.yaml: factor 'dust' is given twice"),
        ({"factors": []}, "factors.yaml: factors: none is listed"),
        ({"diagnoses": [{"name": "CROUP"}, {"name": "CROUP"}]}, "factors.yaml: diagnosis 'CROUP' is given twice"),
        ({"unspecific": [""]}, "factors.yaml: unspecific: the term '' is empty"),
    ):
        with pytest.raises(PrimaError) as caught:
            config(**changes)
        assert str(caught.value) == text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"diagnoses": [{"name": "CROOP"}]},
            "f.yaml: diagnosis 'CROOP' is none of airways\n  Did you mean 'CROUP'?",
        ),
        (
            {"umbrellas": [{"terms": ["x"], "means": ["ZZZ"]}]},
            "f.yaml: diagnosis 'ZZZ' is none of airways\n  Known: ASTHMA, CROUP, COLD.",
        ),
        (
            {"factors": [{"key": "dust", "phrase": "dust", "terms": ["dust"], "attribute": "dust"}]},
            "f.yaml: factor 'dust': attribute 'dust' is none of airways\n  Did you mean 'dusty'?",
        ),
        (
            {"factors": [{"key": "w", "phrase": "w", "terms": ["w"], "attribute": "noise", "values": ["WHEZE"]}]},
            "f.yaml: factor 'w': value 'WHEZE' is none of airways\n  Did you mean 'WHEEZE'?",
        ),
        (
            {"factors": [{"key": "y", "phrase": "y", "terms": ["y"], "attribute": "years", "values": ["70"]}]},
            "f.yaml: factor 'y': the attribute 'years' is numeric and has no values\n  Leave values out.",
        ),
        (
            {"factors": [{"key": "d", "phrase": "d", "terms": ["d"], "attribute": "dusty", "values": ["perhaps"]}]},
            "f.yaml: factor 'd': value 'perhaps' is none of airways\n  Known: true, false.",
        ),
    ],
)
def test_what_the_data_set_does_not_have(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PrimaError) as caught:
        check_vocabulary(config(**changes), DataSetConfig.model_validate(DATA_SET), where="f.yaml")
    assert str(caught.value) == text


def test_a_column_that_gives_the_label_away_is_no_factor() -> None:
    leaking = DataSetConfig.model_validate({**DATA_SET, "leaks": ["dusted"]})
    with pytest.raises(PrimaError) as caught:
        check_vocabulary(factor(attribute="dusted"), leaking)
    assert str(caught.value) == "factor 'dust' is the column 'dusted', which gives the label away"


def test_a_closed_list_of_values_is_kept_and_an_open_one_takes_any() -> None:
    check_vocabulary(factor(attribute="noise", values=["HUM"]), DataSetConfig.model_validate(DATA_SET))
    check_vocabulary(factor(attribute="town", values=["Ghent"]), DataSetConfig.model_validate(DATA_SET))


# ------------------------------------------------------------------------------------------------------ as shipped


@pytest.fixture(scope="module")
def shipped() -> VocabularyConfig:
    return load_config(VocabularyConfig, CONFIGS / "factors.yaml")


@pytest.fixture(scope="module")
def pad_ufes_20() -> DataSetConfig:
    raw = yaml.safe_load((CONFIGS / "ingest.yaml").read_text(encoding="utf-8"))
    return DataSetConfig.model_validate(raw["data_set"])


def test_the_shipped_vocabulary_fits_the_data_set(shipped: VocabularyConfig, pad_ufes_20: DataSetConfig) -> None:
    check_vocabulary(shipped, pad_ufes_20)
    assert {item.name for item in shipped.diagnoses} == set(pad_ufes_20.class_names)


def test_every_attribute_is_a_factor_but_the_second_diameter(
    shipped: VocabularyConfig, pad_ufes_20: DataSetConfig
) -> None:
    recorded = {item.attribute for item in shipped.factors}
    assert set(pad_ufes_20.attribute_names) - recorded == {"diameter_2"}


def test_the_labelled_factors_are_declared_as_they_are_labelled(shipped: VocabularyConfig) -> None:
    factors = {item.key: item for item in shipped.factors}
    for pair in PAIRS:
        found = factors[pair["factor"]]
        assert (found.phrase, found.attribute, list(found.values)) == (
            pair["phrase"],
            pair.get("attribute"),
            pair.get("values", []),
        )


def test_a_factor_and_a_diagnosis_mention_themselves(shipped: VocabularyConfig, pad_ufes_20: DataSetConfig) -> None:
    found = Vocabulary(shipped, pad_ufes_20)
    for item in shipped.factors:
        plain = [term for term in item.terms if "*" not in term and "..." not in term]
        hidden = [term for term in plain if item.key not in found.factors_in(term)]
        assert hidden == [], item.key
