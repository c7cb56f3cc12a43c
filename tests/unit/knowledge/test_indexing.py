from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prima_ray.base import PrimaError, read_json, write_json
from prima_ray.config import validate_config
from prima_ray.knowledge.bm25 import Bm25Config
from prima_ray.knowledge.chunks import chunk_id
from prima_ray.knowledge.documents import Document
from prima_ray.knowledge.embedding import Embedder
from prima_ray.knowledge.index import Filter, Index, IndexConfig
from prima_ray.knowledge.indexing import IndexReport, remove_documents, run_here, update_index
from tests.unit.knowledge.conftest import CountingEmbedder, note

EVERYTHING = Filter()
ONE_DOCUMENT = 1
"""Letters of a part: every document is one."""


class Killed(Exception):  # noqa: N818 - nothing is in error
    """As by a signal."""


def killed_after(parts: int) -> Callable[..., Iterator]:
    """Runs so many parts, and stops as a signal would."""

    def run(encoder, todo):
        for number, encoded in enumerate(run_here(encoder, todo)):
            if number == parts:
                raise Killed
            yield encoded

    return run


def texts(index: Index) -> dict[str, str]:
    return {chunk.chunk_id: f"{chunk.doc_id}: {chunk.text}" for chunk in index.chunks()}


def nearest(index: Index, embedder: Embedder, query: str = "sun and moles") -> list[tuple[str, float]]:
    found = index.nearest(embedder.embed([query])[0], k=5, where=EVERYTHING)
    return [(chunk.chunk_id, round(score, 5)) for chunk, score in found]


def test_an_index_holds_every_chunk_with_its_origin_and_vector(
    tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder
):
    told: list[int] = []
    report = update_index(
        tmp_path / "index", map(note, range(6)), config, embedder, progress=told.append, part_letters=250
    )
    assert report == IndexReport(num_added=6, num_embedded=12)
    assert len(told) > 1
    assert sum(told) == 12
    index = Index.open(tmp_path / "index")
    meta = index.meta
    assert (meta.num_documents, meta.num_chunks) == (6, 12)
    assert meta.num_chunks_by_source == {"medquad": 6, "pdq": 6}
    assert (meta.encoder, meta.chunks, meta.bm25) == (embedder.identity, config.chunks, config.bm25)
    first = next(chunk for chunk in index.chunks() if chunk.doc_id == "d1" and chunk.heading == ("Risk", "Care"))
    assert first.text == "See a doctor about moles."
    assert first.chunk_id == chunk_id("d1", ("Risk", "Care"), first.text)
    assert (first.source, first.title, first.url, first.date, first.licence) == (
        "medquad", "On moles", "https://example.org/1", "2011-05", "CC BY 4.0",
    )  # fmt: skip
    # The chunk that says what is asked, word for word, comes first with a cosine of one.
    found = index.nearest(embedder.embed([f"On moles > Risk > Care\n{first.text}"])[0], k=3, where=EVERYTHING)
    assert found[0][0] == first
    assert found[0][1] == pytest.approx(1, abs=1e-5)
    assert [chunk for chunk, _ in index.best_words("doctor moles", k=1, where=EVERYTHING)] == [first]


