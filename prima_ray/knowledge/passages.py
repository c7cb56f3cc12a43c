"""Where the words of a quote stand in a passage: letter for letter, but for white space.

Passages and quotes are other people's text: nothing here, and nothing that shows them, may take them for more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_REORDERING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def find_quote(text: str, quote: str) -> tuple[int, int] | None:
    """Start and end of the quote's first place in the text; None where it does not stand there."""
    words = quote.split()
    if not words:
        return None
    found = re.search(r"\s+".join(map(re.escape, words)), text)
    return found.span() if found else None


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
