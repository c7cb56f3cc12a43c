"""Entries held against the passages they cite: every quote must stand there, every statement follow.

What fails is dropped and listed. The summary may have rested on it, so it is put together anew from what stands, and
says how much was dropped; an entry that loses all its statements says `no_evidence`. Whoever wrote the entry, a rule or
a language model, this decides what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.entries import Entry, Quote, Statement
from prima_ray.knowledge.extractive import EFFECT_IN_WORDS, NO_EVIDENCE, counted
from prima_ray.knowledge.passages import find_quote, find_words
from prima_ray.knowledge.support import LexicalSupport, Support

Reason = Literal["unknown_chunk", "quote_not_found", "unsupported"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A statement that was not kept."""

    factor: str
    diagnosis: str
    statement: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Grounded:
    """An entry with the statements that stand."""

    entry: Entry
    dropped: tuple[Dropped, ...]


class _Failed(Exception):  # noqa: N818 - an answer
    """Why a statement is not kept."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def ground(entry: Entry, chunks: Mapping[str, Chunk], support: Support | None = None) -> Grounded:
    """Keep of an entry what its quotes carry; quotes get the letters of their passages.

    Args:
        chunks: by id: those that may be cited, and no others.
        support: `LexicalSupport` where there is none.
    """
    scorer: Support = support or LexicalSupport()
    kept: list[Statement] = []
    dropped: list[Dropped] = []
    for statement in entry.statements:
        try:
            kept.append(_standing(statement, chunks, scorer))
        except _Failed as failure:
            dropped.append(Dropped(entry.factor, entry.diagnosis, statement.text, failure.reason, failure.detail))
    if dropped and not kept:
        silent = Entry(
            factor=entry.factor, diagnosis=entry.diagnosis, direction="no_evidence", strength=None, summary=NO_EVIDENCE
        )
        return Grounded(silent, tuple(dropped))
    if tuple(kept) == entry.statements:
        return Grounded(entry, ())
    changed: dict[str, object] = {"statements": tuple(kept)}
    if dropped:
        changed["summary"] = _summary(entry, kept, chunks, num_dropped=len(dropped))
    return Grounded(entry.model_copy(update=changed), tuple(dropped))


def _summary(entry: Entry, kept: Sequence[Statement], chunks: Mapping[str, Chunk], *, num_dropped: int) -> str:
    said = EFFECT_IN_WORDS[entry.direction]
    sources = {chunks[quote.chunk_id].doc_id for statement in kept for quote in statement.quotes}
    return (
        f"{said[0].upper()}{said[1:]} ({entry.strength}; {counted(len(sources), 'source')}; "
        f"{counted(num_dropped, 'statement')} without support left out). "
        f"“{kept[0].text}” [{kept[0].quotes[0].chunk_id}]"
    )


def _standing(statement: Statement, chunks: Mapping[str, Chunk], support: Support) -> Statement:
    quotes: list[Quote] = []
    headings: dict[str, None] = {}
    for quote in statement.quotes:
        chunk = chunks.get(quote.chunk_id)
        if chunk is None:
            raise _Failed("unknown_chunk", f"there is no chunk {quote.chunk_id}")
        quotes.append(_in_its_letters(quote, chunk))
        headings |= dict.fromkeys((*chunk.heading, chunk.title))
    evidence = [item.quote for item in quotes]
    score = support.score(statement.text, [*evidence, *(text for text in headings if text not in evidence)])
    if score < support.threshold:
        raise _Failed("unsupported", f"support {score:.2f}, below {support.threshold:g}")
    return statement.model_copy(update={"quotes": tuple(quotes)})


def _in_its_letters(quote: Quote, chunk: Chunk) -> Quote:
    if find_quote(chunk.text, quote.quote):
        return quote
    span = find_words(chunk.text, quote.quote)
    if span is None:
        raise _Failed("quote_not_found", f"chunk {quote.chunk_id} does not say: {quote.quote}")
    return quote.model_copy(update={"quote": chunk.text[span[0] : span[1]]})
