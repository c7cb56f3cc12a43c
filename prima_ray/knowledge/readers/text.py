"""Plain text and Markdown -> documents, a file a document.

Markdown's headings (``#`` and underlined) become heading paths; what is in fences, comments and the front matter is no
heading. Plain text is one section whose paragraphs stay apart by empty lines. Lines that only an editor broke are one
again. Nothing is rendered or followed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from prima_ray.base import PrimaError
from prima_ray.config import parse_yaml
from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import make_document
from prima_ray.knowledge.files import SourceFile, decode, other_kind
from prima_ray.knowledge.readers.lines import unwrapped
from prima_ray.knowledge.readers.source import LimitsConfig, LiteratureSource, Record

MAX_HEADING = 500
"""Characters; what is longer is a text that somebody marked as a heading."""
MAX_FRONT_MATTER = 10_000
"""Characters; a longer one is text."""
MARKDOWN_SUFFIXES = (".md", ".markdown")
_ATX = re.compile(r"^ {0,3}(#{1,6})(?:[ \t]|$)")
_UNDERLINE = re.compile(r"^ {0,3}(=+|-+)[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$")
_BREAK = re.compile(r"^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$")
_BLOCK = re.compile(r"^ {0,3}(?:(?:[-*+]|\d{1,9}[.)])(?:\s|$)|[>|])")
"""A list, a quote or a table: a line of dashes under it makes no heading."""
_HARD_BREAK = ("  ", "\\")
_CODE = re.compile(r"^(?: {4}|\t)")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_EMPHASIS = re.compile(r"(\*\*|__|\*|`+)(?=\S)(.+?)(?<=\S)\1")


class TextSource(LiteratureSource):
    """Plain text, and Markdown where the name ends in .md or .markdown.

    Markdown's front matter may give `title`, `date`, `url` and `licence`.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".text", *MARKDOWN_SUFFIXES)

    kind: Literal["text"]


def read_text(file: SourceFile, source: TextSource, limits: LimitsConfig) -> Iterator[Record]:
    """The document that the file is.

    Raises:
        RecordRejected: the file is no UTF-8 text, too large, or empty.
    """
    data = file.read(limits.max_document_bytes, key="limits.max_document_bytes")
    kind = other_kind(data[:64])
    if kind is not None:
        raise RecordRejected("other_kind", f"the file is {kind}, not text")
    text = decode(data).replace("\r\n", "\n").replace("\r", "\n")
    front: dict[str, str] = {}
    title = file.stem
    sections: list[tuple[tuple[str, ...], str]] = [((), unwrapped(text))]
    if file.suffix in MARKDOWN_SUFFIXES:
        front, text = front_matter(text)
        sections = markdown_sections(text)
        title = front.get("title") or next((path[0] for path, _ in sections if path), title)
    yield (
        None,
        make_document(
            doc_id=f"{source.source}/{file.name}",
            title=title,
            source=source.source,
            url=front.get("url", source.url),
            date=front.get("date", source.date),
            licence=front.get("licence", front.get("license", source.licence)),
            sections=sections,
        ),
    )


