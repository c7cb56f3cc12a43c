"""How far quotes support a statement: by their words, or by a text encoder.

To add a scorer (an entailment model): a class with `threshold` and `score`, a config in the union, a branch in
`make_support`. No scorer here can tell "lowers" from "raises" by likeness alone, since both are about the same. So a
statement with a number that the evidence lacks, or that denies what the evidence does not, or the other way round,
scores 0 with each of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from prima_ray.base import StrictConfig
from prima_ray.knowledge.embedding import Embedder
from prima_ray.knowledge.passages import normalise

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


class LexicalConfig(StrictConfig):
    """By words: fit for a writer that quotes."""

    kind: Literal["lexical"] = "lexical"
    threshold: float = Field(default=0.8, gt=0, le=1)
    """Part of the statement's words that the evidence must hold."""


class EmbeddingConfig(StrictConfig):
    """By the index's encoder: for a writer that rewords."""

    kind: Literal["embedding"] = "embedding"
    threshold: float = Field(default=0.7, gt=0, le=1)
    """Cosine of the statement and the evidence (`benchmarks/risk_pairs.py --support` shows what it lets through)."""


SupportConfig = Annotated[LexicalConfig | EmbeddingConfig, Field(discriminator="kind")]


def make_support(config: LexicalConfig | EmbeddingConfig, embedder: Embedder) -> Support:
    """The scorer that a config names."""
    if isinstance(config, LexicalConfig):
        return LexicalSupport(config.threshold)
    return EmbeddingSupport(config.threshold, embedder)


@dataclass(frozen=True, slots=True)
class LexicalSupport:
    """The part of the statement's words that the evidence holds; needs no model."""

    threshold: float = 0.8

    def score(self, statement: str, evidence: Sequence[str]) -> float:
        if contradicts(statement, evidence):
            return 0.0
        content = [word for word in _words(statement) if word not in _GRAMMAR]
        if not content:
            return 0.0
        held = set(_words(" ".join(evidence)))
        return sum(word in held for word in content) / len(content)


@dataclass(frozen=True, slots=True)
class EmbeddingSupport:
    """The cosine of the statement and the evidence under a text encoder, 0 where it is negative."""

    threshold: float
    embedder: Embedder

    def score(self, statement: str, evidence: Sequence[str]) -> float:
        if contradicts(statement, evidence):
            return 0.0
        said, shown = self.embedder.embed([statement, " ".join(evidence)])
        return max(0.0, float(said @ shown))


def contradicts(statement: str, evidence: Sequence[str]) -> bool:
    """True for a statement with a number that the evidence lacks, or that denies what the evidence does not, or the
    other way round: "does not lower" and "lowers" are much alike.
    """
    said, shown = _words(statement), _words(" ".join(evidence))
    if {word for word in said if _NUMBER.search(word)} - set(shown):
        return True
    return _denies(said) != _denies(_words(evidence[0])) and _denies(said) != _denies(shown)


def _words(text: str) -> list[str]:
    return _WORD.findall(normalise(text))


def _denies(words: Sequence[str]) -> bool:
    return any(word in _NEGATORS or word.endswith("n't") for word in words)
