"""JSON lines -> documents: a record a line, whose keys the config names; `.gz` is unpacked on the way.

Lines of one document follow each other and are its sections. Of a file, only the document that is being read is held.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from prima_ray.base import StrictConfig
from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import clean_line, clean_text, iso_date, make_document
from prima_ray.knowledge.files import CHUNK, SourceFile, decode, other_kind
from prima_ray.knowledge.readers.source import LimitsConfig, LiteratureSource, Record


class JsonColumns(StrictConfig):
    """The keys of a record. Where one is null or absent in a record, the source's default counts."""

    document: tuple[str, ...] = Field(default=("doc_id",), min_length=1)
    """The keys that together name the document, joined by `#`."""
    text: str = "text"
    title: str | None = None
    heading: str | None = None
    """The heading of the text, or a list of the headings above it."""
    url: str | None = None
    date: str | None = None
    licence: str | None = None
    source: str | None = None
    """The name to which `allow` applies, where the records of a file come from several sources."""


class JsonLinesSource(LiteratureSource):
    """JSON lines of any keys."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    kind: Literal["jsonl"]
    columns: JsonColumns = JsonColumns()
    heading_separator: str | None = Field(default=None, min_length=1)
    """Between the headings, where they are one text: ``" > "``, say."""


@dataclass
class _Open:
    """The document whose lines are being read."""

    doc_id: str
    source: str
    first_line: int
    num_bytes: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    sections: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    too_large: bool = False


def read_jsonl(file: SourceFile, source: JsonLinesSource, limits: LimitsConfig) -> Iterator[Record]:
    """Documents of a file; a line that cannot be used is turned away alone.

    Raises:
        RecordRejected: the file is no JSON lines, or cannot be read to its end.
    """
    current: _Open | None = None
    for number, line in _lines(file, limits):
        where = f"line {number}"
        try:
            if isinstance(line, RecordRejected):
                raise line
            row = _parse(line)
            doc_id, name = _document_id(row, source), _text_of(row, source.columns.source) or source.source
            fields, section = _fields(row, source), _section(row, source)
        except RecordRejected as error:
            yield where, error
            continue
        if current is None or (current.doc_id, current.source) != (doc_id, name):
            if current is not None:
                yield _close(current, source, limits)
            current = _Open(doc_id, name, number)
        _add(current, fields, section, len(line), limits)
    if current is not None:
        yield _close(current, source, limits)


def _add(
    current: _Open, fields: dict[str, str], section: tuple[tuple[str, ...], str], size: int, limits: LimitsConfig
) -> None:
    current.num_bytes += size
    if current.num_bytes > limits.max_document_bytes:
        # Its further lines are read, to find where the next document begins, and not held.
        current.sections.clear()
        current.too_large = True
    else:
        current.fields = {**fields, **current.fields}
        current.sections.append(section)


def _close(current: _Open, source: JsonLinesSource, limits: LimitsConfig) -> Record:
    where = f"line {current.first_line}"
    if current.too_large:
        return where, limits.too_large()
    found = current.fields
    try:
        return where, make_document(
            doc_id=current.doc_id,
            title=found.get("title", ""),
            source=current.source,
            url=found.get("url", source.url),
            date=found.get("date", source.date),
            licence=found.get("licence", source.licence),
            sections=current.sections,
        )
    except RecordRejected as error:
        return where, error


def _lines(file: SourceFile, limits: LimitsConfig) -> Iterator[tuple[int, bytes | RecordRejected]]:
    """Lines that are not blank, with their numbers; one that is too long is passed over without being held."""
    number, held, too_long, at_start = 1, b"", False, True
    with file.open() as stream:
        while chunk := stream.read(CHUNK):
            if at_start:
                _check_kind(chunk)
                chunk, at_start = chunk.removeprefix(b"\xef\xbb\xbf"), False
            *whole, rest = (held + chunk).split(b"\n") if not too_long else chunk.split(b"\n")
            for line in whole:
                if too_long or len(line) > limits.max_document_bytes:
                    yield number, limits.too_large()
                elif line.strip():
                    yield number, line
                number, too_long = number + 1, False
            too_long = too_long or len(rest) > limits.max_document_bytes
            held = b"" if too_long else rest
    if at_start:
        raise RecordRejected("empty_file", "the file is empty")
    if too_long:
        yield number, limits.too_large()
    elif held.strip():
        yield number, held


def _check_kind(start: bytes) -> None:
    kind = other_kind(start)
    if kind is not None:
        raise RecordRejected("other_kind", f"the file is {kind}, not JSON lines")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise RecordRejected("other_kind", "the file is one JSON array; write a record a line: jq -c '.[]', say")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        decode(start)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(decode(line))
    except json.JSONDecodeError as error:
        raise RecordRejected("broken_json", f"{error.msg} (column {error.colno})") from None
    except RecursionError:
        raise RecordRejected("broken_json", "nested too deeply") from None
    except ValueError as error:
        # A number of thousands of digits.
        raise RecordRejected("broken_json", str(error).partition(";")[0]) from None
    if not isinstance(row, dict):
        raise RecordRejected("broken_json", f"a JSON {type(row).__name__}, not an object with keys")
    return row


def _text_of(row: Mapping[str, Any], key: str | None) -> str | None:
    """The value of a key as text; None where it is absent or empty."""
    value = row.get(key) if key is not None else None
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise RecordRejected("wrong_type", f"{key} holds a {type(value).__name__}, not text")
    return clean_text(value) or None


def _required(row: Mapping[str, Any], key: str, option: str) -> str:
    value = _text_of(row, key)
    if value is None:
        near = difflib.get_close_matches(key, [*row], n=1, cutoff=0.5) if key not in row else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecordRejected("missing_key", f"no value in {key} (columns.{option}){hint}")
    return value


def _document_id(row: Mapping[str, Any], source: JsonLinesSource) -> str:
    parts = [clean_line(_required(row, key, "document")) for key in source.columns.document]
    # ("a#b", "c") and ("a", "b#c") are two documents.
    return parts[0] if len(parts) == 1 else "#".join(part.replace("%", "%25").replace("#", "%23") for part in parts)


def _fields(row: Mapping[str, Any], source: JsonLinesSource) -> dict[str, str]:
    columns = source.columns
    keys = {"title": columns.title, "url": columns.url, "date": columns.date, "licence": columns.licence}
    found = {name: value for name, key in keys.items() if (value := _text_of(row, key)) is not None}
    if "date" in found:
        found["date"] = iso_date(found["date"])
    return found


def _section(row: Mapping[str, Any], source: JsonLinesSource) -> tuple[tuple[str, ...], str]:
    key = source.columns.heading
    heading = row.get(key) if key is not None else None
    if isinstance(heading, list) and all(isinstance(name, str) for name in heading):
        path = [clean_line(name) for name in heading]
    else:
        text = _text_of(row, key) or ""
        path = text.split(source.heading_separator) if source.heading_separator else [text]
    return tuple(name for name in path if name), _required(row, source.columns.text, "text")
