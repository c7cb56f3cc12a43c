from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prima_ray.base import PrimaError
from prima_ray.config import validate_config
from prima_ray.knowledge.chunks import Chunk
from prima_ray.knowledge.embedding import Embedder
from prima_ray.knowledge.index import Filter, Index, IndexConfig
from prima_ray.knowledge.indexing import update_index
from prima_ray.knowledge.rerank import RerankConfig
from prima_ray.knowledge.retrieval import Hit, Retriever
from prima_ray.knowledge.retrievers import (
    Bm25Retriever,
    DenseRetriever,
    HybridRetriever,
    RetrievalConfig,
    fuse,
    make_retriever,
    prepare,
)
from prima_ray.knowledge.splitting import Splitter
from tests.unit.knowledge.conftest import note
from tests.unit.models.conftest import BERT, VOCABULARY, add_tokenizer

QUERY = "does the sun raise the risk of melanoma"


@pytest.fixture
def index(tmp_path: Path, config: IndexConfig, embedder: Embedder) -> Index:
    update_index(tmp_path / "index", map(note, range(12)), config, embedder)
    return Index.open(tmp_path / "index")


def ids(hits: list[Hit]) -> list[str]:
    return [hit.chunk.chunk_id for hit in hits]


def cosines(
    index: Index, config: IndexConfig, embedder: Embedder, allowed: Callable[[Chunk], bool] = lambda _: True
) -> dict[str, float]:
    """Of every chunk with the query, computed by hand."""
    splitter = Splitter(config.chunks, embedder.tokenizer)
    chunks = [chunk for chunk in index.chunks() if allowed(chunk)]
    vectors = embedder.embed([splitter.encoder_text(chunk) for chunk in chunks])
    scores = (vectors @ embedder.embed([QUERY])[0]).tolist()
    return {chunk.chunk_id: pytest.approx(score, abs=1e-5) for chunk, score in zip(chunks, scores, strict=True)}


def test_dense_retrieval_is_exact(index: Index, config: IndexConfig, embedder: Embedder):
    retriever: Retriever = DenseRetriever(index, embedder)
    hits = retriever.search(QUERY, k=1000)
    assert {hit.chunk.chunk_id: hit.score for hit in hits} == cosines(index, config, embedder)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(hits) == 24
    assert [hit.score for hit in retriever.search(QUERY, k=7)] == [hit.score for hit in hits[:7]]


def test_words_find_what_shares_them(index: Index):
    retriever: Retriever = Bm25Retriever(index)
    hits = retriever.search("arsenic", k=10)
    # Number 3 and number 11, a section with the word in heading and text, and one with it in both as well.
    assert {hit.chunk.doc_id for hit in hits} == {"d3", "d11"}
    assert len(hits) == 4
    assert retriever.search("arsenic", k=1) == hits[:1]
    assert retriever.search("the of", k=10) == []


FILTERS = [
    (Filter(sources=("pdq",)), lambda chunk: chunk.source == "pdq"),
    (Filter(sources=()), lambda chunk: False),
    (Filter(doc_ids=("d1", "d2", "o'd")), lambda chunk: chunk.doc_id in ("d1", "d2")),
    (Filter(since_year=2018), lambda chunk: chunk.date[:4] >= "2018"),
    (Filter(until_year=2012), lambda chunk: chunk.date[:4] <= "2012"),
    (Filter(since_year=2012, until_year=2014, sources=("pdq",)),
     lambda chunk: chunk.doc_id in ("d2", "d4")),
    (Filter(licences=("CC BY 4.0",)), lambda chunk: True),
    (Filter(licences=("CC0",)), lambda chunk: False),
]  # fmt: skip


@pytest.mark.parametrize(("where", "allowed"), FILTERS)
def test_filters_mean_the_same_to_every_retriever(
    where: Filter, allowed: Callable[[Chunk], bool], index: Index, config: IndexConfig, embedder: Embedder
):
    dense, words = DenseRetriever(index, embedder), Bm25Retriever(index)
    found = {hit.chunk.chunk_id: hit.score for hit in dense.search(QUERY, k=30, where=where)}
    assert found == cosines(index, config, embedder, allowed)
    everything = words.search(QUERY, k=30)
    assert words.search(QUERY, k=30, where=where) == [hit for hit in everything if allowed(hit.chunk)]
    hybrid = make_retriever(RetrievalConfig(), index, embedder)
    assert set(ids(hybrid.search(QUERY, k=30, where=where))) == {
        chunk.chunk_id for chunk in index.chunks() if allowed(chunk)
    }


def test_sources_narrow_a_filter(index: Index, embedder: Embedder):
    for kind in ("dense", "bm25", "hybrid"):
        retriever = make_retriever(RetrievalConfig(kind=kind), index, embedder)
        assert {hit.chunk.source for hit in retriever.search(QUERY, k=9, sources=("medquad",))} == {"medquad"}
        assert retriever.search(QUERY, k=9, sources=("medquad",), where=Filter(sources=("pdq",))) == []


def hit(name: str) -> Hit:
    keys = {"doc_id": "d", "text": "t", "url": None, "source": "s", "title": "t", "date": None, "licence": None}
    return Hit(Chunk.model_validate({"chunk_id": name, "heading": (), **keys}), 0.0)