def test_only_what_is_new_is_embedded(tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder):
    def update(*documents: Document, **keys: bool) -> tuple[IndexReport, list[str]]:
        embedder.texts = []
        report = update_index(tmp_path, documents, config, embedder, **keys)
        return report, [text.partition("\n")[2] for text in embedder.texts]

    update(*map(note, range(4)))
    before = Index.open(tmp_path)
    assert update(*map(note, range(4))) == (IndexReport(num_unchanged=4), [])
    assert Index.open(tmp_path).meta == before.meta

    report, embedded = update(*map(note, range(3, 6)))
    assert report == IndexReport(num_added=2, num_unchanged=1, num_embedded=4)
    assert len(embedded) == 4
    assert Index.open(tmp_path).meta.num_documents == 6

    # One section of a document has another text: the other one's vector is kept, the old chunk goes.
    report, embedded = update(note(2, "Age is all."))
    assert (report, embedded) == (IndexReport(num_changed=1, num_embedded=1), ["Age is all."])
    index = Index.open(tmp_path)
    assert index.meta.num_chunks == 12
    assert {text for text in texts(index).values() if text.startswith("d2:")} == {
        "d2: Age is all.",
        "d2: See a doctor about age.",
    }
    assert not index.best_words("number 2 seen", k=20, where=Filter(doc_ids=("d2",)))

    # An address is no text.
    report, embedded = update(note(3, url="https://example.org/new"))
    assert (report, embedded) == (IndexReport(num_changed=1), [])
    assert {chunk.url for chunk in Index.open(tmp_path).chunks() if chunk.doc_id == "d3"} == {"https://example.org/new"}

    report, embedded = update(note(0), note(7), prune=True)
    assert report == IndexReport(num_added=1, num_unchanged=1, num_removed=5, num_embedded=2)
    assert {text.partition(":")[0] for text in texts(Index.open(tmp_path)).values()} == {"d0", "d7"}
    # What it holds after all this is what one build holds.
    update_index(tmp_path / "new", (note(7), note(0)), config, embedder)
    assert texts(Index.open(tmp_path / "new")) == texts(Index.open(tmp_path))
    assert nearest(Index.open(tmp_path / "new"), embedder) == nearest(Index.open(tmp_path), embedder)


def test_documents_are_removed(tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder):
    with pytest.raises(PrimaError, match="no finished index here"):
        remove_documents(tmp_path, ["d1"], config, embedder)
    update_index(tmp_path, map(note, range(3)), config, embedder)
    embedder.texts = []
    assert remove_documents(tmp_path, ["d1", "d'9"], config, embedder) == 1
    index = Index.open(tmp_path)
    assert {chunk.doc_id for chunk in index.chunks()} == {"d0", "d2"}
    assert index.best_words("moles", k=5, where=EVERYTHING) == []
    assert remove_documents(tmp_path, ["d0", "d2"], config, embedder) == 2
    index = Index.open(tmp_path)
    assert (index.meta.num_documents, index.meta.num_chunks) == (0, 0)
    assert index.best_words("sun", k=5, where=EVERYTHING) == nearest(index, embedder) == []
    assert embedder.texts == ["sun and moles"]


def test_a_build_that_was_killed_goes_on(tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder):
    embedder.texts = []
    with pytest.raises(Killed):
        update_index(tmp_path, map(note, range(8)), config, embedder, run=killed_after(5), part_letters=ONE_DOCUMENT)
    with pytest.raises(PrimaError) as caught:
        Index.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no finished index here (index.json is missing)\n"
        "  Build it; a build that was broken off goes on where it stopped."
    )
    embedder.texts = []
    report = update_index(tmp_path, map(note, range(8)), config, embedder)
    assert report == IndexReport(num_added=3, num_unchanged=5, num_embedded=6)
    assert len(embedder.texts) == 6
    index = Index.open(tmp_path)
    update_index(tmp_path / "straight", map(note, range(8)), config, embedder)
    straight = Index.open(tmp_path / "straight")
    assert texts(index) == texts(straight)
    assert nearest(index, embedder) == nearest(straight, embedder)


def test_a_reader_sees_nothing_of_an_update_that_was_killed(
    tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder
):
    update_index(tmp_path, map(note, range(3)), config, embedder)
    before = Index.open(tmp_path)
    held, answers = texts(before), nearest(before, embedder)
    changed = [note(0, "Changed."), note(8), note(9)]
    with pytest.raises(Killed):
        update_index(tmp_path, changed, config, embedder, run=killed_after(2), part_letters=ONE_DOCUMENT)
    for index in (before, Index.open(tmp_path)):
        assert texts(index) == held
        assert nearest(index, embedder) == answers
        assert index.best_words("changed", k=5, where=EVERYTHING) == []
    report = update_index(tmp_path, changed, config, embedder)
    assert report == IndexReport(num_added=1, num_unchanged=2, num_embedded=2)
    assert len(Index.open(tmp_path).best_words("changed", k=5, where=EVERYTHING)) == 1
    # The reader that was there before still reads what it had.
    assert texts(before) == held
    assert nearest(before, embedder) == answers


def test_no_more_than_a_part_is_read_ahead(tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder):
    read, committed = [0], [0]

    def documents() -> Iterator[Document]:
        for number in range(6):
            assert read[0] - committed[0] <= 1
            read[0] += 1
            yield note(number)

    def progress(count: int) -> None:
        committed[0] += count // 2

    update_index(tmp_path, documents(), config, embedder, progress=progress, part_letters=ONE_DOCUMENT)
    assert committed == [6]


