"""A passage -> its sentences, each a piece of the passage letter for letter, and what a list or a heading lends them.

Literature is not prose alone. Lists lose their line ends (`Signs are: - a sore - a lump`), items run into each other
(`over timebeing pale`), and an item says nothing without the line that introduces it. So a sentence carries:

- `leads`: the lines that introduce the list it stands in, outermost first. A line in the list that introduces items of
  its own is added, since nothing tells where its items end; a reader goes by the innermost that says something. A lead
  brings along the sentence before it, which it may take up ("These include ...").
- `heading` and `title` of the passage: they say what is spoken of where the sentence does not.

A quote of an item is then two pieces, the lead and the item, each verbatim.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from prima_ray.knowledge.chunks import Chunk


@dataclass(frozen=True, slots=True)
class Lead:
    """A line that introduces a list."""

    text: str
    before: str | None
    """The sentence before it, in the same paragraph or the one above."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A piece of a passage that says one thing."""

    text: str
    leads: tuple[Lead, ...] = ()
    """None for prose."""


# An abbreviation before a stop, which then ends no sentence.
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|vs|cf|al|approx|ca|dr|mr|mrs|ms|prof|st|fig|figs|no|nos|vol|resp|incl|dept|u\.s|u\.k|ph\.d|spp?|"
    r"jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)|(?:^|[\s(])[a-z])\.$",
    re.IGNORECASE,
)
_INITIAL = re.compile(r"\b[A-Z]\.$")
# A stop and white space; or a stop that a capital follows at once, as where two lines were joined.
_BOUNDARY = re.compile(r"[.!?][\"”\u2019)\]]*(?:\s+(?=[^a-z\s])|(?<=[a-z)]\.)(?=[A-Z][a-z]))")
_ITEM_MARK = re.compile(r"^\s*(?:[-\u2013•*◦‣·]|\(?\d{1,2}[.)])\s+")
# Items on one line: a dash between blanks that follows a stop, a colon, or a line which cannot end here.
_DASH = re.compile(r"\s+[-\u2013•]\s+")
_STOP_END = re.compile(r"[.!?][\"”\u2019)\]]*$")
_OPEN_END = re.compile(
    r"(?:\b(?:includ(?:e|es|ing)|are|is|following|who|that|which|if|with|have|has|such as|as|when)|:)\s*$",
    re.IGNORECASE,
)
_GLUED_LIST = re.compile(r":(?=[A-Za-z])")
# Participles that begin the next item of a list whose line ends are gone: "... over timebeing pale".
_GLUED_ITEM = re.compile(r"(?<=[a-z]{3})(?=(?:having|being|using|taking)\s[a-z])")


def split_passage(chunk: Chunk) -> tuple[Sentence, ...]:
    """The sentences of a passage, in its order."""
    return split_text(chunk.text)


def split_text(text: str) -> tuple[Sentence, ...]:
    """The same of a text alone."""
    found: list[Sentence] = []
    leads: tuple[Lead, ...] = ()
    for line in text.split("\n"):
        mark = _ITEM_MARK.match(line)
        if mark is None:
            leads = ()
        pieces = _pieces(line[mark.end() :] if mark else line)
        for index, piece in enumerate(pieces):
            sentences = list(_sentences(piece))
            if not sentences:
                continue
            dash_follows = index < len(pieces) - 1
            # Where line ends are lost, the last item runs on into prose, at whose end another list may begin.
            runs_on = index > 0 and len(sentences) > 1 and (not dash_follows or (len(sentences) > 2 and _open(piece)))
            for position, sentence in enumerate(sentences):
                if runs_on and position == 1:
                    leads = ()
                leads = _add(sentence, leads, found)
            last = sentences[-1]
            begins = index == 0 or runs_on
            if last.endswith(":") or (dash_follows and (_OPEN_END.search(last) or (begins and _open(last)))):
                leads = (*leads, Lead(last, _before_last(found)))
    return tuple(found)


def _pieces(line: str) -> list[str]:
    """Parts of a line between the dashes of a list within it."""
    cuts = [match.span() for match in _DASH.finditer(line)]
    # One dash in prose is a dash. A list has several, or a line before it that cannot end there.
    if not cuts or (len(cuts) < 3 and not _OPEN_END.search(line[: cuts[0][0]])):
        return [line]
    starts = [0, *(end for _, end in cuts)]
    ends = [*(start for start, _ in cuts), len(line)]
    return [line[start:end] for start, end in zip(starts, ends, strict=True)]


def _add(sentence: str, leads: tuple[Lead, ...], found: list[Sentence]) -> tuple[Lead, ...]:
    """Append a sentence, or the lead and the items that run into each other in it."""
    glued = _GLUED_LIST.search(sentence)
    if glued is None:
        found.append(Sentence(sentence, leads))
        return leads
    lead = sentence[: glued.end()]
    found.append(Sentence(lead, leads))
    inner = (*leads, Lead(lead, _before_last(found)))
    found.extend(Sentence(item.strip(), inner) for item in _GLUED_ITEM.split(sentence[glued.end() :]) if item.strip())
    return leads


def _open(text: str) -> bool:
    """True where a text cannot end here: more follows."""
    return not _STOP_END.search(text.rstrip())


def _before_last(found: list[Sentence]) -> str | None:
    return found[-2].text if len(found) > 1 else None


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for match in _BOUNDARY.finditer(text):
        end = match.start() + len(match.group().rstrip())
        before = text[start:end]
        if match.group()[0] == "." and (_ABBREVIATION.search(before) or _INITIAL.search(before)):
            continue
        if before.strip():
            yield before.strip()
        start = match.end()
    rest = text[start:].strip()
    if rest:
        yield rest
