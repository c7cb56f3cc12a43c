"""Quotes that must stand in their chunk, statements that must follow from their quotes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from prima_ray.knowledge.corpus import citation_problem
from prima_ray.knowledge.entries import Entry, Quote, Statement
from prima_ray.knowledge.extractive import NO_EVIDENCE
from prima_ray.knowledge.grounding import ground
from prima_ray.knowledge.passages import find_words, normalise
from prima_ray.knowledge.support import LexicalSupport
from tests.unit.knowledge.writing import chunk

TEXT = (
    "Dust does not lower the risk of asthma. In miners, the “fine” dust \u2013 40 µg \u2013 raises the  risk\n"
    "of croup 2-fold."
)
CHUNK = chunk(TEXT, heading=("Dust at work",))


def entry(*statements: tuple[str, str], chunk_id: str = CHUNK.chunk_id) -> Entry:
    return Entry(
        factor="dust",
        diagnosis="ASTHMA",
        direction="raises",
        strength="weak",
        summary="So it is.",
        statements=tuple(
            Statement(text=text, quotes=(Quote(chunk_id=chunk_id, quote=quote),)) for text, quote in statements
        ),
    )


def reasons(*statements: tuple[str, str], **keys: str) -> list[tuple[str, str]]:
    found = ground(entry(*statements, **keys), {CHUNK.chunk_id: CHUNK})
    return [(item.reason, item.detail) for item in found.dropped]


@pytest.mark.parametrize(
    "quote",
    [
        "Dust does not lower the risk of asthma.",
        "dust does NOT lower\nthe risk",
        'the "fine" dust - 40 μg - raises the risk of croup',
        "the «fine» dust — 40 µg — raises",
        "raises the risk of croup 2-fold",
        "rai\u00adses the risk",
    ],
)
def test_a_quote_stands_whatever_its_typography(quote: str) -> None:
    span = find_words(TEXT, quote)
    assert span is not None
    assert normalise(TEXT[slice(*span)]) == normalise(quote)


@pytest.mark.parametrize(
    "quote", ["Dust lowers the risk", "ust does not", "the risk of asthm", "", " ", "of asthma In miners"]
)
def test_a_quote_that_does_not_stand(quote: str) -> None:
    assert find_words(TEXT, quote) is None


def test_an_item_that_ran_into_the_next_one_may_be_quoted() -> None:
    assert find_words("being minershaving no mask over yearsusing chalk", "having no mask over years") == (12, 37)


def test_normalise() -> None:
    assert normalise(" “Ünder”—ﬁne\u200b\u00a0 It\u2019s ") == '"ünder"-fine it\'s'


def test_what_stands_and_is_supported_is_kept_as_it_is() -> None:
    given = entry(
        (
            "Dust raises the risk of croup in miners.",
            "In miners, the “fine” dust \u2013 40 µg \u2013 raises the risk of croup",
        )
    )
    found = ground(given, {CHUNK.chunk_id: CHUNK})
    assert found.entry is given
    assert found.dropped == ()


def test_a_quote_gets_the_letters_of_its_passage() -> None:
    found = ground(
        entry(("Dust raises the risk of croup.", 'THE "fine" dust - 40 μg - raises the risk of croup')),
        {CHUNK.chunk_id: CHUNK},
    )
    quote = found.entry.statements[0].quotes[0].quote
    assert found.entry.summary == "So it is."
    assert quote == "the “fine” dust \u2013 40 µg \u2013 raises the  risk\nof croup"
    assert citation_problem(found.entry, {CHUNK.chunk_id: CHUNK}) is None


def test_a_chunk_that_there_is_not() -> None:
    assert reasons(("Dust.", "Dust"), chunk_id="nowhere") == [("unknown_chunk", "there is no chunk nowhere")]


def test_a_quote_that_its_chunk_does_not_say() -> None:
    assert reasons(("Dust is good.", "Dust is good")) == [
        ("quote_not_found", f"chunk {CHUNK.chunk_id} does not say: Dust is good")
    ]


@pytest.mark.parametrize(
    ("statement", "quote", "detail"),
    [
        ("Tea cures everything known to bakers.", "Dust does not lower the risk of asthma.", "support 0.00, below 0.8"),
        ("Dust lowers the risk of asthma.", "Dust does not lower the risk of asthma.", "support 0.00, below 0.8"),
        ("Dust does not raise the risk of croup.", "raises the risk of croup", "support 0.00, below 0.8"),
        ("Dust raises the risk of croup 3-fold.", "raises the risk of croup 2-fold", "support 0.00, below 0.8"),
        ("Dust raises the risk of tetanus and gout.", "raises the risk", "support 0.60, below 0.8"),
        ("The of and.", "raises the risk", "support 0.00, below 0.8"),
    ],
)
def test_a_statement_that_does_not_follow(statement: str, quote: str, detail: str) -> None:
    assert reasons((statement, quote)) == [("unsupported", detail)]


def test_headings_count_as_evidence_beside_the_quote() -> None:
    assert reasons(("Dust at work raises the risk of croup.", "raises the risk of croup")) == []


def test_an_entry_that_loses_all_statements_says_no_evidence() -> None:
    found = ground(entry(("Tea is good.", "Tea is good"), ("Dust is good.", "Dust is good")), {CHUNK.chunk_id: CHUNK})
    assert (found.entry.direction, found.entry.strength, found.entry.summary) == ("no_evidence", None, NO_EVIDENCE)
    assert found.entry.statements == ()
    assert [(item.factor, item.diagnosis, item.statement) for item in found.dropped] == [
        ("dust", "ASTHMA", "Tea is good."),
        ("dust", "ASTHMA", "Dust is good."),
    ]


def test_an_entry_that_keeps_a_statement_keeps_its_direction() -> None:
    given = entry(("Dust is good.", "Dust is good"), ("It raises the risk of croup.", "raises the risk of croup"))
    found = ground(given, {CHUNK.chunk_id: CHUNK})
    assert found.entry.direction == "raises"
    assert [item.text for item in found.entry.statements] == ["It raises the risk of croup."]
    assert len(found.dropped) == 1
    # What the summary said may have rested on what was dropped.
    assert found.entry.summary == (
        "Raises the risk (weak; 1 source; 1 statement without support left out). "
        f"“It raises the risk of croup.” [{CHUNK.chunk_id}]"
    )


def test_another_scorer_with_a_threshold_of_its_own() -> None:
    class Stern:
        threshold = 0.5

        def score(self, statement: str, evidence: Sequence[str]) -> float:
            assert evidence == ["raises the risk of croup", "Dust at work", "A page"]
            return 0.4

    found = ground(entry(("It does.", "raises the risk of croup")), {CHUNK.chunk_id: CHUNK}, Stern())
    assert [item.detail for item in found.dropped] == ["support 0.40, below 0.5"]


def test_scores() -> None:
    support = LexicalSupport()
    assert support.score("Dust raises risk.", ["Fine dust raises the risk."]) == 1.0
    assert support.score("Dust raises risk greatly.", ["Fine dust raises the risk."]) == 0.75
