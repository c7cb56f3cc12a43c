"""A sentence of a passage -> what it claims of one factor and one diagnosis, if anything.

Four ways in which a sentence can speak of a diagnosis, from the best to the weakest:

- `named`: the sentence names both.
- `list`: it is an item that names the factor, and the line which introduces the list names the diagnosis and says what
  the items are to it.
- `heading`: it names the factor, no diagnosis, and means the one that the heading or title names; or the heading names
  the factor alone and the sentence the diagnosis.
- `umbrella`: by a wide wording that the passage narrows to the diagnosis.

Where a clause says what the risk is of, the diagnosis must stand there: "patients with A are at risk of B" is a claim
on B. Text is never obeyed, and a sentence that tells the reader what to do claims nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.mentions import Span, overlaps
from prima_ray.knowledge.sentences import Lead, Sentence
from prima_ray.knowledge.vocabulary import Factor, Passage, Vocabulary
from prima_ray.knowledge.wording import (
    Certainty,
    Effect,
    Wording,
    compared_side,
    is_advice,
    is_excluded,
    is_opinion,
    is_single_study,
    is_treated,
    names_patients,
    outcome_spans,
    read_certainty,
    read_wording,
    speaks_of_course,
    split_clauses,
)

Link = Literal["named", "list", "heading", "umbrella"]

_CERTAINTY: dict[Certainty, float] = {"strong": 1.5, "plain": 1.0, "hedged": 0.5}
_LINK: dict[Link, float] = {"named": 1.0, "list": 1.0, "heading": 0.75, "umbrella": 0.4}
_SINGLE_STUDY = 0.5
_AGAINST_HEADING = 0.5
_FLIPPED: dict[Effect, Effect] = {"raises": "lowers", "lowers": "raises", "none": "none"}
_JOINED = re.compile(r"^\W*(?:\w+\W+){0,2}?(?:or|and)\W+(?:\w+\W+){0,2}?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Claim:
    """What one sentence says of a pair."""

    chunk: Chunk
    effect: Effect
    weight: float
    link: Link
    quotes: tuple[str, ...]
    """Pieces of the chunk, letter for letter."""
    num_topics: int
    """How many factors the sentence names: the fewer, the more it is about this one."""

    @property
    def text(self) -> str:
        return " ".join(self.quotes)


def find_claims(chunk: Chunk, factor: str, diagnosis: str, vocabulary: Vocabulary) -> list[Claim]:
    """What the sentences of a chunk claim of a pair, in their order."""
    passage = vocabulary.read(chunk)
    if passage.course or diagnosis in passage.barred:
        return []
    reader = _Reader(passage, vocabulary.factors[factor], diagnosis, vocabulary)
    return [claim for sentence in passage.sentences if (claim := reader.read(sentence))]


def _between(clause: str, one: Span, other: Span) -> str:
    """What stands between two places that share no character."""
    first, last = sorted((one, other))
    return clause[first[1] : last[0]]


@dataclass(frozen=True, slots=True)
class _Subject:
    """The diagnosis in a clause: how it is meant, and whether the clause says that the risk is of it."""

    link: Link
    is_outcome: bool


@dataclass(frozen=True, slots=True)
class _Reader:
    passage: Passage
    factor: Factor
    diagnosis: str
    vocabulary: Vocabulary

    @property
    def role(self) -> str:
        return self.factor.config.role

    def read(self, sentence: Sentence) -> Claim | None:
        mentioned = self.vocabulary.factors_in(sentence.text)
        if self.factor.config.key not in mentioned:
            return self._by_topic(sentence, bool(mentioned))
        if is_opinion(sentence.text):
            return None
        if not is_advice(sentence.text):
            claim = self._own_words(sentence.text)
            if claim or not sentence.leads or self._speaks_for_itself(sentence.text):
                return claim
        return self._by_lead(sentence) if sentence.leads else None

    # ------------------------------------------------------------------------------------------- the sentence alone

    def _own_words(self, text: str) -> Claim | None:
        for clause in self._clauses(text):
            subject = self._subject(clause, text)
            wording = self._wording(clause) if subject else None
            if subject and wording and self._is_told_of(clause, subject, wording):
                return self._claim(wording, subject.link, (text,))
        return None

    def _clauses(self, text: str) -> Iterator[str]:
        """The clauses to read: with both named; then with the diagnosis, unless it has a factor of its own; then with
        the factor."""
        clauses = split_clauses(text)
        factor = [bool(self.factor.terms.find(clause)) for clause in clauses]
        diagnosis = [self.diagnosis in self.vocabulary.diagnoses_in(clause, self.passage) for clause in clauses]
        both = [clause for clause, has, names in zip(clauses, factor, diagnosis, strict=True) if has and names]
        if both:
            yield from both
            return
        for clause, names in zip(clauses, diagnosis, strict=True):
            if names and not self.vocabulary.factors_in(clause):
                yield clause
        yield from (clause for clause, has in zip(clauses, factor, strict=True) if has)

    def _subject(self, clause: str, text: str) -> _Subject | None:
        """How the clause means the diagnosis; None where it speaks of something else."""
        named = self.vocabulary.diagnoses_in(clause, self.passage)
        wide = self.vocabulary.widely_in(clause, self.passage).get(self.diagnosis, ())
        own = [span for span in named.get(self.diagnosis, ()) if self._may_be_subject(clause, span)]
        everybody = [span for spans in named.values() for span in spans if self._may_be_subject(clause, span)]
        outcomes = outcome_spans(clause)
        if any(overlaps(span, outcomes) for span in (*everybody, *wide)):
            return self._as_outcome(clause, outcomes, own, wide)
        elsewhere = self.role == "risk" and outcomes and not self._is_general(clause, outcomes)
        if elsewhere or speaks_of_course(self._without_factor(clause)):
            return None
        if own or wide:
            return _Subject("named" if own else "umbrella", False)
        if not self.vocabulary.diagnoses_in(text, self.passage) and self.diagnosis in self.passage.about:
            return _Subject("heading", bool(outcomes))
        return None

    def _as_outcome(
        self, clause: str, outcomes: tuple[Span, ...], own: Sequence[Span], wide: Sequence[Span]
    ) -> _Subject | None:
        """A clause that says what the risk is of: the diagnosis, or another."""
        if any(speaks_of_course(clause[slice(*span)]) for span in outcomes):
            return None
        if any(overlaps(span, outcomes) for span in own):
            return _Subject("named", True)
        return _Subject("umbrella", True) if any(overlaps(span, outcomes) for span in wide) else None

    def _may_be_subject(self, clause: str, span: Span) -> bool:
        return not overlaps(span, self.factor.terms.find(clause)) and not names_patients(clause, span[0])

    def _is_general(self, clause: str, outcomes: tuple[Span, ...]) -> bool:
        return any(self.vocabulary.is_unspecific(clause, span) for span in outcomes)

    def _without_factor(self, clause: str) -> str:
        for start, end in self.factor.terms.find(clause):
            clause = clause[:start] + " " * (end - start) + clause[end:]
        return clause

    def _wording(self, clause: str) -> Wording | None:
        spans = self.factor.terms.find(clause)
        if self._beside_opposite(clause, spans):
            # "Round or flat" is a finding on how it looks; "men and women" is everybody.
            return Wording("none", read_certainty(clause), spans[0]) if self.role != "risk" else None
        if spans and all(is_excluded(clause, start) or is_treated(clause, start) for start, _ in spans):
            return None
        if spans and self._beside_diagnosis(clause, spans):
            return None
        wording = read_wording(self._without_factor(clause), self.role)
        side = compared_side(clause)
        if wording and side and spans and all(overlaps(span, [side]) for span in spans):
            return Wording(_FLIPPED[wording.effect], wording.certainty, wording.cue)
        return wording

    def _is_told_of(self, clause: str, subject: _Subject, wording: Wording) -> bool:
        """Of what a heading alone names, something must be told: "the use of ... was related to the factor" tells
        something of the factor, "the factor is a cause" and "it is caused by the factor" of the disease."""
        if self.role != "risk" or subject.link != "heading" or subject.is_outcome:
            return True
        before = any(start <= wording.cue[0] for start, _ in self.factor.terms.find(clause))
        return before or self.vocabulary.is_unspecific(clause, (0, wording.cue[0]))

    def _beside_opposite(self, clause: str, spans: tuple[Span, ...]) -> bool:
        for start, end in self.factor.opposites.find(clause):
            for own_start, own_end in spans:
                if _JOINED.match(_between(clause, (start, end), (own_start, own_end))):
                    return True
        return False

    def _beside_diagnosis(self, clause: str, spans: Sequence[Span]) -> bool:
        """The factor is what befalls people, as the diagnosis is: "prevents the factor and the diagnosis" says nothing
        of what one does to the other."""
        diagnosis = self.vocabulary.diagnoses_in(clause, self.passage).get(self.diagnosis, ())
        outcomes = outcome_spans(clause)
        return self.role == "risk" and all(
            overlaps(span, outcomes) and any(_JOINED.match(_between(clause, span, other)) for other in diagnosis)
            for span in spans
        )

    def _speaks_for_itself(self, text: str) -> bool:
        """An item that is a sentence with a finding of its own, on whatever disease."""
        named = [span for spans in self.vocabulary.diagnoses_in(text, self.passage).values() for span in spans]
        outcomes = outcome_spans(text)
        return any(overlaps(span, outcomes) for span in named) and read_wording(text, self.role) is not None

    # ------------------------------------------------------------------------------------- with what stands around it

    def _by_lead(self, sentence: Sentence) -> Claim | None:
        spans = self.factor.terms.find(sentence.text)
        if all(is_excluded(sentence.text, start) for start, _ in spans):
            return None
        for lead in reversed(sentence.leads):
            for pieces in self._lead_pieces(lead, sentence.leads):
                text = " ".join(pieces)
                wording = read_wording(lead.text, self.role) or read_wording(text, self.role)
                if wording is None or (self.role == "risk" and is_advice(text)):
                    continue
                subject = self._subject(text, text)
                if subject is None:
                    return None
                if self._beside_opposite(sentence.text, spans):
                    wording = Wording("none", wording.certainty, wording.cue)
                link: Link = "list" if subject.link == "named" else subject.link
                return self._claim(wording, link, (*pieces, sentence.text))
        return None

    def _lead_pieces(self, lead: Lead, leads: Sequence[Lead]) -> Iterator[tuple[str, ...]]:
        named = self.vocabulary.diagnoses_in(lead.text, self.passage)
        before = lead.before
        if before and not named and before not in [other.text for other in leads]:
            # "These include ...": the sentence before may say what of.
            yield (before, lead.text)
        yield (lead.text,)

    def _by_topic(self, sentence: Sentence, names_another: bool) -> Claim | None:
        """A sentence on a diagnosis under a heading that names the factor alone."""
        if (
            names_another
            or self.role != "risk"
            or self.factor.config.key not in self.passage.topics
            or is_advice(sentence.text)
            or is_opinion(sentence.text)
        ):
            return None
        for clause in split_clauses(sentence.text):
            if self.diagnosis not in self.vocabulary.diagnoses_in(clause, self.passage):
                continue
            subject = self._subject(clause, sentence.text)
            wording = read_wording(clause, self.role) if subject and subject.is_outcome else None
            if wording:
                return self._claim(wording, "heading", (sentence.text,))
        return None

    def _claim(self, wording: Wording, link: Link, quotes: tuple[str, ...]) -> Claim:
        text = " ".join(quotes)
        weight = _CERTAINTY[wording.certainty] * _LINK[link]
        if is_single_study(text):
            weight *= _SINGLE_STUDY
        if wording.effect != "none" and self._heading_denies():
            weight *= _AGAINST_HEADING
        return Claim(
            chunk=self.passage.chunk,
            effect=wording.effect,
            weight=weight,
            link=link,
            quotes=quotes,
            num_topics=len(self.vocabulary.factors_in(quotes[-1])),
        )

    def _heading_denies(self) -> bool:
        """A section that says in its heading that there is no evidence: what it cites all the same weighs less."""
        found = [read_wording(heading) for heading in self.passage.chunk.heading]
        return any(item is not None and item.effect == "none" for item in found)
