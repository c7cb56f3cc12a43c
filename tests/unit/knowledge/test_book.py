from __future__ import annotations

import re
from pathlib import Path

import pytest

from prima_ray.knowledge.book import render_book, write_book
from prima_ray.knowledge.corpus import Corpus
from prima_ray.knowledge.vetting import Verdict, Vetting, append, read_log, resolve
from tests.unit.knowledge.page import Page
from tests.unit.knowledge.toy_corpus import ENTRIES, make_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus")


def state(corpus: Corpus) -> Vetting:
    return resolve(corpus, read_log(corpus.path))


def decide(corpus: Corpus, entry_id: str, decision: str, **keys: object) -> None:
    verdict = {"entry_id": entry_id, "entry_hash": corpus.hashes[entry_id], "decision": decision, "by": "Ana <b>"}
    append(corpus, [Verdict.model_validate({**verdict, **keys})], now=lambda: "2026-01-02T10:00:00+00:00")


def book(corpus: Corpus) -> str:
    return render_book(corpus, state(corpus))


def plain(html: str) -> str:
    """Without tags, white space folded."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_factors_in_their_order_with_overview_and_numbered_citations(corpus: Corpus):
    html = book(corpus)
    chapters = re.findall(r'<section class="factor".*?</section>', html, flags=re.DOTALL)
    assert [plain(re.findall(r"<h2.*?</h2>", item)[0]) for item in chapters] == [
        "sunburns in the past", "it itches", "older age",
    ]  # fmt: skip
    sun = plain(chapters[0])
    assert "More likely with it: basal cell carcinoma (2 sources)." in sun
    assert "The literature at hand does not say: nevus." in sun
    assert "Says doc1. [ 1 ] Says doc2. [ 2 ]" in sun
    assert "sunburn and BCC. [ 1 , 2 ]" in sun
    # A document is numbered once.
    assert "Says doc2. [ 2 ]" in plain(chapters[1])
    assert re.findall(r'<li id="(s\d+)">', html) == ["s1", "s2", "s3"]
    assert set(re.findall(r'href="#(s\d+)"', html)) == {"s1", "s2", "s3"}


def test_sources_have_address_date_licence_and_the_quoted_words(corpus: Corpus):
    listed = book(corpus).partition('<ol class="sources">')[2]
    text = plain(listed)
    assert '<a href="https://example.org/doc1"' in listed
    assert "Title of doc1 . pdq, 2025-05; licence: public domain." in text
    assert "Title of doc2. pdq, no date;" in text
    assert "licence: not stated." in text
    assert "Itching was reported (Skin cancer &gt; Risk factors)" in text
    assert "javascript:" not in listed


def test_the_coverage_table_says_direction_sources_and_status_in_words(corpus: Corpus):
    decide(corpus, "itch:BCC", "accepted")
    decide(corpus, "age:NEV", "rejected")
    table = re.findall(r'<table class="coverage">.*?</table>', book(corpus), flags=re.DOTALL)[0]
    assert table.count('scope="col"') == 3
    rows = [plain(row) for row in re.findall(r"<tr>.*?</tr>", table, flags=re.DOTALL)]
    assert rows == [
        "Factor basal cell carcinoma BCC nevus NEV",
        "sunburns in the past ▲ raises 2 sources, moderate … not vetted \N{EN DASH} no evidence … not vetted",
        "it itches ▲ raises 1 source, weak ✓ accepted not written",
        "older age not written ▼ lowers 1 source, moderate ✗ rejected",
    ]


def test_rejected_entries_are_named_and_not_told_and_edited_ones_as_edited(corpus: Corpus):
    decide(corpus, "age:NEV", "rejected")
    edited = ENTRIES[2].model_copy(update={"summary": "By a physician."})
    decide(corpus, "itch:BCC", "edited", edited=edited)
    text = plain(book(corpus))
    assert "1 entry was rejected and left out here." in text
    assert "Says doc3." not in text
    assert "By a physician." in text
    assert "✎ accepted, edited by Ana &lt;b&gt; on 2026-01-02" in text
    assert "1 accepted (1 of them edited), 1 rejected, 2 not vetted. Last decision on 2026-01-02." in text
    assert "2 entries were written by a program and checked by nobody" in text


def test_the_page_is_whole_runs_nothing_and_fetches_nothing(corpus: Corpus):
    path = write_book(corpus, state(corpus))
    html = path.read_text()
    page = Page(html)
    assert path == corpus.path / "book.html"
    assert page.fetched == []
    assert not page.tags & {"script", "link", "iframe", "object", "img"}
    assert "@import" not in html
    assert "url(" not in html
    assert (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        in html
    )
    assert len(re.findall(r"<h1>", html)) == 1
    # The same state gives the same book.
    assert render_book(corpus, state(corpus)) == html


def test_a_corpus_without_entries_is_a_book_too(tmp_path: Path):
    html = book(make_corpus(tmp_path, entries=(), chunks=()))
    Page(html)
    assert "No entry cites anything." in html
