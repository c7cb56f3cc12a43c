"""Our encoder and retrievers as LlamaIndex's own, for programs that are written with it. Imports LlamaIndex."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.embedding import Embedder
from prima_ray.knowledge.retrieval import Hit, Retriever


class LlamaEmbedding(BaseEmbedding):  # type: ignore[misc]  # LlamaIndex's classes are untyped here
    """An `Embedder` as an embedding model; queries and texts are read alike."""

    _embedder: Embedder = PrivateAttr()

    def __init__(self, embedder: Embedder, **keys: Any) -> None:
        super().__init__(model_name=embedder.identity.name, **keys)
        self._embedder = embedder

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        found: list[list[float]] = self._embedder.embed(texts).tolist()
        return found

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


class LlamaRetriever(BaseRetriever):  # type: ignore[misc]
    """A `Retriever` of ours as one of LlamaIndex's."""

    def __init__(self, retriever: Retriever, *, k: int, sources: tuple[str, ...] | None = None) -> None:
        self._retriever = retriever
        self._k = k
        self._sources = sources
        super().__init__(callback_manager=CallbackManager([]))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._retriever.search(query_bundle.query_str, k=self._k, sources=self._sources)
        return [as_node(hit) for hit in hits]


def as_node(hit: Hit) -> NodeWithScore:
    """A hit as a node that carries where it comes from."""
    return NodeWithScore(node=as_text_node(hit.chunk), score=hit.score)


def as_text_node(chunk: Chunk) -> TextNode:
    """A chunk as a node; id and text are the chunk's."""
    metadata = chunk.model_dump(mode="json", exclude={"chunk_id", "text"})
    # A language model is shown title and headings; addresses and licences are for people.
    hidden = [key for key in metadata if key not in ("title", "heading")]
    return TextNode(
        id_=chunk.chunk_id,
        text=chunk.text,
        metadata=metadata,
        excluded_embed_metadata_keys=hidden,
        excluded_llm_metadata_keys=hidden,
    )
