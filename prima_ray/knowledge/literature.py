"""Literature -> documents: every source of the config, each text once, and only of sources that are allowed.

Nothing is lost: a record becomes a document, or is counted as a duplicate, or is quarantined with a reason. Large files
are streamed; what is remembered of a document is its id and its hash.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from prima_ray.base import StrictConfig
from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import Document, Quarantined
from prima_ray.knowledge.files import SourceFile, find_files
from prima_ray.knowledge.readers.jats import JatsSource, read_jats
from prima_ray.knowledge.readers.jsonl import JsonLinesSource, read_jsonl
from prima_ray.knowledge.readers.pdf import PdfSource, read_pdf
from prima_ray.knowledge.readers.pubmed import PubMedSource, read_pubmed
from prima_ray.knowledge.readers.source import LimitsConfig, LiteratureSource, Record
from prima_ray.knowledge.readers.text import TextSource, read_text

_log = logging.getLogger(__name__)

LiteratureSourceConfig = Annotated[
    JsonLinesSource | TextSource | PdfSource | PubMedSource | JatsSource, Field(discriminator="kind")
]
_READERS: dict[type[LiteratureSource], Callable[[SourceFile, Any, LimitsConfig], Iterator[Record]]] = {
    JsonLinesSource: read_jsonl,
    TextSource: read_text,
    PdfSource: read_pdf,
    PubMedSource: read_pubmed,
    JatsSource: read_jats,
}


class LiteratureConfig(StrictConfig):
    """What is read, and what of it may enter the corpus."""

    sources: tuple[LiteratureSourceConfig, ...]
    """In the order in which they are read: of two versions of a document the first counts."""
    allow: tuple[str, ...]
    """The names of the sources that may enter the corpus. A file whose only name is not among them is not opened."""
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _names_fit(self) -> LiteratureConfig:
        # Not by min_length: pydantic would complain of its lack, too, where an entry has a mistake.
        if not self.sources:
            raise ValueError("sources: none is listed")
        if not self.allow:
            raise ValueError("allow: no source is listed, so that nothing could be read")
        names = [item.source for item in self.sources]
        for name in self.allow:
            if name not in names and not any(_names_its_own(item) for item in self.sources):
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"the sources are {', '.join(dict.fromkeys(names))}"
                raise ValueError(f"allow: {name!r} is the name of no source; {hint}")
        return self


def sources_by_key(config: StrictConfig) -> dict[str, LiteratureSource]:
    """The sources of a stage's config, by the keys of their paths: `literature.sources.0.path`; none of most stages."""
    literature = getattr(config, "literature", None)
    if not isinstance(literature, LiteratureConfig):
        return {}
    return {f"literature.sources.{number}.path": item for number, item in enumerate(literature.sources)}


def _names_its_own(source: LiteratureSource) -> bool:
    return isinstance(source, JsonLinesSource) and source.columns.source is not None


def read_literature(config: LiteratureConfig) -> Reading:
    """Find the files of all sources; they are read as the result is iterated over.

    Raises:
        PrimaError: a source's path names nothing.
    """
    return Reading(
        config,
        [
            (source, find_files(source.path, source.suffixes, key=f"sources.{index}.path"))
            for index, source in enumerate(config.sources)
        ],
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    content_hash: bytes
    path: str
    where: str | None


class Reading:
    """Documents as they are read, to be iterated over once; what was turned away, and counts, which grow on the way."""

    def __init__(
        self, config: LiteratureConfig, files: Sequence[tuple[LiteratureSource, Sequence[SourceFile]]]
    ) -> None:
        self.config = config
        self.quarantined: list[Quarantined] = []
        self.num_documents: Counter[str] = Counter()
        """By source."""
        self.num_duplicates: Counter[str] = Counter()
        """By source: documents whose text was read before, and which were dropped."""
        self._by_id: dict[str, _Seen] = {}
        self._hashes: set[bytes] = set()
        self._documents = self._read(files)

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def _read(self, files: Sequence[tuple[LiteratureSource, Sequence[SourceFile]]]) -> Iterator[Document]:
        for source, found in files:
            for file in found:
                yield from self._file(source, file)
        for name in self.config.allow:
            if not self.num_documents[name] and not self.num_duplicates[name]:
                _log.warning("allow: no document of the source %r was read", name)

    def _file(self, source: LiteratureSource, file: SourceFile) -> Iterator[Document]:
        try:
            if not _names_its_own(source):
                self._check_allowed(source.source)
            if file.leaves:
                raise RecordRejected("path_outside", "the file is a link that leaves the folder")
            for where, item in _READERS[type(source)](file, source, self.config.limits):
                try:
                    if isinstance(item, RecordRejected):
                        raise item
                    self._check_allowed(item.source)
                    if self._is_new(item, source, file, where):
                        self.num_documents[item.source] += 1
                        yield item
                    else:
                        self.num_duplicates[item.source] += 1
                except RecordRejected as error:
                    self._reject(error, source, file, where)
        except RecordRejected as error:
            self._reject(error, source, file, None)

    def _reject(self, error: RecordRejected, source: LiteratureSource, file: SourceFile, where: str | None) -> None:
        self.quarantined.append(Quarantined(source.source, file.path, where, error.reason, error.detail))

    def _check_allowed(self, name: str) -> None:
        if name not in self.config.allow:
            raise RecordRejected("source_not_allowed", f"the source {name!r} is not in allow")

    def _is_new(self, document: Document, source: LiteratureSource, file: SourceFile, where: str | None) -> bool:
        """False for a text that was read before, under whatever id.

        Raises:
            RecordRejected: the id was read before, with another text. Nobody here knows which of the two is right: the
                first was handed on already, and a person wrote (`sources`) or sees (names of files) the order.
        """
        content = bytes.fromhex(document.content_hash)
        first = self._by_id.setdefault(document.doc_id, _Seen(content, file.path, where))
        if content in self._hashes:
            return False
        if first.content_hash != content:
            place = f"{first.path}, {first.where}" if first.where else first.path
            detail = f"{document.doc_id} was read before with another text ({place})"
            if isinstance(source, JsonLinesSource) and first.path == file.path:
                detail += "; the lines of a document must follow each other"
            raise RecordRejected("conflicting_document", detail)
        self._hashes.add(content)
        return True
