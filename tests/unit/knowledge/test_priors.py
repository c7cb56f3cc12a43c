from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.data.attribute_vectors import SoftTargetConfig, SoftTargetEncoder
from prima_ray.data.description import DataSetConfig
from prima_ray.data.metadata import MetadataTextConfig, describe
from prima_ray.knowledge.corpus import Corpus, FactorLink
from prima_ray.knowledge.priors import AttributePrior, Priors, PriorsConfig, apply_priors, resolve_priors
from prima_ray.knowledge.vetting import Verdict, append, read_log, resolve
from tests.conftest import TOY
from tests.unit.knowledge.toy_corpus import ENTRIES, FACTORS, OLD, OTHER, SUN, entry, make_corpus

DATA_SET = DataSetConfig.model_validate(TOY)


def vet(corpus: Corpus, **decisions: str) -> None:
    """`age_NEV="accepted"`."""
    for name, decision in decisions.items():
        key = ":".join(name.rsplit("_", 1))
        append(corpus, [Verdict.model_validate(
            {"entry_id": key, "entry_hash": corpus.hashes[key], "decision": decision, "by": "Ana"})])  # fmt: skip


def priors(corpus: Corpus, **keys: Any) -> Priors:
    vetting = resolve(corpus, read_log(corpus.path))
    return resolve_priors(DATA_SET, corpus, vetting, PriorsConfig(**keys), corpus_hash="abc")


def found(corpus: Corpus, name: str, **keys: Any) -> AttributePrior:
    return next(item for item in priors(corpus, **keys).attributes if item.attribute == name)


def brief(item: AttributePrior) -> tuple[bool, str, bool, str]:
    return item.relevant, item.relevant_by, item.disease_related, item.disease_related_by


def test_without_a_usable_entry_the_description_holds(tmp_path: Path):
    corpus = make_corpus(tmp_path, factors=[FACTORS[2]])
    for name in ("region", "itch", "age"):
        assert brief(found(corpus, name)) == (True, "description", False, "description")
    assert found(corpus, "age").relevant_reason == (
        "no usable entry speaks of it; as the data set's description has it"
    )
    vet(corpus, age_NEV="rejected")
    assert brief(found(corpus, "age", unvetted=True)) == (True, "description", False, "description")


def test_an_accepted_entry_relates_an_attribute_to_a_class(tmp_path: Path):
    corpus = make_corpus(tmp_path)
    vet(corpus, age_NEV="accepted")
    age = found(corpus, "age")
    assert brief(age) == (True, "literature", True, "literature")
    assert age.disease_related_reason == "related to a class by age:NEV (lowers, moderate, 1 sources)"
    assert [item.model_dump() for item in age.evidence] == [
        {
            "entry_id": "age:NEV",
            "phrase": "older age",
            "direction": "lowers",
            "strength": "moderate",
            "num_sources": 1,
            "status": "accepted",
            "relates": True,
        }
    ]
    assert not priors(corpus).unvetted


def test_what_was_looked_into_without_a_relation_is_not_relevant(tmp_path: Path):
    corpus = make_corpus(
        tmp_path,
        entries=[entry("age", "BCC", "none", (SUN, "Older age does too")), entry("age", "NEV", "no_evidence")],
    )
    vet(corpus, age_BCC="accepted", age_NEV="accepted")
    age = found(corpus, "age")
    assert brief(age) == (False, "literature", False, "literature")
    assert age.relevant_reason == "2 entries speak of it and none relates it to a class as asked"
    # What describes the lesion or the skin can be seen, whatever it says of risk.
    assert brief(found(corpus, "age", visible=("history",))) == (True, "visible", False, "literature")


def test_signs_and_sites_describe_the_lesion(tmp_path: Path):
    corpus = make_corpus(tmp_path)
    itch = found(corpus, "itch")
    assert brief(itch) == (True, "visible", False, "description")
    assert itch.relevant_reason == "it describes the lesion (itch is a sign)"


