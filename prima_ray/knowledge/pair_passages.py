"""The passages that are read for one factor and one diagnosis; every writer asks the index in the same words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field

from prima_ray.base import StrictConfig
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.retrieval import Hit, Retriever
from prima_ray.knowledge.vocabulary import Vocabulary

_PATTERN = re.compile(r"[*.]")


class PassagesConfig(StrictConfig):
    """How much is asked for; the base of a writer's config."""

    passages: int = Field(default=40, ge=1)
    """Passages that each query asks for."""
    max_queries: int = Field(default=8, ge=1)
    """Queries a pair: the factor's phrase and its first terms, each with the diagnosis."""


def plain_terms(factor: str, vocabulary: Vocabulary) -> list[str]:
    """How texts call a factor, its phrase first, without terms that are patterns; each once."""
    described = vocabulary.factors[factor].config
    return list(dict.fromkeys((described.phrase, *(term for term in described.terms if not _PATTERN.search(term)))))


def pair_queries(factor: str, diagnosis: str, config: PassagesConfig, vocabulary: Vocabulary) -> list[str]:
    """What the index is asked about a pair."""
    wordings = plain_terms(factor, vocabulary)[: config.max_queries]
    return [f"{wording} {vocabulary.phrases[diagnosis]}" for wording in wordings]


def ask(
    factor: str,
    diagnosis: str,
    config: PassagesConfig,
    vocabulary: Vocabulary,
    retriever: Retriever,
    *,
    allow: Sequence[str] | None = None,
) -> list[list[Hit]]:
    """The answer to each query of a pair, best first.

    Args:
        allow: names of the sources that may be quoted; None: all that the retriever has.
    """
    sources = tuple(allow) if allow is not None else None
    answers = []
    for query in pair_queries(factor, diagnosis, config, vocabulary):
        hits = retriever.search(query, k=config.passages, sources=sources)
        # An index that disregards `sources` must not let a text in that nobody vouched for.
        answers.append([hit for hit in hits if sources is None or hit.chunk.source in sources])
    return answers


def retrieve(
    factor: str,
    diagnosis: str,
    config: PassagesConfig,
    vocabulary: Vocabulary,
    retriever: Retriever,
    *,
    allow: Sequence[str] | None = None,
) -> list[Chunk]:
    """All that the queries of a pair find, in an order of its own: for whom ranks decide nothing."""
    answers = ask(factor, diagnosis, config, vocabulary, retriever, allow=allow)
    found = {hit.chunk.chunk_id: hit.chunk for hits in answers for hit in hits}
    return sorted(found.values(), key=lambda chunk: (chunk.doc_id, chunk.chunk_id))
