from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import Document, clean_text, is_address, iso_date, make_document


def document(**keys: Any) -> Document:
    return make_document(**{"doc_id": "d1", "title": "Nevi", "source": "here", "sections": [(("A",), "x")], **keys})


def rejection(**keys: Any) -> str:
    with pytest.raises(RecordRejected) as caught:
        document(**keys)
    return str(caught.value)


def test_a_document_says_where_it_comes_from_and_survives_a_file():
    made = document(
        title=" Nevi\n and moles ",
        url="https://example.org/a",
        date="2025-05-08T10:00:00Z",
        licence="CC BY 4.0",
        sections=[((" A ", "", "B\nC"), "one\r\n\r\n\r\n\r\ntwo  \n"), (("D",), " \n "), ((), "three")],
    )
    assert (made.doc_id, made.title, made.source) == ("d1", "Nevi and moles", "here")
    assert (made.url, made.date, made.licence) == ("https://example.org/a", "2025-05-08", "CC BY 4.0")
    assert [(item.heading, item.text) for item in made.sections] == [(("A", "B C"), "one\n\ntwo"), ((), "three")]
    assert Document.model_validate_json(made.model_dump_json()) == made
    assert document(title=" ").title == "d1"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"sections": [(("A",), " \n\ufeff")]}, "no_text: the record holds no text"),
        ({"sections": [((), "a\ud800")]}, "bad_characters: half of a surrogate pair, which is no character"),
        ({"url": "javascript:alert(1)"}, "bad_address: 'javascript:alert(1)' is no http(s) address"),
        ({"date": "May 2025"}, "bad_date: 'May 2025' is no date such as 2025, 2025-05 or 2025-05-08"),
    ],
)
def test_what_no_document_can_hold_is_turned_away(keys: dict[str, Any], expected: str):
    assert rejection(**keys) == expected


def test_the_hash_is_of_headings_and_texts_alone():
    first = document(sections=[(("Caf\u00e9",), "one  two\nthree")])
    assert len(first.content_hash) == 64
    for same in (
        document(sections=[(("Cafe\u0301",), "one two three ")]),
        document(doc_id="d2", title="Other", url="https://example.org", sections=[(("Caf\u00e9",), "one two three")]),
    ):
        assert same.content_hash == first.content_hash
    for other in (
        document(sections=[(("Caf\u00e9",), "One two three")]),
        document(sections=[((), "one two three")]),
        document(sections=[(("Caf\u00e9",), "one two"), (("Caf\u00e9",), "three")]),
    ):
        assert other.content_hash != first.content_hash


def test_controls_become_spaces_and_line_ends_one_kind():
    assert clean_text("\ufeffa\x00b\x07\tc\rd\u2028e\x85f\n\n\n\ng ") == "a b \tc\nd\ne\nf\n\ng"


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str):
    try:
        cleaned = clean_text(text)
    except RecordRejected:
        return
    assert clean_text(cleaned) == cleaned
    assert cleaned.encode().decode() == cleaned


@pytest.mark.parametrize("text", ["2025", "2025-05", "2025-05-08", " 2025-05-08 "])
def test_dates_are_iso(text: str):
    assert iso_date(text) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "25",
        "2025-13",
        "2025-5",
        "2025-05-32",
        "2025-02-29",
        "0000",
        "\uff12\uff10\uff12\uff15",
        "08.05.2025",
        "2025-05-08x",
    ],
)
def test_other_dates_are_refused(text: str):
    with pytest.raises(RecordRejected, match="bad_date"):
        iso_date(text)


def test_an_address_is_one_that_a_browser_follows():
    assert is_address("https://example.org/a?b=c")
    assert not any(map(is_address, ("", "example.org", "file:///etc/passwd", "https://", "https://a b")))
