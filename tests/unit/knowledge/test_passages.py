from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prima_ray.knowledge.passages import find_quote, marked, spell_out


@pytest.mark.parametrize(
    ("quote", "found"),
    [
        ("risk of  melanoma", "risk\nof melanoma"),
        ("risk of", "risk\nof"),
        ("Risk", None),
        ("a.c", None),
        ("(x*)", "(x*)"),
        (" \n", None),
    ],
)
def test_quotes_are_found_letter_for_letter_up_to_white_space(quote: str, found: str | None):
    text = "The risk\nof melanoma: abc (x*)."
    span = find_quote(text, quote)
    assert (text[span[0] : span[1]] if span else None) == found


def test_quotes_that_overlap_or_touch_are_one_mark():
    assert marked("one two three four", ["two three", "three four", "nowhere"]) == [
        ("one ", False),
        ("two three four", True),
    ]
    assert marked("plain", []) == [("plain", False)]


@given(st.text("ab \n<", max_size=30), st.lists(st.text("ab \n<", max_size=4), max_size=4))
def test_the_pieces_are_the_text(text: str, quotes: list[str]):
    pieces = marked(text, quotes)
    assert "".join(piece for piece, _ in pieces) == text
    assert all(piece for piece, _ in pieces)


def test_characters_that_reorder_are_spelled_out():
    assert spell_out("low\u202eers\u2066") == "low[U+202E]ers[U+2066]"