def front_matter(text: str) -> tuple[dict[str, str], str]:
    """The YAML between two lines of dashes at the very start, as texts, and what follows it."""
    match = re.match(r"---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if not match or len(match[1]) > MAX_FRONT_MATTER:
        return {}, text
    try:
        found: Any = parse_yaml(match[1], where="front matter")
    except (PrimaError, RecursionError, TypeError, ValueError):
        # Not YAML, nested without end, a list for a key, the 31st of June.
        return {}, text
    if not isinstance(found, dict):
        return {}, text
    kept = {str(key).lower(): str(value) for key, value in found.items() if isinstance(value, str | int | float)}
    # YAML has dates of its own.
    kept |= {str(key).lower(): value.isoformat() for key, value in found.items() if hasattr(value, "isoformat")}
    return kept, text[match.end() :]


@dataclass
class _Markdown:
    path: list[tuple[int, str]] = field(default_factory=list)
    """The headings above, with their levels."""
    lines: list[str] = field(default_factory=list)
    paragraph: int = 0
    """How many of the last lines are a paragraph that an underline would turn into a heading."""
    in_block: bool = False
    """In a list, a quote or a table, which go on until an empty line."""
    goes_on: bool = False
    """The last line was broken by an editor, if what follows is text."""
    breaks: list[str] = field(default_factory=list)
    """What stands before each line: a line's end, or a blank."""
    sections: list[tuple[tuple[str, ...], str]] = field(default_factory=list)

    def close(self) -> None:
        text = "".join(itertools.chain.from_iterable(zip(self.breaks, self.lines, strict=True)))[1:]
        if text.strip():
            self.sections.append((tuple(name for _, name in self.path if name), text))
        self.lines, self.breaks, self.paragraph, self.in_block, self.goes_on = [], [], 0, False, False

    def heading(self, level: int, name: str) -> None:
        self.close()
        while self.path and self.path[-1][0] >= level:
            self.path.pop()
        self.path.append((level, _plain(name)))

    def underline(self, level: int) -> None:
        names = self.lines[-self.paragraph :]
        del self.lines[-self.paragraph :], self.breaks[-self.paragraph :]
        self.heading(level, " ".join(line.strip() for line in names))

    @property
    def paragraph_length(self) -> int:
        # Never a sum over much: every further underline would ask again.
        return sum(map(len, self.lines[-self.paragraph :])) if 0 < self.paragraph <= MAX_HEADING else 0

    def text(self, line: str) -> None:
        soft = self.goes_on and bool(line.strip()) and not _BLOCK.match(line) and "|" not in line
        self.lines.append(line.lstrip() if soft else line)
        self.breaks.append(" " if soft else "\n")
        self.goes_on = bool(line.strip()) and not line.endswith(_HARD_BREAK) and "|" not in line
        if not line.strip():
            self.paragraph, self.in_block = 0, False
        elif _BLOCK.match(line):
            self.paragraph, self.in_block = 0, True
        elif self.paragraph or not (self.in_block or _CODE.match(line)):
            self.paragraph += 1

    def literal(self, line: str) -> None:
        self.lines.append(line)
        self.breaks.append("\n")
        self.paragraph, self.in_block, self.goes_on = 0, False, False


def markdown_sections(text: str) -> list[tuple[tuple[str, ...], str]]:
    """Heading paths and the texts under them, in order; text before the first heading has an empty path."""
    found = _Markdown()
    fence = ""
    in_comment = False
    for line in text.split("\n"):
        if fence:
            found.literal(line)
            closing = _FENCE.match(line)
            if closing and closing[1].startswith(fence) and not closing[2].strip():
                fence = ""
        elif in_comment or line.lstrip().startswith("<!--"):
            in_comment = "-->" not in line
        elif (opening := _FENCE.match(line)) and not (opening[1][0] == "`" and "`" in opening[2]):
            fence = opening[1]
            found.literal(line)
        elif (atx := _ATX.match(line)) and len(line) <= MAX_HEADING:
            found.heading(len(atx[1]), _without_closing(line[atx.end() :].strip()))
        elif (under := _UNDERLINE.match(line)) and 0 < found.paragraph_length <= MAX_HEADING:
            found.underline(1 if under[1][0] == "=" else 2)
        elif _BREAK.match(line):
            found.literal(line)
        else:
            found.text(line)
    found.close()
    return found.sections


def _without_closing(name: str) -> str:
    """``Risk`` of ``Risk ##``, and ``C#`` of ``C#``."""
    bare = name.rstrip("#")
    return bare.rstrip() if not bare or bare[-1] in " \t" else name


def _plain(name: str) -> str:
    name = _LINK.sub(r"\1", name)
    while (stripped := _EMPHASIS.sub(r"\2", name)) != name:
        name = stripped
    return name.replace("\\", "").strip()
