"""The vocabulary compiled, and a passage read with it: which factors and diagnoses each sentence mentions.

What a passage speaks of, where a sentence does not say it, is the innermost heading that names a diagnosis, else the
title. Wordings that cover several diagnoses count for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prima_ray.data.description import DataSetConfig
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.entries import Pair
from prima_ray.knowledge.factors import FactorConfig, VocabularyConfig
from prima_ray.knowledge.mentions import Span, Terms, compile_terms, overlaps
from prima_ray.knowledge.sentences import Sentence, split_passage
from prima_ray.knowledge.wording import heads_course

Mentions = Mapping[str, tuple[Span, ...]]
"""Where a text mentions what, by key or class; what it does not mention is absent."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor and its terms."""

    config: FactorConfig
    terms: Terms
    opposites: Terms


@dataclass(frozen=True, slots=True)
class _Diagnosis:
    terms: Terms
    not_under: Terms


@dataclass(frozen=True, slots=True)
class _Umbrella:
    terms: Terms
    means: tuple[str, ...]
    alone: bool


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk as the vocabulary sees it."""

    chunk: Chunk
    sentences: tuple[Sentence, ...]
    about: frozenset[str]
    """The diagnoses that the headings or the title give to sentences which name none."""
    topics: frozenset[str]
    """The factors that the innermost heading names."""
    barred: frozenset[str]
    """Diagnoses whose terms mean another organ's disease here."""
    widened: frozenset[str]
    """Diagnoses for which the wide umbrellas stand here."""
    course: bool
    """A section on treatment, stage or outlook."""


class Vocabulary:
    """Compiled terms."""

    def __init__(self, config: VocabularyConfig, data_set: DataSetConfig) -> None:
        self.config = config
        self.phrases = {item.name: item.phrase for item in data_set.classes}
        self.factors = {
            item.key: Factor(item, compile_terms(item.terms, item.but_not), compile_terms(item.opposites))
            for item in config.factors
        }
        extra = {item.name: item for item in config.diagnoses}
        self._diagnoses = {}
        for item in data_set.classes:
            more = extra.get(item.name)
            terms = compile_terms(
                (item.phrase, *item.synonyms, *(more.terms if more else ())), more.but_not if more else ()
            )
            self._diagnoses[item.name] = _Diagnosis(terms, compile_terms(more.not_under if more else ()))
        self._umbrellas = [
            _Umbrella(compile_terms(item.terms, item.but_not), item.means, item.alone) for item in config.umbrellas
        ]
        self._unspecific = compile_terms(config.unspecific)
        self._passages: dict[str, Passage] = {}
        self._mentions: dict[str, tuple[Mentions, Mentions]] = {}

    @property
    def pairs(self) -> list[Pair]:
        """All of them, factor by factor."""
        return [(factor, diagnosis) for factor in self.factors for diagnosis in self.phrases]

    def read(self, chunk: Chunk) -> Passage:
        """Split a chunk and look up what it is about; remembered, since many pairs are asked of the same chunks."""
        found = self._passages.get(chunk.chunk_id)
        if found is None or found.chunk != chunk:
            found = self._passages[chunk.chunk_id] = self._read(chunk)
        return found

    def _read(self, chunk: Chunk) -> Passage:
        above = (*reversed(chunk.heading), chunk.title)
        barred = frozenset(
            name for name, item in self._diagnoses.items() if any(item.not_under.find(text) for text in above)
        )
        named = [frozenset(self._named(text)) - barred for text in above]
        somewhere = frozenset().union(*named)
        in_text = frozenset(self._named(chunk.text))
        widened: set[str] = set()
        for umbrella in self._umbrellas:
            means = frozenset(umbrella.means)
            if not umbrella.alone:
                widened |= means if means <= in_text else means & somewhere
        return Passage(
            chunk=chunk,
            sentences=split_passage(chunk),
            about=next((names for names in named if names), frozenset()),
            topics=frozenset(self.factors_in(above[0])),
            barred=barred,
            widened=frozenset(widened) - barred,
            course=any(heads_course(text) for text in chunk.heading),
        )

    def _named(self, text: str) -> dict[str, list[Span]]:
        found = {name: list(spans) for name, item in self._diagnoses.items() if (spans := item.terms.find(text))}
        for umbrella in self._umbrellas:
            if umbrella.alone:
                for span in umbrella.terms.find(text):
                    for name in umbrella.means:
                        found.setdefault(name, []).append(span)
        return found

    def factors_in(self, text: str) -> Mentions:
        """The factors that a text mentions."""
        return self._both(text)[0]

    def diagnoses_in(self, text: str, passage: Passage) -> Mentions:
        """The diagnoses that a text names, by terms of their own or by an umbrella's that needs no support."""
        return {name: spans for name, spans in self._both(text)[1].items() if name not in passage.barred}

    def widely_in(self, text: str, passage: Passage) -> Mentions:
        """The diagnoses for which a wide umbrella in the text stands in this passage."""
        found: dict[str, tuple[Span, ...]] = {}
        for umbrella in self._umbrellas:
            if not umbrella.alone and (spans := umbrella.terms.find(text)):
                for name in umbrella.means:
                    if name in passage.widened:
                        found[name] = found.get(name, ()) + spans
        return found

    def is_unspecific(self, text: str, span: Span) -> bool:
        """True where the words in ``span`` name a disease without saying which."""
        return any(
            start - span[0] <= 20 for start, _ in self._unspecific.find(text) if overlaps((start, start + 1), [span])
        )

    def _both(self, text: str) -> tuple[Mentions, Mentions]:
        found = self._mentions.get(text)
        if found is None:
            factors = {key: spans for key, item in self.factors.items() if (spans := item.terms.find(text))}
            diagnoses = {name: tuple(spans) for name, spans in self._named(text).items()}
            found = self._mentions[text] = (factors, diagnoses)
        return found
