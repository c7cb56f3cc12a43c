"""PDFs -> documents, a section a page, by pypdf. Scanned pages hold no text and are named.

pypdf bounds what a stream may unpack to; bytes, pages and text are bounded here.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import clean_line, make_document
from prima_ray.knowledge.files import SourceFile, other_kind
from prima_ray.knowledge.readers.lines import unwrapped
from prima_ray.knowledge.readers.source import LimitsConfig, LiteratureSource, Record

if TYPE_CHECKING:
    from pypdf import PageObject, PdfReader

_END = b"%%EOF"
_END_WITHIN = 4096
"""Bytes at the end of a PDF in which its end mark stands, whatever a mail program has added."""
_SHOWN = 10


class PdfSource(LiteratureSource):
    """PDFs. Their own creation date says when the file was made, not when the text appeared: `date` is the config's."""

    suffixes: ClassVar[tuple[str, ...]] = (".pdf",)

    kind: Literal["pdf"]


def read_pdf(file: SourceFile, source: PdfSource, limits: LimitsConfig) -> Iterator[Record]:
    """The document that the file is, then a rejection that names its scanned pages, if it has any.

    Raises:
        RecordRejected: no PDF, encrypted, truncated, damaged, without text, or over a bound.
    """
    data = file.read(limits.max_pdf_bytes, key="limits.max_pdf_bytes")
    kind = other_kind(data[:64], but=("a PDF",))
    # The header may stand behind some bytes of something else.
    if kind is not None or b"%PDF-" not in data[:1024]:
        raise RecordRejected("other_kind", f"the file is {kind or 'something else'}, not a PDF")
    if _END not in data[-_END_WITHIN:]:
        raise RecordRejected("truncated", "the end mark of the PDF is missing: the file was cut off; fetch it again")
    try:
        title, pages, scanned = _read(data, limits)
    except RecordRejected:
        raise
    except RecursionError:
        raise RecordRejected("broken_pdf", "objects nested too deeply") from None
    except Exception as error:  # pypdf lets whatever a damaged object causes through
        raise RecordRejected("broken_pdf", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]) from None
    if not pages:
        detail = "no page holds text"
        if scanned:
            detail = f"no text: {_named(scanned)} hold pictures only; run OCR on it first (ocrmypdf, say)"
        raise RecordRejected("no_text", detail)
    document = make_document(
        doc_id=f"{source.source}/{file.name}",
        title=title or file.stem,
        source=source.source,
        url=source.url,
        date=source.date,
        licence=source.licence,
        sections=pages,
    )
    yield None, document
    if scanned:
        yield _named(scanned), RecordRejected("no_text", "pictures only; run OCR on the PDF first (ocrmypdf, say)")


def _read(data: bytes, limits: LimitsConfig) -> tuple[str, list[tuple[tuple[str, ...], str]], list[int]]:
    """Title, pages with text, and the numbers of those with pictures only."""
    import pypdf

    # Whatever it could mend it tells; what it could not comes as an exception.
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    reader = pypdf.PdfReader(io.BytesIO(data))
    if reader.is_encrypted:
        raise RecordRejected("encrypted", "the PDF is encrypted; save it without a password (qpdf --decrypt, say)")
    num_pages = len(reader.pages)
    if num_pages > limits.max_pages:
        raise RecordRejected(
            "too_large", f"{num_pages} pages, more than {limits.max_pages}, the bound in limits.max_pages"
        )
    pages: list[tuple[tuple[str, ...], str]] = []
    scanned: list[int] = []
    size = 0
    for number, page in enumerate(reader.pages, 1):
        text = _text(page)
        size += len(text.encode())
        if size > limits.max_document_bytes:
            raise limits.too_large()
        if text.strip():
            pages.append(((f"page {number}",), text))
        elif _has_picture(page):
            scanned.append(number)
    return _title(reader), pages, scanned


def _text(page: PageObject) -> str:
    # Fonts without a table of characters give halves of pairs, which no file can hold.
    return unwrapped(page.extract_text().replace("\0", "").encode(errors="ignore").decode())


def _has_picture(page: PageObject) -> bool:
    resources: Any = page.get("/Resources")
    objects: Any = resources.get_object().get("/XObject") if resources is not None else None
    if objects is None:
        return False
    return any(item.get_object().get("/Subtype") == "/Image" for item in objects.get_object().values())


def _title(reader: PdfReader) -> str:
    found: Any = reader.metadata.title if reader.metadata is not None else None
    return clean_line(str(found)) if found else ""


def _named(pages: list[int]) -> str:
    shown = ", ".join(map(str, pages[:_SHOWN]))
    more = f" and {len(pages) - _SHOWN} more" if len(pages) > _SHOWN else ""
    return f"{'page' if len(pages) == 1 else 'pages'} {shown}{more}"
