from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prima_ray.knowledge.embedding import Embedder
from prima_ray.knowledge.index import Index, IndexConfig
from prima_ray.knowledge.indexing import update_index
from prima_ray.knowledge.retrievers import RetrievalConfig, make_retriever
from tests.unit.knowledge.conftest import note


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No socket leaves the machine; who tried is noted, since libraries swallow the error."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("no network here")

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            refuse(address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_nothing_of_llama_index_asks_the_network(
    attempts: list[Any], tmp_path: Path, config: IndexConfig, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
):
    import llama_index.core
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.schema import Document

    from prima_ray.knowledge.llama_adapters import LlamaEmbedding, LlamaRetriever
    from prima_ray.knowledge.splitting import Splitter

    # Neither OpenAI's tokenizer, nor nltk's data, nor a model that the settings name.
    def fall_back(*_: Any, **__: Any) -> None:
        raise AssertionError("a default of LlamaIndex was used")

    monkeypatch.setattr("llama_index.core.node_parser.text.sentence.get_tokenizer", fall_back)
    monkeypatch.setattr("llama_index.core.node_parser.text.sentence.split_by_sentence_tokenizer", fall_back)
    monkeypatch.setattr("llama_index.core.settings.resolve_embed_model", fall_back)
    monkeypatch.setattr("llama_index.core.settings.resolve_llm", fall_back)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)

    update_index(tmp_path, map(note, range(4)), config, embedder)
    retriever = make_retriever(RetrievalConfig(), Index.open(tmp_path), embedder)
    nodes = LlamaRetriever(retriever, k=3, sources=("pdq",)).retrieve("moles in the sun")
    hits = retriever.search("moles in the sun", k=3, sources=("pdq",))
    assert [(node.node_id, node.score, node.text) for node in nodes] == [
        (hit.chunk.chunk_id, hit.score, hit.chunk.text) for hit in hits
    ]
    assert nodes[0].metadata["source"] == "pdq"
    assert "example.org" not in nodes[0].get_content("llm")

    # Our splitter and encoder in a pipeline of LlamaIndex's.
    embedding = LlamaEmbedding(embedder, embed_batch_size=3)
    splitter = Splitter(config.chunks, embedder.tokenizer).llama_splitter()
    made = IngestionPipeline(transformations=[splitter, embedding]).run(documents=[Document(text="Sun. " * 50)])
    assert len(made) > 2
    vectors = embedder.embed([node.text for node in made])
    np.testing.assert_allclose([node.embedding for node in made], vectors, atol=1e-6)
    np.testing.assert_allclose(embedding.get_query_embedding("sun"), embedder.embed(["sun"])[0], atol=1e-6)
    assert attempts == []