def test_fusion_is_the_sum_of_reciprocal_ranks():
    fused = fuse([[hit("a"), hit("b"), hit("c")], [hit("c"), hit("a")]], (0.5, 0.5), rrf_k=60)
    assert [(item.chunk.chunk_id, item.score) for item in fused] == [
        ("a", pytest.approx(0.5 / 61 + 0.5 / 62)),
        ("c", pytest.approx(0.5 / 63 + 0.5 / 61)),
        ("b", pytest.approx(0.5 / 62)),
    ]
    # Equal scores by id; a retriever without weight finds nothing.
    assert ids(fuse([[hit("b")], [hit("a")]], (1, 1), rrf_k=0)) == ["a", "b"]
    assert ids(fuse([[hit("b")], [hit("a")]], (1, 0), rrf_k=0)) == ["b"]


def test_hybrid_retrieval_fuses_both_to_the_depth(index: Index, embedder: Embedder):
    dense, words = DenseRetriever(index, embedder), Bm25Retriever(index)
    config = RetrievalConfig(depth=5, rrf_k=10, dense_weight=0.3)
    expected = fuse([dense.search(QUERY, k=5), words.search(QUERY, k=5)], (0.3, 0.7), rrf_k=10)
    assert make_retriever(config, index, embedder).search(QUERY, k=4) == expected[:4]
    # Never fewer than are asked for.
    assert len(make_retriever(config, index, embedder).search(QUERY, k=20)) == 20
    with pytest.raises(ValueError, match="2 retrievers, 1 weights"):
        HybridRetriever((dense, words), (1.0,))


def test_prepared_queries_find_the_same(index: Index, embedder: Embedder):
    alone = make_retriever(RetrievalConfig(), index, embedder)
    together = make_retriever(RetrievalConfig(), index, embedder)
    queries = ["sun", "sunburn raises the risk", "sun"]
    prepare(together, queries)
    for query in queries:
        expected, found = alone.search(query, k=5), together.search(query, k=5)
        assert ids(found) == ids(expected)
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected])
    asked: list[str] = []
    (dense, _) = together.retrievers  # type: ignore[attr-defined]
    object.__setattr__(dense.embedder, "embed", asked.extend)
    together.search("sun", k=1)
    assert asked == []


def test_an_index_of_another_encoder_is_refused(
    index: Index, config: IndexConfig, embedder: Embedder, encoder_folder: Callable[[int], Path]
):
    other = Embedder.load(config.encoder.model_copy(update={"path": str(encoder_folder(1))}), device="cpu")
    with pytest.raises(PrimaError, match="the index was made with the encoder"):
        make_retriever(RetrievalConfig(), index, other)
    # Words need no encoder.
    assert make_retriever(RetrievalConfig(kind="bm25"), index, other).search("sun", k=1)


def save_cross_encoder(folder: Path, *, labels: int = 1) -> Path:
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(**BERT, vocab_size=VOCABULARY, pad_token_id=0, num_labels=labels)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return add_tokenizer(folder)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_cross_encoder_orders_anew(labels: int, index: Index, embedder: Embedder, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_cross_encoder(tmp_path / "cross", labels=labels)
    plain = make_retriever(RetrievalConfig(), index, embedder).search(QUERY, k=6)
    config = RetrievalConfig(rerank=RerankConfig(path=str(folder), depth=6, batch_size=4))
    hits = make_retriever(config, index, embedder).search(QUERY, k=3)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    scores = {}
    for item in plain:
        passage = " > ".join((item.chunk.title, *item.chunk.heading)) + "\n" + item.chunk.text
        with torch.no_grad():
            logits = model(**tokenizer(QUERY, passage, return_tensors="pt")).logits[0]
        scores[item.chunk.chunk_id] = float(logits[0] if labels == 1 else logits[1] - logits[0])
    assert ids(hits) == sorted(scores, key=lambda name: -scores[name])[:3]
    assert [hit.score for hit in hits] == [pytest.approx(scores[name], abs=1e-5) for name in ids(hits)]
    assert make_retriever(config, index, embedder).search(QUERY, k=3, sources=()) == []


def test_what_is_no_cross_encoder_is_said(tmp_path: Path, encoder_folder: Callable[[int], Path]):
    def message(**keys: str) -> str:
        with pytest.raises(PrimaError) as caught:
            validate_config(RerankConfig, keys, where="corpus.yaml").load()
        return str(caught.value)

    assert message() == ("rerank: no cross-encoder is named\n  Name one in rerank.name, or its folder in rerank.path.")
    assert message(path="/nowhere/model") == "/nowhere/model: no such model folder"
    plain = str(encoder_folder(0))
    assert message(path=plain) == (
        f"{plain}: is no cross-encoder: it has no weights for classifier.bias\n"
        "  Name a model that was trained to rank passages."
    )
    three = str(save_cross_encoder(tmp_path / "three", labels=3))
    assert message(path=three) == f"{three}: has 3 outputs, a cross-encoder has one or two"
    (tmp_path / "empty").mkdir()
    assert message(path=str(tmp_path / "empty")).startswith(f"{tmp_path}/empty: no cross-encoder to be had (")
