"""An index on disk: chunks and their vectors in a LanceDB table, BM25 beside it, and `index.json`, the commit.

`index.json` names the version of the table that it speaks of. LanceDB keeps older versions, so a reader sees the last
finished state while another process adds documents, and nothing of an update that was broken off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from prima_ray.base import PrimaError, StrictConfig, hash_json, is_uri, read_json
from prima_ray.knowledge.bm25 import Bm25, Bm25Config
from prima_ray.knowledge.chunks import CHUNK_SCHEMA, Chunk
from prima_ray.knowledge.embedding import EncoderConfig, EncoderIdentity, Vectors
from prima_ray.knowledge.splitting import ChunkConfig

INDEX = "index.json"
TABLE = "chunks"
ROWS = "rows.parquet"
SCHEMA_VERSION = 1
_COLUMNS = CHUNK_SCHEMA.names
_KNOWN_CHUNKS = 20_000
"""So many are held in memory once they were read: a writer's queries find the same ones again and again."""


class IndexConfig(StrictConfig):
    """How documents become an index."""

    encoder: EncoderConfig = EncoderConfig()
    chunks: ChunkConfig = ChunkConfig()
    bm25: Bm25Config = Bm25Config()

    @model_validator(mode="after")
    def _chunks_fit(self) -> Self:
        if self.chunks.max_tokens + 4 > self.encoder.max_tokens:
            raise ValueError(
                f"chunks.max_tokens is {self.chunks.max_tokens}, the encoder reads {self.encoder.max_tokens} tokens, "
                "special ones included: leave it 4 more at least"
            )
        return self


class IndexMeta(StrictConfig):
    """`index.json`."""

    schema_version: int
    encoder: EncoderIdentity
    chunks: ChunkConfig
    bm25: Bm25Config
    table_version: int
    bm25_folder: str
    num_documents: int
    num_chunks: int
    num_chunks_by_source: dict[str, int]


class Filter(StrictConfig):
    """Which chunks may be found; what is None allows all."""

    sources: tuple[str, ...] | None = None
    doc_ids: tuple[str, ...] | None = None
    licences: tuple[str, ...] | None = None
    since_year: int | None = Field(default=None, ge=1, le=9998)
    """Documents without a date are left out where a year is given."""
    until_year: int | None = Field(default=None, ge=1, le=9998)
    """The year itself is allowed."""

    def sql(self) -> str | None:
        """The condition for the table, None where everything is allowed."""
        parts = [
            _is_one_of(column, values)
            for column, values in (("source", self.sources), ("doc_id", self.doc_ids), ("licence", self.licences))
            if values is not None
        ]
        if self.since_year is not None:
            parts.append(f"date >= '{self.since_year:04}'")
        if self.until_year is not None:
            # Every date of the year begins with it, and comes before the next one: dates are ISO 8601.
            parts.append(f"date < '{self.until_year + 1:04}'")
        return " AND ".join(parts) or None


