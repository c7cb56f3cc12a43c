"""Where the words of a quote stand in a passage.

Two measures. A quote that is kept stands there letter for letter, but for white space (`find_quote`). A quote that a
writer hands in may differ in typography and case (`find_words`): it is then replaced by the passage's own letters.

Passages and quotes are other people's text: nothing here, and nothing that shows them, may take them for more.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_REORDERING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_QUOTE_MARKS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032`\u00b4\u02bc", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
)
_DASHES = re.compile("[\u2010-\u2015\u2212]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
_CLUSTER = re.compile("(?s).[\u0300-\u036f]*")
_LONG = 20
"""Letters from which a quote may begin or end within a word."""


def find_quote(text: str, quote: str) -> tuple[int, int] | None:
    """Start and end of the quote's first place in the text; None where it does not stand there."""
    words = quote.split()
    if not words:
        return None
    found = re.search(r"\s+".join(map(re.escape, words)), text)
    return found.span() if found else None


def find_words(text: str, quote: str) -> tuple[int, int] | None:
    """Start and end of the quote's words in the text, in a row and whole: white space, case, typography apart.

    A long piece may begin or end within what looks like a word: items that run into each other ("over timebeing
    pale") are quoted one by one, and so many letters are no accident.
    """
    wanted = normalise(quote)
    if not wanted:
        return None
    left = r"(?<!\w)" if wanted[0].isalnum() else ""
    right = r"(?!\w)" if wanted[-1].isalnum() else ""
    plain, places = _normalised(text)
    found = re.search(left + re.escape(wanted) + right, plain)
    if found is None and len(wanted) >= _LONG:
        found = re.search(re.escape(wanted), plain)
    return (places[found.start()][0], places[found.end() - 1][1]) if found else None


def normalise(text: str) -> str:
    """One way of writing: NFKC, plain quotation marks and dashes, single blanks, lower case."""
    return _normalised(text)[0]


def _normalised(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text in one way of writing, and for each of its characters the place in the text that it comes from."""
    letters: list[str] = []
    places: list[tuple[int, int]] = []
    for cluster in _CLUSTER.finditer(text):
        written = _INVISIBLE.sub("", unicodedata.normalize("NFKC", cluster[0]).translate(_QUOTE_MARKS))
        for letter in _DASHES.sub("-", written).casefold():
            blank = letter.isspace()
            if blank and (not letters or letters[-1] == " "):
                continue
            letters.append(" " if blank else letter)
            places.append(cluster.span())
    if letters and letters[-1] == " ":
        letters.pop()
        places.pop()
    return "".join(letters), places


def marked(text: str, quotes: Iterable[str]) -> list[tuple[str, bool]]:
    """The text in pieces, in order; True on those that a quote covers. The pieces joined are the text."""
    spans = sorted(span for span in (find_quote(text, quote) for quote in quotes) if span)
    pieces: list[tuple[str, bool]] = []
    at = 0
    while spans:
        start, end = spans.pop(0)
        while spans and spans[0][0] <= end:
            end = max(end, spans.pop(0)[1])
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [piece for piece in [*pieces, (text[at:], False)] if piece[0]]


def spell_out(text: str) -> str:
    """Characters that reorder their neighbours are shown by name: a planted one could turn a sentence around."""
    return _REORDERING.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)
