"""Retrieval from an index: by meaning, by words, by both. See `retrieval` for the protocol.

To add one: a class with `search`, and a branch in `make_retriever`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import Field

from prima_ray.base import StrictConfig
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.embedding import Embedder, Vectors
from prima_ray.knowledge.index import Filter, Index, refuse_another_encoder
from prima_ray.knowledge.rerank import RerankConfig, Reranked
from prima_ray.knowledge.retrieval import Hit

EVERYTHING = Filter()


class RetrievalConfig(StrictConfig):
    """How passages are found."""

    kind: Literal["hybrid", "dense", "bm25"] = "hybrid"
    depth: int = Field(default=100, ge=1)
    """Hits of each retriever that are fused."""
    rrf_k: int = Field(default=60, ge=0)
    """The constant of reciprocal-rank fusion: the larger, the less the first ranks stand out."""
    dense_weight: float = Field(default=0.5, ge=0, le=1)
    """Of the dense retriever in the fusion; BM25 has the rest."""
    rerank: RerankConfig | None = None


class FilteredRetriever(Protocol):
    """A retriever that also knows other filters than the source."""

    def search(
        self, query: str, *, k: int, sources: tuple[str, ...] | None = None, where: Filter = EVERYTHING
    ) -> list[Hit]:
        """The best ``k`` chunks that both filters allow."""
        ...


def make_retriever(config: RetrievalConfig, index: Index, embedder: Embedder) -> FilteredRetriever:
    """The retriever that a config names.

    Raises:
        PrimaError: the index was made with another encoder, or the reranker cannot be had.
    """
    found: FilteredRetriever
    if config.kind == "bm25":
        found = Bm25Retriever(index)
    elif config.kind == "dense":
        found = DenseRetriever(index, embedder)
    else:
        found = HybridRetriever(
            (DenseRetriever(index, embedder), Bm25Retriever(index)),
            weights=(config.dense_weight, 1 - config.dense_weight),
            rrf_k=config.rrf_k,
            depth=config.depth,
        )
    if config.rerank is None:
        return found
    return Reranked(found, config.rerank.load(device=str(embedder.device)), depth=config.rerank.depth)


def prepare(retriever: FilteredRetriever, queries: Iterable[str]) -> None:
    """Embed queries that are going to be asked together, which takes a fraction of the time of one by one."""
    match retriever:
        case DenseRetriever():
            new = [query for query in dict.fromkeys(queries) if query not in retriever.prepared]
            retriever.prepared.update(zip(new, retriever.embedder.embed(new), strict=True))
        case HybridRetriever():
            listed = list(queries)
            for item in retriever.retrievers:
                prepare(item, listed)
        case Reranked():
            prepare(retriever.retriever, queries)


def narrowed(where: Filter, sources: tuple[str, ...] | None) -> Filter:
    """A filter that also asks for these sources."""
    if sources is None:
        return where
    if where.sources is not None:
        sources = tuple(name for name in sources if name in where.sources)
    return where.model_copy(update={"sources": sources})


@dataclass(frozen=True)
class DenseRetriever:
    """By the scalar product of query and chunk; scores are cosines."""

    index: Index
    embedder: Embedder
    prepared: dict[str, Vectors] = field(default_factory=dict, compare=False, repr=False)
    """Vectors of queries that were embedded together, see `prepare`."""

    def __post_init__(self) -> None:
        refuse_another_encoder(self.index.folder, built=self.index.meta.encoder, wanted=self.embedder.identity)

    def search(
        self, query: str, *, k: int, sources: tuple[str, ...] | None = None, where: Filter = EVERYTHING
    ) -> list[Hit]:
        """See the protocol."""
        vector = self.prepared.get(query)
        if vector is None:
            vector = self.embedder.embed([query])[0]
        return [Hit(*found) for found in self.index.nearest(vector, k=k, where=narrowed(where, sources))]


@dataclass(frozen=True)
class Bm25Retriever:
    """By words; chunks that share none with the query are not found."""

    index: Index

    def search(
        self, query: str, *, k: int, sources: tuple[str, ...] | None = None, where: Filter = EVERYTHING
    ) -> list[Hit]:
        """See the protocol."""
        return [Hit(*found) for found in self.index.best_words(query, k=k, where=narrowed(where, sources))]


@dataclass(frozen=True)
class HybridRetriever:
    """Reciprocal-rank fusion: a chunk's score is the sum over retrievers of weight / (rrf_k + rank), ranks from 1.

    Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods",
    SIGIR 2009, with equal weights and k = 60.
    """

    retrievers: tuple[FilteredRetriever, ...]
    weights: tuple[float, ...]
    rrf_k: int = 60
    depth: int = 100

    def __post_init__(self) -> None:
        if len(self.retrievers) != len(self.weights):
            raise ValueError(f"{len(self.retrievers)} retrievers, {len(self.weights)} weights")

    def search(
        self, query: str, *, k: int, sources: tuple[str, ...] | None = None, where: Filter = EVERYTHING
    ) -> list[Hit]:
        """See the protocol. Of each retriever at least ``k`` hits are fused."""
        depth = max(k, self.depth)
        return fuse(
            [item.search(query, k=depth, sources=sources, where=where) for item in self.retrievers],
            self.weights,
            rrf_k=self.rrf_k,
        )[:k]


def fuse(answers: Sequence[Sequence[Hit]], weights: Sequence[float], *, rrf_k: int) -> list[Hit]:
    """Answers of several retrievers in one order, best first; equal scores by chunk id."""
    scores: dict[str, float] = {}
    chunks: dict[str, Chunk] = {}
    for hits, weight in zip(answers, weights, strict=True):
        if weight == 0:
            continue
        for rank, hit in enumerate(hits, start=1):
            name = hit.chunk.chunk_id
            chunks[name] = hit.chunk
            scores[name] = scores.get(name, 0.0) + weight / (rrf_k + rank)
    order = sorted(scores, key=lambda name: (-scores[name], name))
    return [Hit(chunks[name], scores[name]) for name in order]