def quoted(values: Sequence[str]) -> str:
    """Texts as a list of SQL literals."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)


def _is_one_of(column: str, values: Sequence[str]) -> str:
    return f"{column} IN ({quoted(values)})" if values else "false"


def open_database(folder: str | Path) -> Any:
    """The LanceDB database in a folder.

    Raises:
        PrimaError: the folder is an address; the index is kept on a disk that every node can read.
    """
    if is_uri(str(folder)):
        raise PrimaError(
            "an index is a folder on a disk", where=folder, mend="Name a local folder, or one that all nodes mount."
        )
    import lancedb

    return lancedb.connect(str(folder))


def read_meta(folder: str | Path) -> IndexMeta | None:
    """`index.json`, None where no build has finished.

    Raises:
        PrimaError: it is damaged, or of another version.
    """
    path = Path(folder) / INDEX
    if not path.exists():
        return None
    found = read_json(path)
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        raise PrimaError(f"index schema {version}, this program reads {SCHEMA_VERSION}", where=path)
    try:
        return IndexMeta.model_validate(found)
    except ValidationError as error:
        raise PrimaError(f"damaged ({error.errors()[0]['msg']})", where=path) from None


def refuse_another_encoder(folder: str | Path, *, built: EncoderIdentity, wanted: EncoderIdentity) -> None:
    """Vectors of two encoders must never be compared.

    Raises:
        PrimaError: they are not the same.
    """
    if not built.same(wanted):
        raise PrimaError(
            f"the index was made with the encoder {built}, this is {wanted}",
            where=folder,
            mend="Name the encoder that it was made with, or build an index in another folder.",
        )


class Index:
    """The last finished state of an index, for reading."""

    def __init__(self, folder: str | Path, meta: IndexMeta, table: Any) -> None:
        self.folder = Path(folder)
        self.meta = meta
        self._table = table
        self._bm25: Bm25 | None = None
        rows = pq.read_table(self.folder / meta.bm25_folder / ROWS)
        self._row_ids: NDArray[np.uint64] = rows["row_id"].to_numpy()
        self._chunk_ids: list[str] = rows["chunk_id"].to_pylist()
        self._allowed: tuple[str, NDArray[np.bool_]] | None = None
        self._known: dict[str, Chunk] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open a finished index.

        Raises:
            PrimaError: there is none, or it is damaged.
        """
        database = open_database(folder)
        meta = read_meta(folder)
        if meta is None:
            raise PrimaError(
                "no finished index here (index.json is missing)",
                where=folder,
                mend="Build it; a build that was broken off goes on where it stopped.",
            )
        try:
            table = database.open_table(TABLE)
            table.checkout(meta.table_version)
            return cls(folder, meta, table)
        except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
            raise PrimaError(f"damaged ({str(error).splitlines()[0]})", where=folder) from None

    def chunks(self) -> Iterator[Chunk]:
        """All of them, in the table's order."""
        for batch in self._table.search().select(_COLUMNS).limit(max(1, len(self._row_ids))).to_batches():
            yield from map(_chunk, batch.to_pylist())

    def content_hash(self) -> str:
        """SHA-256 over every document's id and hash: the same for the same literature, however it came in."""
        query = self._table.search().select(["doc_id", "document_hash"]).limit(max(1, len(self._row_ids)))
        found: set[tuple[str, str]] = set()
        for batch in query.to_batches():
            found.update(zip(batch["doc_id"].to_pylist(), batch["document_hash"].to_pylist(), strict=True))
        return hash_json([self.meta.chunks.model_dump(mode="json"), sorted(found)])

    def nearest(self, vector: Vectors, *, k: int, where: Filter) -> list[tuple[Chunk, float]]:
        """The chunks whose vectors have the largest scalar products with this one; exact, all are looked at."""
        query = self._table.search(vector, vector_column_name="vector").distance_type("dot").limit(k)
        condition = where.sql()
        if condition is not None:
            query = query.where(condition, prefilter=True)
        rows = query.with_row_id(True).select(["chunk_id", "_distance"]).to_arrow()
        chunks = self._read(rows["chunk_id"].to_pylist(), rows["_rowid"].to_pylist())
        found = [(chunk, 1.0 - distance) for chunk, distance in zip(chunks, rows["_distance"].to_pylist(), strict=True)]
        return sorted(found, key=lambda item: (-item[1], item[0].chunk_id))

    def best_words(self, query: str, *, k: int, where: Filter) -> list[tuple[Chunk, float]]:
        """The chunks with the largest BM25 scores; none that shares no word with the query."""
        if self._bm25 is None:
            self._bm25 = Bm25.load(self.folder / self.meta.bm25_folder)
        scores = self._bm25.scores(query)
        condition = where.sql()
        if condition is not None:
            scores = np.where(self._mask(condition), scores, 0.0)
        places = np.flatnonzero(scores > 0)
        if len(places) > k:
            # All that tie with the last one stay in, so that the order below does not depend on the partition's.
            places = places[scores[places] >= np.partition(scores[places], -k)[-k]]
        best = sorted(places.tolist(), key=lambda place: (-scores[place], self._chunk_ids[place]))[:k]
        return list(zip(self._take(best), (float(scores[place]) for place in best), strict=True))

    def _mask(self, condition: str) -> NDArray[np.bool_]:
        # Remembered for the next query: a writer asks many with one filter.
        if self._allowed is None or self._allowed[0] != condition:
            query = self._table.search().where(condition).with_row_id(True).select(["chunk_id"])
            rows = query.limit(max(1, len(self._row_ids))).to_arrow()["_rowid"].to_numpy()
            self._allowed = condition, np.isin(self._row_ids, rows)
        return self._allowed[1]

    def _take(self, places: Sequence[int]) -> list[Chunk]:
        return self._read([self._chunk_ids[place] for place in places], [int(self._row_ids[place]) for place in places])

    def _read(self, chunk_ids: Sequence[str], row_ids: Sequence[int]) -> list[Chunk]:
        """Chunks by id, each with its row; those that were read lately are remembered."""
        found = {name: self._known[name] for name in chunk_ids if name in self._known}
        missing = [row for name, row in zip(chunk_ids, row_ids, strict=True) if name not in found]
        if missing:
            read = map(_chunk, self._table.take_row_ids(missing).select(_COLUMNS).to_arrow().to_pylist())
            found |= {chunk.chunk_id: chunk for chunk in read}
        # The latest last, and so kept longest.
        for name, chunk in found.items():
            self._known.pop(name, None)
            self._known[name] = chunk
        while len(self._known) > _KNOWN_CHUNKS:
            del self._known[next(iter(self._known))]
        return [found[name] for name in chunk_ids]


def _chunk(row: dict[str, Any]) -> Chunk:
    return Chunk.model_validate({name: row[name] for name in _COLUMNS})
