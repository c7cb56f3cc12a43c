"""Precision, recall, coverage and false citations, against counts made by hand."""

from __future__ import annotations

import pytest

from prima_ray.base import PrimaError
from prima_ray.knowledge.agreement import DirectionScore, LabelledPair, compare, is_development
from prima_ray.knowledge.entries import Direction, Entry, Quote, Statement


def entry(factor: str, direction: Direction, *quotes: str) -> Entry:
    silent = direction == "no_evidence"
    return Entry(
        factor=factor,
        diagnosis="D",
        direction=direction,
        strength=None if silent else "weak",
        summary="",
        statements=tuple(Statement(text=text, quotes=(Quote(chunk_id="c", quote=text),)) for text in quotes),
    )


def pair(factor: str, direction: Direction, locator: tuple[str, ...] = (), traps: tuple[str, ...] = ()) -> LabelledPair:
    return LabelledPair(factor=factor, diagnosis="D", direction=direction, locator=locator, traps=traps)


PAIRS = [
    pair("a", "raises", ("p1",)),
    pair("b", "raises", ("p2",), ("p9",)),
    pair("c", "lowers", ("p3",)),
    pair("d", "no_evidence", (), ("p9",)),
    pair("e", "no_evidence"),
]
ENTRIES = [
    entry("a", "raises", "in p1", "in p2"),
    entry("b", "no_evidence"),
    entry("c", "raises", "in p3"),
    entry("d", "raises", "in p9"),
    entry("e", "no_evidence"),
    entry("f", "lowers", "in p1"),
]


def passages_of(chunk_id: str, quote: str) -> list[str]:
    return [quote.removeprefix("in ")]


def test_counts() -> None:
    found = compare(ENTRIES, PAIRS, passages_of)
    assert found.by_direction == {
        "raises": DirectionScore(labelled=2, written=3, right=1),
        "lowers": DirectionScore(labelled=1, written=0, right=0),
        "none": DirectionScore(labelled=0, written=0, right=0),
        "no_evidence": DirectionScore(labelled=2, written=2, right=1),
    }
    assert found.accuracy == pytest.approx(2 / 5)
    assert (found.by_direction["raises"].precision, found.by_direction["raises"].recall) == (1 / 3, 1 / 2)
    assert (found.by_direction["lowers"].precision, found.by_direction["lowers"].recall) == (None, 0.0)
    assert found.by_direction["none"].recall is None
    assert found.coverage == pytest.approx(2 / 3)
    assert (found.statements, found.located, found.trapped) == (4, 2, 1)
    assert found.false_citations == pytest.approx(1 / 4)
    assert found.wrong == (
        ("b", "D", "raises", "no_evidence"),
        ("c", "D", "lowers", "raises"),
        ("d", "D", "no_evidence", "raises"),
    )


def test_a_quote_that_stands_in_a_trap_and_elsewhere_too_is_no_false_citation() -> None:
    found = compare(ENTRIES[:1], [pair("a", "raises", ("p1",), ("p9",))], lambda chunk_id, quote: ["p1", "p9"])
    assert (found.located, found.trapped) == (2, 0)


def test_mistakes() -> None:
    with pytest.raises(PrimaError) as caught:
        compare([], PAIRS, passages_of)
    assert str(caught.value) == "no entry for a x D\n  Write the pair before comparing."
    with pytest.raises(PrimaError) as caught:
        compare(ENTRIES, [], passages_of)
    assert str(caught.value) == "no labelled pair to compare with"


def test_without_evidence_there_is_no_coverage() -> None:
    found = compare(ENTRIES, PAIRS[4:], passages_of)
    assert (found.coverage, found.false_citations, found.accuracy) == (None, None, 1.0)


def test_the_halves_depend_on_the_factor_and_the_seed_alone() -> None:
    factors = [f"factor_{index}" for index in range(200)]
    half = [is_development(factor) for factor in factors]
    assert half == [is_development(factor) for factor in factors]
    assert 70 < sum(half) < 130
    assert half != [is_development(factor, seed=43) for factor in factors]
