"""What all readers share: the keys of every source, the bounds on what is read, and what a reader yields."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from prima_ray.base import InputPath, StrictConfig
from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import Document, is_address, iso_date

Record = tuple[str | None, Document | RecordRejected]
"""Where in the file (`line 3`, `PMID 123`; None: the whole of it), and the document, or why there is none."""


def _address(text: str) -> str:
    if not is_address(text):
        raise ValueError("must begin with http:// or https://")
    return text


def _date(text: str) -> str:
    try:
        return iso_date(text)
    except RecordRejected as error:
        raise ValueError(error.detail) from None


class LiteratureSource(StrictConfig):
    """The keys of every source. Address, date and licence are of those documents that do not bring their own."""

    suffixes: ClassVar[tuple[str, ...]]
    """Files that are taken where `path` is a folder; packed ones (``.gz``) as well."""

    path: InputPath
    """A file, a folder or a pattern (`*`, `?`, `**`); local, or a URI of any pyarrow filesystem."""
    source: str = Field(min_length=1, pattern=r"^\S(?:.*\S)?$")
    """The name that its documents carry, that `allow` allows."""
    url: Annotated[str, AfterValidator(_address)] | None = None
    date: Annotated[str, AfterValidator(_date)] | None = None
    licence: str | None = Field(default=None, min_length=1)


class LimitsConfig(StrictConfig):
    """How much is read of a stranger's file."""

    max_document_bytes: int = Field(default=10_000_000, ge=1)
    """What one document may take: a text file, the JSON lines of a document, an article's XML, the text of a PDF."""
    max_pdf_bytes: int = Field(default=200_000_000, ge=1)
    """A larger PDF is not opened; most of a PDF is pictures and fonts."""
    max_pages: int = Field(default=2000, ge=1)
    """Of a PDF."""

    def too_large(self) -> RecordRejected:
        """Why a document with more bytes is turned away."""
        return RecordRejected(
            "too_large", f"more than {self.max_document_bytes} bytes, the bound in limits.max_document_bytes"
        )
