"""Documents -> an index, incrementally: only what is new is embedded.

Documents are worked on in parts. A part is cut into chunks and embedded, in this process or in actors
(`embedding_ray`), and committed whole by one transaction of the table. So a build that was killed goes on with the
documents that are not there, and memory holds a part at a time whatever the size of the literature; of a document only
its id and hash are remembered. `index.json`, written last, makes the new state visible.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prima_ray.base import PrimaError, canonical_json, hash_json, write_json
from prima_ray.knowledge.bm25 import Bm25
from prima_ray.knowledge.chunks import CHUNK_SCHEMA, Chunk
from prima_ray.knowledge.documents import Document
from prima_ray.knowledge.embedding import Embedder, EncoderIdentity, Vectors
from prima_ray.knowledge.index import (
    INDEX,
    ROWS,
    SCHEMA_VERSION,
    TABLE,
    IndexConfig,
    IndexMeta,
    open_database,
    quoted,
    read_meta,
    refuse_another_encoder,
)
from prima_ray.knowledge.splitting import Splitter, searchable

PART_LETTERS = 200_000
"""Of text in a part: some 250 chunks, seconds of work for one core, and all that a kill can cost a process."""
_IDENTITY = b"prima_ray"
_BM25 = "bm25-{version:06}"
_NEVER = timedelta(days=36500)
_GRACE = timedelta(days=1)
"""Readers of an older state may go on for so long."""


@dataclass(frozen=True, slots=True)
class Part:
    """Documents that are embedded and committed together."""

    number: int
    documents: tuple[Document, ...]
    changed: tuple[str, ...]
    """Ids of those that are in the index with another content: their old chunks go."""


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """Rows of the table that a part has become."""

    number: int
    rows: pa.Table
    num_embedded: int
    """Chunks whose vectors were computed; those of changed documents may have had one."""


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What an update did."""

    num_added: int = 0
    num_changed: int = 0
    num_unchanged: int = 0
    num_removed: int = 0
    """All of documents."""
    num_embedded: int = 0
    """Chunks that were embedded."""


class RunParts(Protocol):
    """Encodes parts somewhere; results may come in any order."""

    def __call__(self, encoder: PartEncoder, parts: Iterable[Part]) -> Iterator[EncodedPart]:
        """Encode all of them."""
        ...


def index_schema(width: int, config: IndexConfig, encoder: EncoderIdentity) -> pa.Schema:
    """Columns of the table. Its metadata say how its rows were made, before any `index.json` does."""
    identity = {"encoder": encoder.model_dump(mode="json"), "chunks": config.chunks.model_dump(mode="json")}
    return pa.schema(
        [
            *CHUNK_SCHEMA,
            pa.field("document_hash", pa.string()),
            pa.field("encoded_hash", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), width)),
        ],
        metadata={_IDENTITY: canonical_json(identity).encode()},
    )


def document_hash(document: Document) -> str:
    """Of everything that a chunk takes from its document, the address included."""
    return hash_json(document.model_dump(mode="json"))


class PartEncoder:
    """Cuts and embeds the documents of a part, in whatever process it is made."""

    def __init__(self, folder: str, config: IndexConfig, embedder: Embedder) -> None:
        self.folder = folder
        self.config = config
        self.embedder = embedder
        self.schema = index_schema(embedder.width, config, embedder.identity)
        self._splitter = Splitter(config.chunks, embedder.tokenizer)

    def __call__(self, part: Part) -> EncodedPart:
        chunks: list[Chunk] = []
        hashes: list[str] = []
        for document in part.documents:
            found = self._splitter.split(document)
            chunks += found
            hashes += [document_hash(document)] * len(found)
        texts = [self._splitter.encoder_text(chunk) for chunk in chunks]
        names = [hash_json(text) for text in texts]
        known = self._known(part.changed) if part.changed else {}
        new = [place for place, name in enumerate(names) if name not in known]
        vectors = np.empty((len(chunks), self.embedder.width), dtype=np.float32)
        vectors[new] = self.embedder.embed([texts[place] for place in new])
        for place, name in enumerate(names):
            if name in known:
                vectors[place] = known[name]
        columns = pa.Table.from_pylist([chunk.model_dump() for chunk in chunks], schema=CHUNK_SCHEMA)
        rows = pa.Table.from_arrays(
            [
                *columns.columns,
                pa.array(hashes, pa.string()),
                pa.array(names, pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.embedder.width),
            ],
            schema=self.schema,
        )
        return EncodedPart(part.number, rows, len(new))

    def _known(self, doc_ids: Collection[str]) -> dict[str, Vectors]:
        """Vectors of these documents' old chunks, by the hash of what the encoder read."""
        table = open_database(self.folder).open_table(TABLE)
        found = {}
        query = table.search().where(f"doc_id IN ({quoted(sorted(doc_ids))})").select(["encoded_hash", "vector"])
        for batch in query.to_batches():
            for name, vector in zip(batch["encoded_hash"].to_pylist(), batch["vector"].to_pylist(), strict=True):
                found[name] = np.array(vector, dtype=np.float32)
        return found


