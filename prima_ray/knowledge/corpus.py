"""The files of a corpus: what is said of every factor and diagnosis, and the passages it rests on.

corpus.jsonl      an entry a line, as it was proposed; it stays so whatever is decided later
corpus.parquet    the same as a table
chunks.parquet    the passages
corpus.json       factors, diagnoses and a checksum of every file: written last, its presence means "complete"
vetting.jsonl     what people decided since, see `vetting`
book.html         all of it to be read, see `book`
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from prima_ray.base import PrimaError, StrictConfig, hash_file, hash_json, read_json, write_atomic, write_json
from prima_ray.knowledge.chunks import CHUNK_SCHEMA, Chunk
from prima_ray.knowledge.entries import Entry
from prima_ray.knowledge.passages import find_quote

CORPUS = "corpus.json"
ENTRIES = "corpus.jsonl"
TABLE = "corpus.parquet"
CHUNKS = "chunks.parquet"
CORPUS_VERSION = 1
CORPUS_SCHEMA = pa.schema(
    [
        ("factor", pa.string()),
        ("diagnosis", pa.string()),
        ("direction", pa.string()),
        ("strength", pa.string()),
        ("summary", pa.string()),
        ("status", pa.string()),
        (
            "statements",
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.string()),
                        ("quotes", pa.list_(pa.struct([("chunk_id", pa.string()), ("quote", pa.string())]))),
                    ]
                )
            ),
        ),
    ]
)
"""`corpus.parquet`."""

Role = Literal["risk", "sign", "site"]
_MEND = "Copy the corpus again, or make it again."
_REFERENCE = re.compile(r"\s*\[([^\[\]]+)\]")


class FactorLike(Protocol):
    """What the corpus needs to know of a risk factor."""

    @property
    def key(self) -> str: ...
    @property
    def phrase(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def attribute(self) -> str | None: ...
    @property
    def values(self) -> tuple[str | bool, ...]: ...


class FactorLink(StrictConfig):
    """A risk factor, and the attribute of the data set that records it, where one does."""

    key: str = Field(min_length=1)
    """As entries name it."""
    phrase: str
    role: Role = "risk"
    """A risk is there before the disease; a sign is how a lesion looks or feels, a site where it is."""
    attribute: str | None = None
    values: tuple[str, ...] = ()
    """The attribute's values that mean the factor; empty: any of them."""


class CorpusManifest(StrictConfig):
    """`corpus.json`."""

    version: int = CORPUS_VERSION
    factors: tuple[FactorLink, ...] = ()
    diagnoses: dict[str, str] = Field(default_factory=dict)
    """Name -> in words."""
    num_entries: int
    num_chunks: int
    files: dict[str, str]
    """Name -> SHA-256."""


@dataclass(frozen=True)
class Corpus:
    """A corpus that was read, without what was decided about it."""

    path: Path
    entries: tuple[Entry, ...]
    chunks: Mapping[str, Chunk]
    factors: tuple[FactorLink, ...]
    diagnoses: Mapping[str, str]
    hashes: Mapping[str, str]
    """Entry id -> hash of the entry as proposed and of what it cites."""

    def factor_phrase(self, key: str) -> str:
        return next((item.phrase for item in self.factors if item.key == key), key.replace("_", " "))

    def diagnosis_phrase(self, name: str) -> str:
        return self.diagnoses.get(name, name)


def wording_hash(entry: Entry) -> str:
    """SHA-256 of what an entry says and quotes, wherever the quotes stand and whatever its status."""
    return hash_json([*_said(entry), [[item.text, [part.quote for part in item.quotes]] for item in entry.statements]])


def _said(entry: Entry) -> list[str | None]:
    # By name, so that a field that is added to the record some day does not open every entry again.
    return [entry.factor, entry.diagnosis, entry.direction, entry.strength, entry.summary]


def entry_hash(entry: Entry, chunks: Mapping[str, Chunk]) -> str:
    """SHA-256 of the entry without its status, and of the passages it cites: what a person has before their eyes.

    A passage counts with document, heading and text. A new date or address of the same text changes nothing.
    """
    cited = [chunks[name] for name in cited_chunks(entry)]
    statements = [[item.text, [[quote.chunk_id, quote.quote] for quote in item.quotes]] for item in entry.statements]
    passages = [[item.chunk_id, item.doc_id, list(item.heading), item.text] for item in cited]
    return hash_json([*_said(entry), statements, passages])


def cited_chunks(entry: Entry) -> list[str]:
    """Chunk ids, each once, sorted."""
    return sorted({quote.chunk_id for item in entry.statements for quote in item.quotes})


def without_references(text: str, chunks: Container[str]) -> str:
    """A summary without the passages' ids in brackets, which say nothing to a reader; other brackets stay."""
    return _REFERENCE.sub(lambda found: "" if found[1] in chunks else found[0], text)


def cited_documents(entry: Entry, chunks: Mapping[str, Chunk]) -> list[str]:
    """Document ids, each once, sorted: an entry's sources."""
    return sorted({chunks[name].doc_id for name in cited_chunks(entry)})