def test_how_much_is_asked(tmp_path: Path):
    both = entry("age", "BCC", "raises", (SUN, "Older age"), (OTHER, "40 of 100"), strength="weak")
    corpus = make_corpus(tmp_path, entries=[both, ENTRIES[3]])
    vet(corpus, age_BCC="accepted", age_NEV="accepted")
    assert found(corpus, "age").num_sources == 3
    asked = found(corpus, "age", min_sources=2)
    assert [item.relates for item in asked.evidence] == [True, False]
    assert (asked.num_sources, asked.disease_related) == (2, True)
    asked = found(corpus, "age", min_strength="moderate")
    assert [item.relates for item in asked.evidence] == [False, True]
    assert not found(corpus, "age", min_strength="strong").disease_related
    assert not found(corpus, "age", min_strength="moderate", min_sources=2).disease_related


def test_the_config_comes_first(tmp_path: Path):
    corpus = make_corpus(tmp_path)
    vet(corpus, age_NEV="accepted")
    keys: dict[str, Any] = {
        "relevant": {"age": False, "itch": False},
        "disease_related": {"age": False, "region": True},
    }
    assert brief(found(corpus, "age", **keys)) == (False, "config", False, "config")
    assert brief(found(corpus, "itch", **keys))[:2] == (False, "config")
    assert brief(found(corpus, "region", **keys))[2:] == (True, "config")
    # An attribute's own line comes before its block's, in whatever order.
    for order in (("history", "age"), ("age", "history")):
        choice = {name: name == "age" for name in order}
        assert found(corpus, "age", relevant=choice).relevant


@pytest.mark.parametrize("key", ["visible", "relevant", "disease_related"])
def test_names_that_the_data_set_does_not_have(tmp_path: Path, key: str):
    corpus = make_corpus(tmp_path)
    with pytest.raises(PrimaError) as caught:
        priors(corpus, **{key: ("itsh",) if key == "visible" else {"itsh": True}})
    assert str(caught.value) == f"priors.{key}: toy has no attribute 'itsh'\n  Did you mean 'itch'?"


def test_unvetted_entries_are_used_only_by_the_key_and_leave_a_mark(tmp_path: Path):
    corpus = make_corpus(tmp_path)
    assert not found(corpus, "age").disease_related
    assert found(corpus, "age", unvetted=True).disease_related
    assert priors(corpus, unvetted=True).unvetted
    vet(corpus, age_NEV="accepted", itch_BCC="accepted")
    # What is open still is on no attribute of the data set.
    assert not priors(corpus, unvetted=True).unvetted


def test_diagnoses_and_attributes_of_other_data_sets(tmp_path: Path):
    links = [
        FactorLink(key="age", phrase="age", attribute="years"),
        FactorLink(key="itch", phrase="x", attribute="itch"),
    ]
    entries = [entry("age", "BCC", "raises", (SUN, "Older age")), entry("itch", "MEL", "raises", (OLD, "fewer"))]
    corpus = make_corpus(tmp_path, entries=entries, factors=links)
    vet(corpus, age_BCC="accepted", itch_MEL="accepted")
    assert priors(corpus).ignored_attributes == ("years",)
    assert brief(found(corpus, "itch")) == (True, "description", False, "description")


def test_the_description_with_the_choices_is_a_new_one(tmp_path: Path):
    corpus = make_corpus(tmp_path)
    vet(corpus, age_NEV="accepted")
    chosen = apply_priors(DATA_SET, priors(corpus, relevant={"region": False}))
    assert DataSetConfig.model_validate(TOY) == DATA_SET
    assert [(item.relevant, item.disease_related) for item in chosen.attributes] == [
        (False, False), (True, False), (True, True),
    ]  # fmt: skip
    row = {"region": "FACE", "itch": "true", "age": "61"}
    assert describe(row, chosen, MetadataTextConfig()) == "a skin lesion: it itches; age 61 years."
    encoder = SoftTargetEncoder.fit([row], chosen, SoftTargetConfig(bins=2))
    assert {block.name: block.weight for block in encoder.blocks} == {"region": 1.0, "itch": 1.0, "age": 3.0}


def test_priors_are_read_as_they_were_written(tmp_path: Path):
    made = priors(make_corpus(tmp_path), unvetted=True)
    assert Priors.model_validate_json(made.model_dump_json()) == made
