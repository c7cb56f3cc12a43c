"""The corpus as a book: a page to be read and printed, with every sentence's source.

The overview of a factor is put together from its entries. A model's words on a factor as a whole would be a text that
nobody vets and that stays as it is when an entry under it is rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prima_ray.base import write_atomic
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.corpus import Corpus, cited_documents, without_references
from prima_ray.knowledge.entries import Entry, Statement
from prima_ray.knowledge.pages import Name, render
from prima_ray.knowledge.vetting import Decision, Vetted, Vetting

BOOK = "book.html"
_SAYS = {
    "raises": "More likely with it",
    "lowers": "Less likely with it",
    "none": "Looked into without a clear relation",
    "no_evidence": "The literature at hand does not say",
}


@dataclass
class Source:
    """A document of the list at the end."""

    chunk: Chunk
    """The first passage of it that is cited: title, address, date, licence."""
    quotes: list[tuple[str, str]] = field(default_factory=list)
    """Heading path and words."""


class Sources:
    """Numbers documents in the order in which they are cited."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._numbers: dict[str, int] = {}
        self.listed: list[Source] = []

    def cite(self, statement: Statement) -> list[int]:
        """The numbers of the documents that a statement rests on."""
        found: dict[int, None] = {}
        for quote in statement.quotes:
            chunk = self._corpus.chunks[quote.chunk_id]
            number = self._numbers.setdefault(chunk.doc_id, len(self._numbers) + 1)
            if number > len(self.listed):
                self.listed.append(Source(chunk))
            words = (" > ".join(chunk.heading), quote.quote)
            if words not in self.listed[number - 1].quotes:
                self.listed[number - 1].quotes.append(words)
            found[number] = None
        return sorted(found)


@dataclass(frozen=True)
class Paragraph:
    """A diagnosis under its factor."""

    diagnosis: str
    entry: Entry
    summary: str
    statements: list[dict[str, Any]]
    citations: list[int]
    num_sources: int
    decision: Decision | None
    reopened: str | None


def write_book(corpus: Corpus, vetting: Vetting) -> Path:
    """Write the corpus's book as it stands now; returns its path."""
    path = corpus.path / BOOK
    write_atomic(path, render_book(corpus, vetting))
    return path


def render_book(corpus: Corpus, vetting: Vetting, *, nonce: str | None = None) -> str:
    """The page.

    Args:
        nonce: of the server's content security policy; without it the page carries one of its own.
    """
    items = list(vetting.entries.values())
    diagnoses = _order(corpus.diagnoses, (item.entry.diagnosis for item in items))
    factors = _order((item.key for item in corpus.factors), (item.entry.factor for item in items))
    by_pair = {(item.entry.factor, item.entry.diagnosis): item for item in items}
    sources = Sources(corpus)
    chapters = []
    for factor in factors:
        mine = [by_pair.get((factor, name)) for name in diagnoses]
        if not any(mine):
            continue
        written = [item for item in mine if item and item.entry.status != "rejected"]
        chapters.append(
            {
                "phrase": corpus.factor_phrase(factor),
                "cells": [
                    item and {"entry": item.entry, "num_sources": _num_sources(corpus, item.entry)} for item in mine
                ],
                "overview": _overview(corpus, [item.entry for item in written], num_rejected=_num(mine, "rejected")),
                "paragraphs": [_paragraph(corpus, item, sources) for item in written],
            }
        )
    counts = Counter(item.entry.status for item in items)
    last = max((item.history[-1].at for item in items if item.history), default=None)
    return render(
        "book.html.j2",
        **({"nonce": nonce} if nonce else {}),
        heading="What the literature says of risk factors",
        as_of=f"Last decision on {last[:10]}." if last else "",
        counts={
            **{status: counts[status] for status in ("proposed", "rejected", "edited")},
            "accepted": counts["accepted"] + counts["edited"],
            "entries": len(items),
            "factors": len(chapters),
            "diagnoses": len(diagnoses),
            "sources": len(sources.listed),
        },
        diagnoses=[Name(name, corpus.diagnosis_phrase(name)) for name in diagnoses],
        factors=chapters,
        sources=sources.listed,
    )


def _order(first: Iterable[str], then: Iterable[str]) -> list[str]:
    """Every name once: as the corpus lists them, then as they occur."""
    return list(dict.fromkeys([*first, *then]))


def _num(items: Iterable[Vetted | None], status: str) -> int:
    return sum(item is not None and item.entry.status == status for item in items)


def _num_sources(corpus: Corpus, entry: Entry) -> int:
    return len(cited_documents(entry, corpus.chunks))


def _overview(corpus: Corpus, entries: list[Entry], *, num_rejected: int) -> list[str]:
    """A sentence a direction."""
    found = []
    for direction, words in _SAYS.items():
        names = []
        for entry in entries:
            if entry.direction == direction:
                number = _num_sources(corpus, entry)
                count = f" ({number} source{'' if number == 1 else 's'})" if number else ""
                names.append(f"{corpus.diagnosis_phrase(entry.diagnosis)}{count}")
        if names:
            found.append(f"{words}: {', '.join(names)}.")
    if num_rejected:
        found.append(
            f"{num_rejected} {'entry was' if num_rejected == 1 else 'entries were'} rejected and left out here."
        )
    return found


def _paragraph(corpus: Corpus, item: Vetted, sources: Sources) -> Paragraph:
    citations = [sources.cite(part) for part in item.entry.statements]
    statements = [
        {"text": part.text, "citations": cited} for part, cited in zip(item.entry.statements, citations, strict=True)
    ]
    return Paragraph(
        diagnosis=corpus.diagnosis_phrase(item.entry.diagnosis),
        entry=item.entry,
        summary=without_references(item.entry.summary, corpus.chunks),
        statements=statements,
        citations=sorted({number for cited in citations for number in cited}),
        num_sources=_num_sources(corpus, item.entry),
        decision=item.decision,
        reopened=item.reopened,
    )
