"""The record that every literature format becomes, and the record of what was turned away.

A document says where it comes from (source, address, date, licence), so that a sentence of the corpus can be traced to
it; its content hash says whether the same text was read before, under whatever name.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
from pydantic import Field

from prima_ray.base import StrictConfig, hash_json
from prima_ray.data.rejection import RecordRejected

QUARANTINE_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("path", pa.string()),
        ("locator", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""One row a rejected record: `locator` is where in the file (a line, a page, a PMID), null for the file as a whole."""

_DATE = re.compile(r"^\d{4}(?:-\d\d){0,2}$", re.ASCII)
_TIME = re.compile(r"^(\d{4}-\d\d-\d\d)[T ]\d\d:\d\d", re.ASCII)
_ADDRESS = re.compile(r"^https?://[^\s/]+\S*$", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\n{3,}")
_MARK = "\ufeff"


class Section(StrictConfig):
    """A piece of a document under one heading."""

    heading: tuple[str, ...]
    """The headings above the text, outermost first; empty where there are none."""
    text: str


class Document(StrictConfig):
    """A text of the literature and where it comes from."""

    doc_id: str = Field(min_length=1)
    """What the format calls it (a record's key, `PMID:...`, `PMC...`), else the source and the file's path in it."""
    title: str
    source: str = Field(min_length=1)
    url: str | None
    date: str | None
    """ISO 8601: a year, a month or a day."""
    licence: str | None
    sections: tuple[Section, ...] = Field(min_length=1)
    content_hash: str
    """Of headings and texts alone: equal for the same text under another id, title, address or file name."""


QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "path", "locator", "reason", "detail")])


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file, or a record in one, that does not become a document: a short fixed reason and what was seen."""

    source: str
    path: str
    locator: str | None
    reason: str
    detail: str


def make_document(
    *,
    doc_id: str,
    title: str,
    source: str,
    sections: Iterable[tuple[Iterable[str], str]],
    url: str | None = None,
    date: str | None = None,
    licence: str | None = None,
) -> Document:
    """A document of cleaned texts. Sections without text are left out; a document without a title is called by its id.

    Args:
        sections: heading path and text of each.

    Raises:
        RecordRejected: `no_text`, `bad_characters`, `bad_address` or `bad_date`.
    """
    kept = []
    for heading, text in sections:
        cleaned = clean_text(text)
        if cleaned:
            kept.append(Section(heading=tuple(name for name in map(clean_line, heading) if name), text=cleaned))
    if not kept:
        raise RecordRejected("no_text", "the record holds no text")
    if url is not None and not is_address(url):
        raise RecordRejected("bad_address", f"{_short(url)} is no http(s) address")
    doc_id = clean_line(doc_id)
    return Document(
        doc_id=doc_id,
        title=clean_line(title) or doc_id,
        source=source,
        url=url,
        date=None if date is None else iso_date(date),
        licence=clean_line(licence or "") or None,
        sections=tuple(kept),
        content_hash=content_hash(kept),
    )


def content_hash(sections: Iterable[Section]) -> str:
    """SHA-256 of headings and texts, whatever their white space and the way their accents are written."""
    return hash_json([[[*map(_normalise, item.heading)], _normalise(item.text)] for item in sections])


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_text(text: str) -> str:
    """Text without control characters, with ``\\n`` for every line end and at most one empty line in a row.

    Raises:
        RecordRejected: half of a surrogate pair, which no file can hold.
    """
    if _SURROGATE.search(text):
        raise RecordRejected("bad_characters", "half of a surrogate pair, which is no character")
    text = _CONTROL.sub(" ", _LINE_ENDS.sub("\n", text.replace(_MARK, "")))
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def clean_line(text: str) -> str:
    """The same on one line, for titles and headings."""
    return " ".join(clean_text(text).split())


def is_address(text: str) -> bool:
    """True for an ``http://`` or ``https://`` address: it will be shown as a link."""
    return bool(_ADDRESS.match(text))


def iso_date(text: str) -> str:
    """A year, month or day as it stands; of a time stamp the day.

    Raises:
        RecordRejected: anything else.
    """
    text = text.strip()
    stamp = _TIME.match(text)
    day = stamp[1] if stamp else text
    if not _DATE.match(day) or not _is_day(f"{day}-01-01"[:10]):
        raise RecordRejected("bad_date", f"{_short(text)} is no date such as 2025, 2025-05 or 2025-05-08")
    return day


def _is_day(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
