"""Entries held against the passages they cite: every quote must stand there, every statement follow.

What fails is dropped and listed; an entry that loses all its statements says `no_evidence`. Whoever wrote the entry, a
rule or a language model, this decides what is kept. To add a scorer of support (embeddings, entailment): a class with
`threshold` and `score`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.entries import Entry, Statement
from prima_ray.knowledge.extractive import NO_EVIDENCE

Reason = Literal["unknown_chunk", "quote_not_found", "unsupported"]

_QUOTE_MARKS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032`\u00b4\u02bc", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
)
_DASHES = re.compile("[\u2010-\u2015\u2212]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
_WORD = re.compile(r"[^\W_]+(?:['.,-][^\W_]+)*")
_NUMBER = re.compile(r"\d")
_NEGATORS = frozenset(
    ("no", "not", "never", "nor", "neither", "none", "cannot", "without", "unknown", "unclear", "lack", "lacks")
)
# fmt: off
_GRAMMAR = frozenset((
    "a", "an", "the", "and", "or", "of", "in", "on", "at", "to", "for", "with", "by", "as", "is", "are", "was",
    "were", "be", "been", "being", "has", "have", "had", "it", "its", "this", "that", "these", "those", "they",
    "their", "them", "from", "than", "which", "who", "whose", "such", "also", "may", "can", "will", "would", "do",
    "does", "did", "there", "about", "into",
))
# fmt: on


class Support(Protocol):
    """How far quotes support a statement. A statement is kept from ``threshold`` on."""

    @property
    def threshold(self) -> float: ...

    def score(self, statement: str, evidence: Sequence[str]) -> float:
        """Between 0 and 1; ``evidence`` are the quotes, and the headings above them."""
        ...


@dataclass(frozen=True, slots=True)
class LexicalSupport:
    """The part of the statement's words that the evidence holds; needs no model.

    A statement with a number that the evidence lacks, or that denies what the evidence does not (or the other way
    round), scores 0: "does not lower" and "lowers" share their words.
    """

    threshold: float = 0.8

    def score(self, statement: str, evidence: Sequence[str]) -> float:
        said, shown = _words(statement), _words(" ".join(evidence))
        if {word for word in said if _NUMBER.search(word)} - set(shown):
            return 0.0
        if _denies(said) != _denies(_words(evidence[0])) and _denies(said) != _denies(shown):
            return 0.0
        content = [word for word in said if word not in _GRAMMAR]
        if not content:
            return 0.0
        held = set(shown)
        return sum(word in held for word in content) / len(content)


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


def ground(entry: Entry, chunks: Mapping[str, Chunk], support: Support | None = None) -> Grounded:
    """Keep of an entry what its quotes carry.

    Args:
        chunks: by id: those that may be cited, and no others.
        support: `LexicalSupport` where there is none.
    """
    scorer: Support = support or LexicalSupport()
    kept: list[Statement] = []
    dropped: list[Dropped] = []
    for statement in entry.statements:
        failure = _failure(statement, chunks, scorer)
        if failure is None:
            kept.append(statement)
        else:
            reason, detail = failure
            dropped.append(Dropped(entry.factor, entry.diagnosis, statement.text, reason, detail))
    if not dropped:
        return Grounded(entry, ())
    if kept:
        return Grounded(entry.model_copy(update={"statements": tuple(kept)}), tuple(dropped))
    silent = Entry(
        factor=entry.factor, diagnosis=entry.diagnosis, direction="no_evidence", strength=None, summary=NO_EVIDENCE
    )
    return Grounded(silent, tuple(dropped))


def _failure(statement: Statement, chunks: Mapping[str, Chunk], support: Support) -> tuple[Reason, str] | None:
    evidence = [item.quote for item in statement.quotes]
    for quote in statement.quotes:
        chunk = chunks.get(quote.chunk_id)
        if chunk is None:
            return "unknown_chunk", f"there is no chunk {quote.chunk_id}"
        if not quote_stands(quote.quote, chunk.text):
            return "quote_not_found", f"chunk {quote.chunk_id} does not say: {quote.quote}"
        evidence += [text for text in (*chunk.heading, chunk.title) if text not in evidence]
    score = support.score(statement.text, evidence)
    if score < support.threshold:
        return "unsupported", f"support {score:.2f}, below {support.threshold:g}"
    return None


def quote_stands(quote: str, text: str) -> bool:
    """True where the quote's words stand in the text, in a row and whole: white space, case and typography apart."""
    wanted = normalise(quote)
    if not wanted:
        return False
    left = r"(?<!\w)" if wanted[0].isalnum() else ""
    right = r"(?!\w)" if wanted[-1].isalnum() else ""
    found = normalise(text)
    if re.search(left + re.escape(wanted) + right, found):
        return True
    # Items that run into each other ("over timebeing pale") are quoted one by one; a long piece is no accident.
    return len(wanted) >= 20 and wanted in found


def normalise(text: str) -> str:
    """One way of writing: NFKC, plain quotation marks and dashes, single blanks, lower case."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).translate(_QUOTE_MARKS))
    return " ".join(_DASHES.sub("-", text).casefold().split())


def _words(text: str) -> list[str]:
    return _WORD.findall(normalise(text))


def _denies(words: Sequence[str]) -> bool:
    return any(word in _NEGATORS or word.endswith("n't") for word in words)