def test_another_encoder_and_other_chunks_are_refused(
    tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder, encoder_folder: Callable[[int], Path]
):
    # Also of a build that was broken off.
    with pytest.raises(Killed):
        update_index(tmp_path, [note(0)], config, embedder, run=killed_after(0))
    other_encoder = config.encoder.model_copy(update={"path": str(encoder_folder(1))})
    other = Embedder.load(other_encoder, device="cpu")
    for _ in range(2):
        with pytest.raises(PrimaError) as caught:
            update_index(tmp_path, [note(1)], config.model_copy(update={"encoder": other_encoder}), other)
        assert str(caught.value) == (
            f"{tmp_path}: the index was made with the encoder {encoder_folder(0).name} ({embedder.identity.hash[:12]}, "
            f"64 tokens), this is {encoder_folder(1).name} ({other.identity.hash[:12]}, 64 tokens)\n"
            "  Name the encoder that it was made with, or build an index in another folder."
        )
        update_index(tmp_path, [note(0)], config, embedder)
    chunks = config.chunks.model_copy(update={"overlap_tokens": 3})
    with pytest.raises(PrimaError) as caught:
        update_index(tmp_path, [note(1)], config.model_copy(update={"chunks": chunks}), embedder)
    assert str(caught.value) == (
        f"{tmp_path}: the index was made with chunks.overlap_tokens 0, the config says 3\n"
        "  Set it as it was, or build an index in another folder."
    )


def test_other_settings_of_bm25_embed_nothing(tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder):
    update_index(tmp_path, map(note, range(3)), config, embedder)
    before = Index.open(tmp_path).best_words("sun risk", k=1, where=EVERYTHING)[0][1]
    embedder.texts = []
    other = config.model_copy(update={"bm25": Bm25Config(k1=0.5)})
    assert update_index(tmp_path, [], other, embedder) == IndexReport()
    assert embedder.texts == []
    index = Index.open(tmp_path)
    assert index.meta.bm25.k1 == 0.5
    assert index.best_words("sun risk", k=1, where=EVERYTHING)[0][1] != pytest.approx(before)
    assert len(list(tmp_path.glob("bm25-*"))) == 1


def test_mistakes_are_said(tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder):
    def message(run: Callable[[], object]) -> str:
        with pytest.raises(PrimaError) as caught:
            run()
        return str(caught.value)

    assert message(lambda: update_index(tmp_path / "a", [note(1), note(1)], config, embedder)) == (
        "the document d1 comes twice\n  Give each text an id of its own."
    )
    assert message(lambda: update_index("s3://bucket/index", [], config, embedder)) == (
        "s3://bucket/index: an index is a folder on a disk\n  Name a local folder, or one that all nodes mount."
    )
    assert message(lambda: validate_config(IndexConfig, {"chunks": {"max_tokens": 253}}, where="corpus.yaml")) == (
        "corpus.yaml: chunks.max_tokens is 253, the encoder reads 256 tokens, special ones included: leave it 4 more "
        "at least"
    )
    update_index(tmp_path, [note(1)], config, embedder)
    path = tmp_path / "index.json"
    body = read_json(path)
    write_json(path, {**body, "schema_version": 2})
    assert message(lambda: Index.open(tmp_path)) == f"{path}: index schema 2, this program reads 1"
    write_json(path, {**body, "num_chunks": "many"})
    assert message(lambda: Index.open(tmp_path)).startswith(f"{path}: damaged (Input should be a valid integer")
    write_json(path, {**body, "table_version": 999})
    assert message(lambda: Index.open(tmp_path)).startswith(f"{tmp_path}: damaged (Version 999 no longer exists")


def test_what_is_written_names_the_commit(tmp_path: Path, config: IndexConfig, embedder: CountingEmbedder):
    update_index(tmp_path, [note(1)], config, embedder)
    names = sorted(path.name for path in tmp_path.iterdir())
    meta = json.loads((tmp_path / "index.json").read_text())
    assert names == sorted(["chunks.lance", "index.json", meta["bm25_folder"]])
    assert meta["encoder"]["width"] == 32
