from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pypdf
import pytest
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject, NumberObject

from tests.unit.knowledge.reading import read, sections


def pdf(*pages: str | None, title: str | None = None, password: str | None = None, packed: bool = False) -> bytes:
    """A PDF with a line of text a page; None is a page with a picture, the empty text a blank one."""
    writer = pypdf.PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(300, 300)
        picture = DecodedStreamObject()
        picture.set_data(b"\0")
        for key, value in (("Width", 1), ("Height", 1), ("BitsPerComponent", 8)):
            picture[NameObject(f"/{key}")] = NumberObject(value)
        picture[NameObject("/Subtype")] = NameObject("/Image")
        picture[NameObject("/ColorSpace")] = NameObject("/DeviceGray")
        inside = {"/XObject": {"/P": writer._add_object(picture)}} if text is None else {"/Font": {"/F": font}}
        page[NameObject("/Resources")] = DictionaryObject(
            {
                NameObject(kind): DictionaryObject({NameObject(name): item for name, item in items.items()})
                for kind, items in inside.items()
            }
        )
        content = DecodedStreamObject()
        shown = (text or "").replace("(", r"\(").replace(")", r"\)")
        content.set_data(b"/P Do" if text is None else f"BT /F 12 Tf 20 200 Td ({shown}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(content.flate_encode() if packed else content)
    if title:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def one(tmp_path: Path, data: bytes, **keys: Any) -> Any:
    path = tmp_path / "report.v2.pdf"
    path.write_bytes(data)
    return read("pdf", path, **keys)


def test_pages_are_sections(tmp_path: Path):
    data = pdf("Sun (UV) raises the risk.", "", "Of melanoma.", title=" Skin\n cancer ")
    documents, rejected = one(tmp_path, data, url="https://example.org/r", date="2020-02", licence="CC BY")
    assert not rejected
    assert sections(documents[0]) == [(("page 1",), "Sun (UV) raises the risk."), (("page 3",), "Of melanoma.")]
    assert (documents[0].doc_id, documents[0].title) == ("here/report.v2.pdf", "Skin cancer")
    assert (documents[0].url, documents[0].date, documents[0].licence) == (
        "https://example.org/r",
        "2020-02",
        "CC BY",
    )
    assert one(tmp_path, pdf("x"))[0][0].title == "report.v2"


def test_scanned_pages_are_named(tmp_path: Path):
    documents, rejected = one(tmp_path, pdf(None, "text", None))
    assert [path for path, _ in sections(documents[0])] == [("page 2",)]
    assert rejected == [("pages 1, 3", "no_text", "pictures only; run OCR on the PDF first (ocrmypdf, say)")]


def test_bytes_before_the_header_and_after_the_end_do_no_harm(tmp_path: Path):
    documents, rejected = one(tmp_path, pdf("text") + b"\nmail footer\n" * 20)
    assert (len(documents), rejected) == (1, [])


WORD = "secret"
WHOLE = pdf("x" * 200, "y" * 200)


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "empty_file", "the file is empty"),
        (b"<html>not found</html>", "other_kind", "the file is a web page, not a PDF"),
        (b"plain text", "other_kind", "the file is something else, not a PDF"),
        (
            pdf("x", password=WORD),
            "encrypted",
            "the PDF is encrypted; save it without a password (qpdf --decrypt, say)",
        ),
        (pdf("x", password=""), "encrypted", "the PDF is encrypted; save it without a password (qpdf --decrypt, say)"),
        (WHOLE[:-200], "truncated", "the end mark of the PDF is missing: the file was cut off; fetch it again"),
        (pdf(None), "no_text", "no text: page 1 hold pictures only; run OCR on it first (ocrmypdf, say)"),
        (
            pdf(*[None] * 12),
            "no_text",
            "no text: pages 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more hold pictures only; "
            "run OCR on it first (ocrmypdf, say)",
        ),
        (pdf("", ""), "no_text", "no page holds text"),
        (pdf(*["x"] * 21), "too_large", "21 pages, more than 20, the bound in limits.max_pages"),
        (pdf("x" * 3000), "too_large", "more than 2000 bytes, the bound in limits.max_document_bytes"),
        (pdf("x") + b"\n" * 20_000, "too_large", "more than 20000 bytes, the bound in limits.max_pdf_bytes"),
    ],
)
def test_a_pdf_that_cannot_be_read_says_why(tmp_path: Path, data: bytes, reason: str, detail: str):
    limits = {"max_pages": 20, "max_document_bytes": 2000, "max_pdf_bytes": 20_000}
    assert one(tmp_path, data, limits=limits) == ([], [(None, reason, detail)])


def test_a_stream_that_unpacks_to_very_much_is_not_followed(tmp_path: Path):
    data = pdf(" " * 80_000_000, packed=True)
    assert len(data) < 200_000
    documents, rejected = one(tmp_path, data)
    assert not documents
    assert rejected[0][1] == "broken_pdf"
    assert "LimitReachedError" in rejected[0][2]


@pytest.mark.parametrize("cut", [20, 200, 400])
def test_damage_inside_never_becomes_an_exception(tmp_path: Path, cut: int):
    documents, rejected = one(tmp_path, WHOLE[:cut] + WHOLE[cut + 150 :])
    assert len(documents) + len(rejected) == 1


def test_an_object_that_is_its_own_parent(tmp_path: Path):
    data = (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[2 0 R]/Count 1>>endobj\n"
        b"trailer<</Root 1 0 R>>\n%%EOF"
    )
    documents, rejected = one(tmp_path, data)
    assert not documents
    assert rejected[0][1] in ("broken_pdf", "no_text")