def run_here(encoder: PartEncoder, parts: Iterable[Part]) -> Iterator[EncodedPart]:
    """In this process, one after the other."""
    return map(encoder, parts)


def update_index(
    folder: str | Path,
    documents: Iterable[Document],
    config: IndexConfig,
    embedder: Embedder,
    *,
    run: RunParts = run_here,
    prune: bool = False,
    progress: Callable[[int], object] | None = None,
    part_letters: int = PART_LETTERS,
) -> IndexReport:
    """Bring an index up to date with documents; make it where there is none, go on where it was broken off.

    Args:
        documents: of the literature, each id once; read as the work goes on.
        embedder: of `config.encoder`.
        run: where parts are encoded; `embedding_ray.RayActors` for a pool of actors.
        prune: remove documents that are not among these.
        progress: is told the number of chunks of every committed part.
        part_letters: of text in a part.

    Raises:
        PrimaError: the index was made with another encoder or other chunks, or an id comes twice.
    """
    writer = _Writer(folder, config, embedder)
    intake = _Intake(writer.document_hashes(), part_letters)
    changed: dict[int, tuple[str, ...]] = {}
    num_embedded = 0

    def parts() -> Iterator[Part]:
        for part in intake.parts(documents):
            changed[part.number] = part.changed
            yield part

    for encoded in run(PartEncoder(str(folder), config, embedder), parts()):
        writer.commit(encoded.rows, changed.pop(encoded.number))
        num_embedded += encoded.num_embedded
        if progress:
            progress(encoded.rows.num_rows)
    gone = sorted(intake.left) if prune else []
    writer.delete(gone)
    writer.finish()
    return IndexReport(intake.num_added, intake.num_changed, intake.num_unchanged, len(gone), num_embedded)


def remove_documents(folder: str | Path, doc_ids: Collection[str], config: IndexConfig, embedder: Embedder) -> int:
    """Remove documents from an index; returns how many of them were there.

    Raises:
        PrimaError: there is no index, or it was made with another encoder or other chunks.
    """
    if read_meta(folder) is None:
        raise PrimaError(
            "no finished index here (index.json is missing)",
            where=folder,
            mend="Build it; a build that was broken off goes on where it stopped.",
        )
    writer = _Writer(folder, config, embedder)
    there = sorted(writer.document_hashes().keys() & set(doc_ids))
    writer.delete(there)
    writer.finish()
    return len(there)


class _Intake:
    """Documents -> parts of those that are new or changed."""

    def __init__(self, known: dict[str, str], part_letters: int) -> None:
        self.left = known
        """Documents of the index that have not come."""
        self.num_added = self.num_changed = self.num_unchanged = 0
        self._part_letters = part_letters
        self._seen: set[str] = set()

    def parts(self, documents: Iterable[Document]) -> Iterator[Part]:
        number, held, changed, letters = 0, list[Document](), list[str](), 0
        for document in documents:
            if not self._is_needed(document, changed):
                continue
            held.append(document)
            letters += sum(len(section.text) for section in document.sections)
            if letters >= self._part_letters:
                yield Part(number, tuple(held), tuple(changed))
                number, held, changed, letters = number + 1, [], [], 0
        if held:
            yield Part(number, tuple(held), tuple(changed))

    def _is_needed(self, document: Document, changed: list[str]) -> bool:
        if document.doc_id in self._seen:
            raise PrimaError(f"the document {document.doc_id} comes twice", mend="Give each text an id of its own.")
        self._seen.add(document.doc_id)
        known = self.left.pop(document.doc_id, None)
        if known is None:
            self.num_added += 1
        elif known == document_hash(document):
            self.num_unchanged += 1
            return False
        else:
            self.num_changed += 1
            changed.append(document.doc_id)
        return True


