from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.knowledge.reading import read, sections

COLUMNS = {"document": ["id"], "title": "title", "heading": "section", "text": "text", "url": "url", "date": "day"}


def row(number: int = 1, **keys: Any) -> dict[str, Any]:
    return {"id": f"d{number}", "section": "A > B", "text": f"text {number}", **keys}


def write(path: Path, *rows: dict[str, Any] | bytes) -> Path:
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def one(tmp_path: Path, *rows: dict[str, Any] | bytes, **keys: Any) -> Any:
    return read("jsonl", write(tmp_path / "a.jsonl", *rows), **{"columns": COLUMNS, **keys})


def test_lines_of_one_document_are_its_sections(tmp_path: Path):
    documents, rejected = one(
        tmp_path,
        row(1, title="", url=None, day="2024-01-02"),
        row(1, section=["C", "D > E"], text="more", title="One", day="2025"),
        {**row(2), "id": 2, "section": None},
        url="https://example.org",
        licence="CC0",
        heading_separator=" > ",
    )
    assert not rejected
    first, second = documents
    assert (first.doc_id, first.title, first.url, first.date, first.licence) == (
        "d1",
        "One",
        "https://example.org",
        "2024-01-02",
        "CC0",
    )
    assert sections(first) == [(("A", "B"), "text 1"), (("C", "D > E"), "more")]
    assert (second.doc_id, second.title, second.date, sections(second)) == ("2", "2", None, [((), "text 2")])


def test_several_keys_name_a_document_and_cannot_collide(tmp_path: Path):
    rows = [row(1, file="a#b", id="c"), row(2, file="a", id="b#c"), row(3, file="50%", id="x")]
    documents, _ = one(tmp_path, *rows, columns={**COLUMNS, "document": ["file", "id"]})
    assert [item.doc_id for item in documents] == ["a%23b#c", "a#b%23c", "50%25#x"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"id": "x", ', "broken_json", "Expecting property name enclosed in double quotes (column 13)"),
        (b'"text"', "broken_json", "a JSON str, not an object with keys"),
        (b"[" * 100_000, "broken_json", "nested too deeply"),
        (
            b"9" * 5000,
            "broken_json",
            "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits",
        ),
        (
            '{"id": "x", "text": "café"}'.encode("latin1"),
            "encoding",
            "not UTF-8 text (byte 0xe9 at 24); save it as UTF-8: iconv -f latin1 -t utf-8, say",
        ),
        (
            b'{"id": "x\0"}',
            "not_text",
            "the file holds NUL bytes: it is not text, or UTF-16; text must be UTF-8",
        ),
        ({"text": "x"}, "missing_key", "no value in id (columns.document)"),
        ({"id": "x", "texts": "x"}, "missing_key", "no value in text (columns.text); did you mean 'texts'?"),
        ({"id": "x", "text": " \u0000 "}, "missing_key", "no value in text (columns.text)"),
        ({"id": "x", "text": ["a"]}, "wrong_type", "text holds a list, not text"),
        ({"id": "x", "text": "x", "section": {}}, "wrong_type", "section holds a dict, not text"),
        ({"id": "x", "text": "\ud800"}, "bad_characters", "half of a surrogate pair, which is no character"),
        ({"id": "x", "text": "x", "day": "soon"}, "bad_date", "'soon' is no date such as 2025, 2025-05 or 2025-05-08"),
        ({"id": "x", "text": "x", "url": "x.org"}, "bad_address", "'x.org' is no http(s) address"),
        ({"id": "x", "text": "x" * 3000}, "too_large", "more than 2000 bytes, the bound in limits.max_document_bytes"),
    ],
)
def test_a_line_that_cannot_be_used_goes_alone(tmp_path: Path, line: Any, reason: str, detail: str):
    bound = 1_000_000 if isinstance(line, bytes) else 2000
    documents, rejected = one(tmp_path, row(1), b"", line, row(2), limits={"max_document_bytes": bound})
    assert rejected == [("line 3", reason, detail)]
    assert [item.doc_id for item in documents] == ["d1", "d2"]


def test_a_document_of_many_lines_is_bounded_as_well(tmp_path: Path):
    rows = [row(1, text="x" * 300) for _ in range(10)]
    documents, rejected = one(tmp_path, *rows, row(2), limits={"max_document_bytes": 2000})
    assert rejected == [("line 1", "too_large", "more than 2000 bytes, the bound in limits.max_document_bytes")]
    assert [item.doc_id for item in documents] == ["d2"]


def test_a_line_that_is_longer_than_what_is_read_at_once(tmp_path: Path):
    rows = [row(1, text="x" * 900_000), row(2, text="y" * 2_000_000), row(3), row(4, text="z" * 2_000_000)]
    documents, rejected = one(tmp_path, *rows, limits={"max_document_bytes": 1_000_000})
    assert [(item.doc_id, len(item.sections[0].text)) for item in documents] == [("d1", 900_000), ("d3", 6)]
    assert [where for where, _, _ in rejected] == ["line 2", "line 4"]


def test_a_mark_windows_line_ends_and_a_missing_last_one(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row(number)).encode() for number in (1, 2)))
    documents, rejected = read("jsonl", path, columns=COLUMNS)
    assert ([item.doc_id for item in documents], rejected) == (["d1", "d2"], [])


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "empty_file", "the file is empty"),
        (b'[\n{"id": 1}]', "other_kind", "the file is one JSON array; write a record a line: jq -c '.[]', say"),
        (b"%PDF-1.7\n", "other_kind", "the file is a PDF, not JSON lines"),
        (
            gzip.compress(b"{}"),
            "other_kind",
            "the file is gzip data whose name does not end in .gz, not JSON lines",
        ),
        ("{}\n".encode("utf-16"), "encoding", "UTF-16 text; save it as UTF-8: iconv -f utf-16 -t utf-8"),
    ],
)
def test_a_file_of_another_kind_is_turned_away_as_a_whole(tmp_path: Path, data: bytes, reason: str, detail: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert read("jsonl", path, columns=COLUMNS) == ([], [(None, reason, detail)])


def test_packed_lines_are_read_up_to_where_the_file_was_cut_off(tmp_path: Path):
    path = write(tmp_path / "a.jsonl.gz", *(row(number, text=os.urandom(200).hex()) for number in range(2000)))
    documents, rejected = read("jsonl", path, columns=COLUMNS)
    assert (len(documents), rejected) == (2000, [])
    path.write_bytes(path.read_bytes()[:-1000])
    documents, rejected = read("jsonl", path, columns=COLUMNS)
    assert 1000 < len(documents) < 2000
    assert [(where, reason) for where, reason, _ in rejected] == [(None, "unreadable_file")]
