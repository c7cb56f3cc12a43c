"""Passages -> entries without a language model: sentences are selected, weighed, ranked and quoted.

For each factor and diagnosis: retrieve, read what the sentences claim (`claims.py`), let the sources vote, quote the
best sentences of the side that wins. The rules:

- A **source** is a document. A sentence that stands word for word in several documents (a summary in two versions, a
  page that repeats it) counts for the first of them alone.
- A source's **vote** for a direction is the weight of its best claim: 1 for a plain sentence that names both, more for
  an emphatic one, less for a hedge, a single study, a heading's context.
- The direction with the most votes wins if it has `min_share` of them. Otherwise the evidence is divided: `none`.
- Votes of less than `min_weight` in all are `no_evidence`.
- The statements are the best claim of each source in turn, then the second best ones, and so on, so that an entry shows
  as many sources as it has.
- **Strength**: strong from 3 votes, two sources and three quarters of all votes; moderate from 1.5 votes and two
  sources; else weak. Divided evidence is weak.

The result depends on the passages and the config alone.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from prima_ray.knowledge.claims import Claim, find_claims
from prima_ray.knowledge.entries import Direction, Entry, Pair, Quote, Statement, Strength
from prima_ray.knowledge.pair_passages import PassagesConfig, retrieve
from prima_ray.knowledge.retrieval import Retriever
from prima_ray.knowledge.vocabulary import Vocabulary
from prima_ray.knowledge.wording import Effect

NO_EVIDENCE = "No evidence found."
_EFFECTS: tuple[Effect, ...] = ("raises", "lowers", "none")
EFFECT_IN_WORDS: dict[Direction, str] = {
    "raises": "raises the risk",
    "lowers": "lowers the risk",
    "none": "no clear relation",
}
_LINKS = ("named", "list", "heading", "umbrella")
_NOT_WORD = re.compile(r"\W+")


class ExtractiveConfig(PassagesConfig):
    """The writer that uses no language model."""

    kind: Literal["extractive"] = "extractive"
    max_statements: int = Field(default=6, ge=1)
    min_weight: float = Field(default=0.4, gt=0.0)
    """Votes below which there is no evidence."""
    min_share: float = Field(default=0.6, gt=0.5, le=1.0)
    """Part of all votes that a direction needs."""


@dataclass(frozen=True)
class ExtractiveWriter:
    """See `writing.Writer`; nothing fails, and nothing is spent."""

    config: ExtractiveConfig
    vocabulary: Vocabulary
    retriever: Retriever
    allow: Sequence[str] | None = None

    @property
    def usage(self) -> None:
        """No model is called."""
        return

    def write(self, pairs: Iterable[Pair], progress: Callable[[int], object] | None = None) -> Iterator[Entry]:
        """An entry a pair, in their order."""
        for factor, diagnosis in pairs:
            yield write_entry(factor, diagnosis, self.config, self.vocabulary, self.retriever, allow=self.allow)
            if progress:
                progress(1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the sources say together."""

    direction: Direction
    strength: Strength | None
    claims: tuple[Claim, ...]
    """What it rests on, the best of each source first; each wording once."""
    num_sources: int
    num_against: int
    """Claims that say otherwise."""


def write_entries(
    config: ExtractiveConfig,
    vocabulary: Vocabulary,
    retriever: Retriever,
    *,
    allow: Sequence[str] | None = None,
) -> list[Entry]:
    """An entry for every factor and diagnosis.

    Args:
        allow: names of the sources that may be quoted; None: all that the retriever has.
    """
    return [
        write_entry(factor, diagnosis, config, vocabulary, retriever, allow=allow)
        for factor, diagnosis in vocabulary.pairs
    ]