class _Writer:
    """The table, opened or made, and the commit."""

    def __init__(self, folder: str | Path, config: IndexConfig, embedder: Embedder) -> None:
        self._folder = Path(folder)
        self._config = config
        self._identity = embedder.identity
        database = open_database(folder)
        self._meta = read_meta(folder)
        schema = index_schema(embedder.width, config, embedder.identity)
        try:
            self._table = database.create_table(TABLE, schema=schema)
        except ValueError:  # it is there: of a finished index, or of a build that was broken off
            self._table = database.open_table(TABLE)
            self._check(json.loads(self._table.schema.metadata[_IDENTITY]))

    def _check(self, built: dict[str, Any]) -> None:
        refuse_another_encoder(
            self._folder, built=EncoderIdentity.model_validate(built["encoder"]), wanted=self._identity
        )
        for key, value in self._config.chunks.model_dump(mode="json").items():
            if built["chunks"].get(key) != value:
                raise PrimaError(
                    f"the index was made with chunks.{key} {built['chunks'].get(key)}, the config says {value}",
                    where=self._folder,
                    mend="Set it as it was, or build an index in another folder.",
                )

    def document_hashes(self) -> dict[str, str]:
        """Hash by id of every document in the table, finished or not: parts hold whole documents."""
        found: dict[str, str] = {}
        for batch in self._scan("doc_id", "document_hash"):
            found.update(zip(batch["doc_id"].to_pylist(), batch["document_hash"].to_pylist(), strict=True))
        return found

    def _scan(self, *columns: str, row_ids: bool = False) -> Iterator[pa.RecordBatch]:
        query = self._table.search().select(list(columns)).limit(max(1, self._table.count_rows()))
        yield from (query.with_row_id(True) if row_ids else query).to_batches()

    def commit(self, rows: pa.Table, changed: tuple[str, ...]) -> None:
        """Add a part's rows and drop what else there is of its changed documents, in one transaction."""
        if not changed:
            self._table.add(rows)
            return
        merge = self._table.merge_insert("chunk_id").when_matched_update_all().when_not_matched_insert_all()
        merge.when_not_matched_by_source_delete(f"doc_id IN ({quoted(changed)})").execute(rows)

    def delete(self, doc_ids: list[str]) -> None:
        """Drop documents."""
        if doc_ids:
            self._table.delete(f"doc_id IN ({quoted(doc_ids)})")

    def finish(self) -> None:
        """Make the table's state the one that readers see; nothing where it is already."""
        meta = self._meta
        if meta is not None and (meta.table_version, meta.bm25) == (self._table.version, self._config.bm25):
            return
        # Small files of many parts become few. Nothing is thrown away yet: `index.json` names the state before.
        self._table.optimize(cleanup_older_than=_NEVER)
        version = self._table.version
        folder = _BM25.format(version=version)
        documents, by_source = self._write_bm25(self._folder / folder)
        meta = IndexMeta(
            schema_version=SCHEMA_VERSION,
            encoder=self._identity,
            chunks=self._config.chunks,
            bm25=self._config.bm25,
            table_version=version,
            bm25_folder=folder,
            num_documents=documents,
            num_chunks=sum(by_source.values()),
            num_chunks_by_source=dict(sorted(by_source.items())),
        )
        write_json(self._folder / INDEX, meta.model_dump(mode="json"))
        for old in self._folder.glob("bm25-*"):
            if old.name != folder:
                shutil.rmtree(old)
        self._table.optimize(cleanup_older_than=_GRACE)

    def _write_bm25(self, folder: Path) -> tuple[int, dict[str, int]]:
        """Build BM25 of all chunks; returns the number of documents, and of chunks by source."""
        shutil.rmtree(folder, ignore_errors=True)
        names: list[str] = []
        row_ids: list[int] = []
        documents: set[str] = set()
        by_source: dict[str, int] = {}

        def texts() -> Iterator[str]:
            for batch in self._scan(*CHUNK_SCHEMA.names, row_ids=True):
                row_ids.extend(batch["_rowid"].to_pylist())
                for row in batch.select(CHUNK_SCHEMA.names).to_pylist():
                    chunk = Chunk.model_validate(row)
                    names.append(chunk.chunk_id)
                    documents.add(chunk.doc_id)
                    by_source[chunk.source] = by_source.get(chunk.source, 0) + 1
                    yield searchable(chunk, self._config.chunks)

        Bm25.build(texts(), self._config.bm25).save(folder)
        pq.write_table(
            pa.table({"chunk_id": pa.array(names, pa.string()), "row_id": pa.array(row_ids, pa.uint64())}),
            folder / ROWS,
        )
        return len(documents), by_source
