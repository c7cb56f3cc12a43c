from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prima_ray.knowledge.readers.lines import unwrapped
from prima_ray.knowledge.readers.text import front_matter, markdown_sections
from tests.unit.knowledge.reading import read, sections

MARKDOWN = """Before.

# Nevi #
One
two.

## *Risk* [factors](https://example.org)

- a list
---
```python
# no heading
===
```
Text

~~~
## nor this
```
~~~

Set in
two lines
=========
<!-- ## hidden
# hidden -->
    # code

Sub `x`
---
> quote
---
#5 is no heading
####### nor this
***
Last
-
#### Deep
end
"""


def test_headings_of_both_kinds_give_paths():
    assert [(path, text.strip("\n")) for path, text in markdown_sections(MARKDOWN)] == [
        ((), "Before."),
        (("Nevi",), "One two."),
        (
            ("Nevi", "Risk factors"),
            "- a list\n---\n```python\n# no heading\n===\n```\nText\n\n~~~\n## nor this\n```\n~~~",
        ),
        (("Set in two lines",), "    # code"),
        (("Set in two lines", "Sub x"), "> quote\n---\n#5 is no heading ####### nor this\n***"),
        (("Set in two lines", "Last", "Deep"), "end"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "- item\n---\nend",
        "text\n- item\n---\nend",
        "1. item\n***\nend",
        "| a |\n---\nend",
        "text\n\n---\nend",
        "***\n---\nend",
        "```\nnever closed\n# x",
        "    code\n---\nend",
    ],
)
def test_what_looks_like_a_heading_and_is_none(text: str):
    assert markdown_sections(text) == [((), text)]


def test_a_level_may_be_skipped_and_a_heading_be_empty():
    assert markdown_sections("### A\na\n# B\nb\n#\nc\n## C\nd") == [
        (("A",), "a"),
        (("B",), "b"),
        ((), "c"),
        (("C",), "d"),
    ]


@pytest.mark.parametrize("name", ["C#", "C #x", "\\# x", "a * b", "snake_case_name"])
def test_signs_in_a_heading_that_are_no_markup(name: str):
    assert markdown_sections(f"# {name} ##\nx") == [((name.replace("\\", ""),), "x")]


@pytest.mark.parametrize(
    "text",
    [
        "#" + " " * 300_000 + "x",
        "# " + "[" * 300_000,
        "x" + " " * 300_000 + "\ny" + " \n" * 100_000 + "z",
        "# " + "*a" * 200_000,
        "- " * 200_000 + "x",
        "a\n" * 600 + "=\n" * 100_000 + "a",
    ],
)
def test_a_line_without_end_takes_no_time(text: str):
    (((), found),) = markdown_sections(text)
    assert found.split() == text.split()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Moles that\ngrow are\n  a sign.", "Moles that grow are a sign."),
        ("- an item\n  goes on\n- and ends", "- an item goes on\n- and ends"),
        ("A list:\n- one\n1. two\n\nText", "A list:\n- one\n1. two\n\nText"),
        ("a | b\n--- | ---\n1 | 2\ntext", "a | b\n--- | ---\n1 | 2\ntext"),
        ("one  \ntwo\\\nthree", "one  \ntwo\\\nthree"),
        ("```\na\nb\n```\nc\nd", "```\na\nb\n```\nc d"),
    ],
)
def test_lines_that_an_editor_broke_are_one(text: str, read: str):
    assert markdown_sections(text) == [((), read)]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Moles that\ngrow are\n a sign.\nso it is", "Moles that grow are a sign.\nso it is"),
        ("Signs:\nbleeding\nItching\n- pain", "Signs:\nbleeding\nItching\n- pain"),
        ("a | b\nc | d", "a | b\nc | d"),
        ("One\n\ntwo", "One\n\ntwo"),
    ],
)
def test_plain_lines_are_one_where_a_sentence_goes_on(text: str, read: str):
    assert unwrapped(text) == read


@given(st.text(alphabet="ab.:|(A \n\t", max_size=200))
def test_of_plain_lines_only_white_space_changes(text: str):
    assert unwrapped(text).split() == text.split()


@given(st.text(alphabet="#=-`~<!>|* \n\tab1."))
def test_words_are_kept_in_their_order(text: str):
    kept = [word for _, found in markdown_sections(text) for word in found.split()]
    rest = iter(text.split())
    assert all(word in rest for word in kept)


@pytest.mark.parametrize("front", ["[" * 5000, "? [a]\n: b", "date: 2025-06-31", "a: 1\na: 2", "x: " + "y" * 20_000])
def test_front_matter_that_is_none_is_text(front: str):
    text = f"---\n{front}\n---\nx"
    assert front_matter(text) == ({}, text)


def test_markdown_files(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.md").write_text(
        "\ufeff---\ntitle: From above\ndate: 2024-03-01\nurl: https://example.org/a\nlicense: CC0\n---\n# H\ntext\n"
    )
    (tmp_path / "b.md").write_text("---\nnot: [yaml\n---\n## H\nother\n")
    second, first = read("text", tmp_path, url="https://example.org", date="2020", licence="CC BY")[0]
    assert (first.doc_id, first.title, first.url, first.date, first.licence) == (
        "here/sub/a.md",
        "From above",
        "https://example.org/a",
        "2024-03-01",
        "CC0",
    )
    assert sections(first) == [(("H",), "text")]
    assert (second.doc_id, second.title, second.date, second.licence) == ("here/b.md", "H", "2020", "CC BY")


def test_front_matter_is_at_the_very_start():
    assert front_matter("---\na: 1\n---\nx") == ({"a": "1"}, "x")
    for text in ("x\n---\na: 1\n---\n", "---\n- a\n---\nx", "---\nno end", "---\n---\nx"):
        assert front_matter(text) == ({}, text)


def test_plain_text_is_one_section_of_paragraphs(tmp_path: Path):
    path = tmp_path / "leaflet 1.txt"
    path.write_bytes(b"# One\r\ntwo\r\n\r\n\r\n\r\nThree\x0c\n")
    documents, rejected = read("text", path)
    assert not rejected
    assert (documents[0].doc_id, documents[0].title) == ("here/leaflet 1.txt", "leaflet 1")
    assert sections(documents[0]) == [((), "# One two\n\nThree")]


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "empty_file", "the file is empty"),
        (b" \n\t\n", "no_text", "the record holds no text"),
        (b"<!doctype html><p>x", "other_kind", "the file is a web page, not text"),
        (b"\x89PNG\r\n", "other_kind", "the file is a picture, not text"),
        (b"a\0b", "not_text", "the file holds NUL bytes: it is not text, or UTF-16; text must be UTF-8"),
        (
            b"caf\xe9",
            "encoding",
            "not UTF-8 text (byte 0xe9 at 3); save it as UTF-8: iconv -f latin1 -t utf-8, say",
        ),
        (b"x" * 101, "too_large", "more than 100 bytes, the bound in limits.max_document_bytes"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "md"])
def test_what_is_no_text_is_turned_away(tmp_path: Path, suffix: str, data: bytes, reason: str, detail: str):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    assert read("text", path, limits={"max_document_bytes": 100}) == ([], [(None, reason, detail)])