def citation_problem(entry: Entry, chunks: Mapping[str, Chunk]) -> str | None:
    """What is wrong with the entry's citations, None where every quote stands in its passage."""
    for number, statement in enumerate(entry.statements, start=1):
        for quote in statement.quotes:
            if quote.chunk_id not in chunks:
                return f"statement {number} cites the passage {quote.chunk_id!r}, which the corpus does not hold"
            if find_quote(chunks[quote.chunk_id].text, quote.quote) is None:
                shown = quote.quote if len(quote.quote) <= 60 else f"{quote.quote[:57]}..."
                return f"statement {number} quotes {shown!r}, which does not stand in the passage {quote.chunk_id!r}"
    return None


def write_corpus(
    folder: str | Path,
    entries: Iterable[Entry],
    chunks: Iterable[Chunk],
    *,
    factors: Iterable[FactorLike] = (),
    diagnoses: Mapping[str, str] | None = None,
) -> None:
    """Write a corpus, or write it anew; a `vetting.jsonl` that is there stays, and what has changed is open again.

    Args:
        entries: as they are proposed.
        chunks: the cited ones at least.
        factors: in the order in which the book speaks of them.
        diagnoses: name -> in words, in that order too.

    Raises:
        ValueError: two entries or chunks of one id, or a quote that does not stand in its passage.
    """
    folder, rows, passages = Path(folder), tuple(entries), tuple(chunks)
    problem = _problem(rows, passages)
    if problem:
        raise ValueError(problem)
    # Whoever looks in now finds no corpus, not one half old and half new.
    (folder / CORPUS).unlink(missing_ok=True)
    dumped = [entry.model_dump(mode="json") for entry in rows]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in dumped)
    write_atomic(folder / ENTRIES, lines)
    write_atomic(folder / TABLE, _parquet(dumped, CORPUS_SCHEMA))
    write_atomic(folder / CHUNKS, _parquet([item.model_dump(mode="json") for item in passages], CHUNK_SCHEMA))
    manifest = CorpusManifest(
        factors=tuple(
            FactorLink(
                key=item.key,
                phrase=item.phrase,
                role=item.role,
                attribute=item.attribute,
                # As the shards spell them.
                values=tuple(str(value).lower() if isinstance(value, bool) else value for value in item.values),
            )
            for item in factors
        ),
        diagnoses=dict(diagnoses or {}),
        num_entries=len(rows),
        num_chunks=len(passages),
        files={name: hash_file(folder / name) for name in (ENTRIES, TABLE, CHUNKS)},
    )
    write_json(folder / CORPUS, manifest.model_dump(mode="json"))


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _problem(entries: tuple[Entry, ...], chunks: tuple[Chunk, ...]) -> str | None:
    by_id = {item.chunk_id: item for item in chunks}
    for what, names in (
        ("entry", [item.entry_id for item in entries]),
        ("passage", [item.chunk_id for item in chunks]),
    ):
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            return f"the {what} {twice!r} is there twice"
    for entry in entries:
        problem = citation_problem(entry, by_id)
        if problem:
            return f"{entry.entry_id}: {problem}"
    return None


def read_corpus(folder: str | Path) -> Corpus:
    """Read a corpus and check that it is whole.

    Raises:
        PrimaError: there is none, it is of another version, or a file is missing or is not what was written.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name in (ENTRIES, TABLE, CHUNKS):
        if not (folder / name).is_file():
            raise PrimaError("this file of the corpus is missing", where=folder / name, mend=_MEND)
        if manifest.files.get(name) != hash_file(folder / name):
            raise PrimaError(
                "damaged: this is not the file that was written (checksum)", where=folder / name, mend=_MEND
            )
    entries = tuple(_parse_entries(folder / ENTRIES))
    try:
        chunks = tuple(Chunk.model_validate(row) for row in pq.read_table(folder / CHUNKS).to_pylist())
    except (pa.ArrowException, ValidationError) as error:
        raise PrimaError(f"damaged: {_first_line(error)}", where=folder / CHUNKS, mend=_MEND) from None
    problem = _problem(entries, chunks)
    if problem:
        raise PrimaError(f"damaged: {problem}", where=folder, mend=_MEND)
    by_id = {item.chunk_id: item for item in chunks}
    return Corpus(
        path=folder,
        entries=entries,
        chunks=by_id,
        factors=manifest.factors,
        diagnoses=manifest.diagnoses,
        hashes={item.entry_id: entry_hash(item, by_id) for item in entries},
    )


def _read_manifest(folder: Path) -> CorpusManifest:
    if not (folder / CORPUS).is_file():
        what = "no complete corpus here (corpus.json is missing)" if folder.is_dir() else "no such corpus"
        raise PrimaError(what, where=folder, mend="Run `prima corpus` to make or complete it.")
    raw = read_json(folder / CORPUS)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != CORPUS_VERSION:
        raise PrimaError(
            f"a corpus of version {version}, this program reads version {CORPUS_VERSION}", where=folder / CORPUS
        )
    try:
        return CorpusManifest.model_validate(raw)
    except ValidationError as error:
        raise PrimaError(f"damaged: {_first_line(error)}", where=folder / CORPUS, mend=_MEND) from None


def _parse_entries(path: Path) -> Iterable[Entry]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            yield Entry.model_validate_json(line)
        except ValidationError as error:
            raise PrimaError(f"damaged: line {number}: {_first_line(error)}", where=path, mend=_MEND) from None


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        return f"{f'{key}: ' if key else ''}{first['msg']}"
    return " ".join(str(error).split())
