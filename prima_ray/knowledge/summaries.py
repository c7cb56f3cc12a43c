"""Entries of one factor -> one summary of it and a paragraph for each diagnosis, in the words of the passages cited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prima_ray.base import StrictConfig
from prima_ray.knowledge.entries import Direction, Entry, Statement
from prima_ray.knowledge.extractive import NO_EVIDENCE, counted

_HEADS: tuple[tuple[Direction, str], ...] = (
    ("raises", "raises the risk of"),
    ("lowers", "lowers the risk of"),
    ("none", "has no clear relation to"),
    ("no_evidence", "no evidence found for"),
)


class FactorSummary(StrictConfig):
    """A factor over all diagnoses."""

    factor: str
    summary: str
    paragraphs: dict[str, str]
    """By diagnosis: quoted sentences, each with its chunk in brackets."""


def summarise(entries: Sequence[Entry], *, phrase: str, phrases: Mapping[str, str]) -> FactorSummary:
    """One summary of the entries of a factor.

    Args:
        entries: of the same factor, one a diagnosis.
        phrase: the factor in words.
        phrases: the diagnoses in words.
    """
    clauses = []
    for direction, head in _HEADS:
        named = [phrases[entry.diagnosis] + _strength(entry) for entry in entries if entry.direction == direction]
        if named:
            clauses.append(f"{head} {_listed(named)}")
    return FactorSummary(
        factor=entries[0].factor,
        summary=f"{phrase[:1].upper()}{phrase[1:]}: {'; '.join(clauses)}.",
        paragraphs={entry.diagnosis: _paragraph(entry) for entry in entries},
    )


def _strength(entry: Entry) -> str:
    if entry.strength is None:
        return ""
    return f" ({entry.strength}, {counted(len(entry.statements), 'statement')})"


def _paragraph(entry: Entry) -> str:
    if not entry.statements:
        return NO_EVIDENCE
    return " ".join(map(_cited, entry.statements))


def _cited(statement: Statement) -> str:
    chunks = dict.fromkeys(quote.chunk_id for quote in statement.quotes)
    return f"“{statement.text}” [{', '.join(chunks)}]"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
