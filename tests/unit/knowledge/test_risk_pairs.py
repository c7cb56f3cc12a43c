"""The hand-labelled factor x diagnosis pairs: their shape, and that what they cite stands in the literature."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
LITERATURE = Path(os.environ.get("PRIMA_SHARED", ROOT.parent / "shared")) / "data" / "literature"
needs_literature = pytest.mark.skipif(not LITERATURE.is_dir(), reason="literature is not in $PRIMA_SHARED/data")
PAIRS: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests/data/risk_pairs.yaml").read_text(encoding="utf-8"))
DATA_SET = yaml.safe_load((ROOT / "jobs/configs/pad_ufes_20/ingest.yaml").read_text(encoding="utf-8"))["data_set"]
DIRECTIONS = {"raises", "lowers", "none", "no_evidence"}
REQUIRED = {"factor", "phrase", "diagnosis", "direction", "documents", "locator"}
OPTIONAL = {"attribute", "values", "arguable", "reason", "anchor", "traps", "searches", "note"}


def name(pair: dict[str, Any]) -> str:
    return f"{pair['factor']} x {pair['diagnosis']}"


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def passages() -> dict[str, tuple[str, str, str]]:
    """Id to (doc_id, heading or question, text or answer)."""
    found = {}
    for file, head, body in (
        ("pdq_cancer_risk/sections.jsonl", "section", "text"),
        ("medquad/medquad_skin.jsonl", "question", "answer"),
    ):
        with (LITERATURE / file).open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                found[record["id"]] = (record["doc_id"], record[head], record[body])
    return found


def test_every_pair_is_there_once_and_every_direction_and_class_is_known() -> None:
    assert len(PAIRS) >= 48
    assert [key for key, count in Counter(map(name, PAIRS)).items() if count > 1] == []
    assert {pair["direction"] for pair in PAIRS} == DIRECTIONS
    assert {pair["diagnosis"] for pair in PAIRS} == {item["name"] for item in DATA_SET["classes"]}


def test_a_factor_has_one_phrase_and_one_column() -> None:
    for field in ("phrase", "attribute", "values"):
        said = {(pair["factor"], json.dumps(pair.get(field))) for pair in PAIRS}
        assert [factor for factor, count in Counter(factor for factor, _ in said).items() if count > 1] == []


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_fields(pair: dict[str, Any]) -> None:
    assert pair.keys() >= REQUIRED
    assert pair.keys() <= REQUIRED | OPTIONAL
    assert re.fullmatch(r"[a-z0-9_]+", pair["factor"])
    assert ("reason" in pair) == pair.get("arguable", False)
    # Evidence or the searches that found none; never both.
    evidence = pair["direction"] != "no_evidence"
    assert (
        evidence == bool(pair["documents"]) == bool(pair["locator"]) == ("anchor" in pair) == ("searches" not in pair)
    )
    assert set(pair["locator"]).isdisjoint(pair.get("traps", []))
    for field in ("documents", "locator", "traps"):
        assert len(set(pair.get(field, []))) == len(pair.get(field, []))
    if evidence:
        assert pair["anchor"]["section"] in pair["locator"]
        assert 0 < len(pair["anchor"]["quote"].split()) <= 12


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "attribute" in pair], ids=name)
def test_columns_and_their_values_are_the_data_sets(pair: dict[str, Any]) -> None:
    attribute = {item["name"]: item for item in DATA_SET["attributes"]}[pair["attribute"]]
    if attribute["kind"] == "numeric":
        assert "values" not in pair
    elif attribute["kind"] == "boolean":
        assert pair["values"] in ([True], [False])
    elif "values" in attribute:
        assert set(pair["values"]) <= attribute["values"].keys()
    else:
        assert pair["values"]


@needs_literature
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_what_is_cited_stands_there(pair: dict[str, Any], passages: dict[str, tuple[str, str, str]]) -> None:
    assert [key for key in (*pair["locator"], *pair.get("traps", [])) if key not in passages] == []
    assert pair["documents"] == list(dict.fromkeys(passages[key][0] for key in pair["locator"]))
    if "anchor" in pair:
        assert plain(pair["anchor"]["quote"]) in plain(passages[pair["anchor"]["section"]][2])


@needs_literature
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "searches" in pair], ids=name)
def test_the_searches_that_found_nothing_can_be_repeated(
    pair: dict[str, Any], passages: dict[str, tuple[str, str, str]]
) -> None:
    for search in pair["searches"]:
        patterns = [re.compile(item, re.IGNORECASE) for item in search["all"]]
        texts = (f"{head}\n{body}" for _, head, body in passages.values())
        assert sum(all(item.search(text) for item in patterns) for text in texts) == search["passages"]
