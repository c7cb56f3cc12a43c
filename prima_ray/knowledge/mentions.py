"""Terms of the vocabulary -> where a text mentions them.

A term is a few words, as in `family history`. Case is ignored, except in a word of capitals alone (an abbreviation);
a space also matches a hyphen, a slash or a line end; the last word also matches its plural in -s or -es. `*` at the end
of a word stands for any letters, `...` for up to four words that are passed over: `family ... history` also finds
"family or personal history". No sentence mark is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Span = tuple[int, int]
"""Start and end of a piece of a text."""

_WORD = re.compile(r"[\w'\u2019.>]+\*?$")
_BETWEEN = r"(?:[\s/\u2013-]|,\s)+"
_GAP = rf"{_BETWEEN}(?:[\w'\u2019()-]+{_BETWEEN}){{0,4}}?"
_PLURAL = r"(?:e?s)?"


def check_term(term: str) -> str | None:
    """What is wrong with the way a term is written; None where it can be read."""
    words = term.split()
    if not words:
        return "is empty"
    if words[0] == "..." or words[-1] == "...":
        return "begins or ends with '...', which stands for words between two others"
    for word in words:
        for part in word.split("-"):
            if word != "..." and not _WORD.match(part):
                return f"holds {part!r}: a term is words, '*' at the end of one, and '...' between two"
    return None


def pattern(term: str) -> str:
    """The regular expression of a term, without what must stand around it."""
    words = term.replace("-", " ").split()
    text, glue = "", ""
    for index, word in enumerate(words):
        if word == "...":
            glue = _GAP
            continue
        text += glue + _word(word, last=index == len(words) - 1)
        glue = _BETWEEN
    return text


def _word(word: str, *, last: bool) -> str:
    if word.endswith("*"):
        return re.escape(word[:-1]) + r"\w*"
    text = re.escape(word)
    if len(word) > 1 and word.isupper():
        text = f"(?-i:{text})"
    return text + _PLURAL if last and word[-1].isalpha() else text


@dataclass(frozen=True, slots=True)
class Terms:
    """Compiled terms and the wordings in which they mean something else."""

    wanted: re.Pattern[str] | None
    unwanted: re.Pattern[str] | None

    def find(self, text: str) -> tuple[Span, ...]:
        """Where the text mentions one of them."""
        if self.wanted is None:
            return ()
        found = [match.span() for match in self.wanted.finditer(text)]
        if found and self.unwanted is not None:
            masked = [match.span() for match in self.unwanted.finditer(text)]
            found = [span for span in found if not overlaps(span, masked)]
        return tuple(found)


def compile_terms(terms: Iterable[str], but_not: Iterable[str] = ()) -> Terms:
    """Terms that are searched together; longer ones are tried first."""
    return Terms(_any_of(terms), _any_of(but_not))


def _any_of(terms: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted(dict.fromkeys(terms), key=lambda term: (-len(term), term))
    # Not \b: a term may begin with a sign, as ">6 mm" does. Around all of them, not each: asked once a letter.
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(pattern, ordered))})(?!\w)", re.IGNORECASE) if ordered else None


def overlaps(span: Span, others: Iterable[Span]) -> bool:
    """True where the span shares a character with one of the others."""
    return any(span[0] < end and start < span[1] for start, end in others)