def write_entry(
    factor: str,
    diagnosis: str,
    config: ExtractiveConfig,
    vocabulary: Vocabulary,
    retriever: Retriever,
    *,
    allow: Sequence[str] | None = None,
) -> Entry:
    """Retrieve, read, weigh and quote for one pair."""
    chunks = retrieve(factor, diagnosis, config, vocabulary, retriever, allow=allow)
    claims = [claim for chunk in chunks for claim in find_claims(chunk, factor, diagnosis, vocabulary)]
    verdict = weigh(claims, config)
    shown = verdict.claims[: config.max_statements]
    return Entry(
        factor=factor,
        diagnosis=diagnosis,
        direction=verdict.direction,
        strength=verdict.strength,
        summary=_summary(verdict, vocabulary.factors[factor].config.phrase, vocabulary.phrases[diagnosis]),
        statements=tuple(
            Statement(
                text=claim.text,
                quotes=tuple(Quote(chunk_id=claim.chunk.chunk_id, quote=quote) for quote in claim.quotes),
            )
            for claim in shown
        ),
    )


def weigh(claims: Iterable[Claim], config: ExtractiveConfig) -> Verdict:
    """Let the sources vote."""
    ranked = _distinct(sorted(claims, key=_rank))
    votes: dict[Effect, dict[str, float]] = defaultdict(dict)
    for claim in ranked:
        source = votes[claim.effect]
        source[claim.chunk.doc_id] = max(source.get(claim.chunk.doc_id, 0.0), claim.weight)
    totals = {effect: sum(votes[effect].values()) for effect in _EFFECTS}
    everything = sum(totals.values())
    if everything < config.min_weight:
        return Verdict("no_evidence", None, (), 0, 0)
    best = max(_EFFECTS, key=lambda effect: totals[effect])
    if totals[best] < config.min_share * everything:
        both = _in_turn(_by_source(ranked), lambda claim: claim.effect)
        return Verdict("none", "weak", tuple(both), len({claim.chunk.doc_id for claim in ranked}), 0)
    on_side = tuple(_by_source(claim for claim in ranked if claim.effect == best))
    num_sources = len(votes[best])
    strength: Strength = "weak"
    if num_sources >= 2 and totals[best] >= 1.5:
        strength = "strong" if totals[best] >= 3 and totals[best] >= 0.75 * everything else "moderate"
    return Verdict(best, strength, on_side, num_sources, len(ranked) - len(on_side))


def _rank(claim: Claim) -> tuple[object, ...]:
    """Heavier first, then the better link, then what speaks of fewer factors, then the shorter."""
    return (
        -claim.weight,
        _LINKS.index(claim.link),
        claim.num_topics,
        len(claim.text),
        claim.chunk.doc_id,
        claim.chunk.chunk_id,
        claim.text,
    )


def _distinct(ranked: Iterable[Claim]) -> list[Claim]:
    """Each wording once: white space, case and punctuation apart, and whichever lead introduces it."""
    seen: set[tuple[Effect, str]] = set()
    kept = []
    for claim in ranked:
        key = (claim.effect, _NOT_WORD.sub(" ", claim.text.lower()).strip())
        if key not in seen:
            seen.add(key)
            kept.append(claim)
    return kept


def _by_source(ranked: Iterable[Claim]) -> list[Claim]:
    """For each direction, the best claim of every source, then the second ones."""
    return _in_turn(ranked, lambda claim: (claim.effect, claim.chunk.doc_id))


def _in_turn(ranked: Iterable[Claim], group: Callable[[Claim], Hashable]) -> list[Claim]:
    """The first of each group, then the second ones, and so on."""
    taken: Counter[Hashable] = Counter()
    turns: dict[int, list[Claim]] = defaultdict(list)
    for claim in ranked:
        turns[taken[group(claim)]].append(claim)
        taken[group(claim)] += 1
    return [claim for turn in sorted(turns) for claim in turns[turn]]


def _summary(verdict: Verdict, phrase: str, diagnosis: str) -> str:
    if verdict.direction == "no_evidence" or not verdict.claims:
        return NO_EVIDENCE
    sides = {claim.effect for claim in verdict.claims}
    said = "divided evidence" if len(sides) > 1 else EFFECT_IN_WORDS[verdict.direction]
    against = f"; {counted(verdict.num_against, 'sentence')} to the contrary" if verdict.num_against else ""
    top = verdict.claims[0]
    return (
        f"{phrase}, {diagnosis}: {said} ({verdict.strength}; {counted(verdict.num_sources, 'source')}{against}). "
        f"“{top.text}” [{top.chunk.chunk_id}]"
    )


def counted(number: int, noun: str) -> str:
    """``1 source``, ``2 sources``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
