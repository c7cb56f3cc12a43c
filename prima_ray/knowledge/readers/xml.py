"""XML of strangers, article by article: bounded in bytes and depth, never expanded, nothing fetched.

The parser is lxml with entities left alone and libxml2's bounds on depth and text kept. defusedxml would refuse the
same files, but parses in pure Python, and PubMed has tens of millions of articles.
"""

from __future__ import annotations

import html.entities
import re
from collections.abc import Collection, Iterator
from typing import IO, Any

from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.files import SourceFile, other_kind
from prima_ray.knowledge.readers.source import LimitsConfig

Element = Any
"""An lxml element; lxml has no types of its own."""
_READ = 1 << 15
_SPACE = re.compile(r"\s+")


def read_articles(
    file: SourceFile, limits: LimitsConfig, *, tags: Collection[str], roots: Collection[str], name: str
) -> Iterator[Element]:
    """The elements of these tags, whole, without namespaces; each is let go when the next is asked for.

    Args:
        tags: of an article.
        roots: what the outermost element may be.
        name: of the format, for the message.

    Raises:
        RecordRejected: not such XML, entities, an article over the bound, or not well-formed from some line on.
    """
    from lxml import etree

    with file.open() as stream:
        bounded = _Bounded(stream, limits, name)
        events = etree.iterparse(
            bounded,
            events=("start", "end"),
            resolve_entities=False,
            load_dtd=False,
            no_network=True,
            huge_tree=False,
            remove_comments=True,
            remove_pis=True,
        )
        try:
            yield from _articles(events, bounded, tags, roots, name)
        except etree.XMLSyntaxError as error:
            if not bounded.total:
                raise RecordRejected("empty_file", "the file is empty") from None
            raise _broken(error, events.error_log) from None


def _broken(error: Any, log: Any) -> RecordRejected:
    # The exception may say no more than that there is no element; the parser's log knows why.
    first = log[0] if len(log) else None
    text = " ".join(str(first.message if first is not None else error.msg).split())
    if "amplification" in text:
        return RecordRejected("forbidden_xml", "entities that grow without bound")
    line = f" at line {first.line}" if first is not None else ""
    return RecordRejected("broken_xml", f"not well-formed XML{line}: {text}")


def _articles(
    events: Any, bounded: _Bounded, tags: Collection[str], roots: Collection[str], name: str
) -> Iterator[Element]:
    outer: list[Element] = []
    for event, element in events:
        if event == "start":
            if not outer:
                _check_root(element, roots, name)
            outer.append(element)
            continue
        outer.pop()
        if local_name(element) not in tags or any(local_name(above) in tags for above in outer):
            continue
        _tidy(element)
        yield element
        bounded.start_again()
        # lxml keeps what was read: the article, and its like before it in the elements above.
        element.clear()
        for above in outer:
            while len(above) > 1:
                del above[0]


def _check_root(root: Element, roots: Collection[str], name: str) -> None:
    if local_name(root) not in roots:
        raise RecordRejected("other_kind", f"the file is XML of <{local_name(root)}>, not {name}")
    inside = root.getroottree().docinfo.internalDTD
    declared = next(iter(inside.iterentities()), None) if inside is not None else None
    if declared is not None:
        raise RecordRejected(
            "forbidden_xml", f"declares the entity {declared.name!r}; files that declare entities are not read"
        )


def _tidy(article: Element) -> None:
    """Tags without namespaces, and characters for the names of characters that the DTD would have declared."""
    from lxml import etree

    for entity in list(article.iter(etree.Entity)):
        text = html.entities.html5.get(f"{entity.name};", " ") + (entity.tail or "")
        before, parent = entity.getprevious(), entity.getparent()
        if before is None:
            parent.text = (parent.text or "") + text
        else:
            before.tail = (before.tail or "") + text
        parent.remove(entity)
    for element in article.iter(etree.Element):
        element.tag = local_name(element)


class _Bounded:
    """A stream that gives up where one article takes too many bytes."""

    def __init__(self, stream: IO[bytes], limits: LimitsConfig, name: str) -> None:
        self._stream, self._limits, self._name = stream, limits, name
        self._since = 0
        self.total = 0

    def read(self, _size: int = -1) -> bytes:
        data = self._stream.read(_READ)
        kind = None if self.total else other_kind(data, but=("XML",))
        if kind is not None:
            raise RecordRejected("other_kind", f"the file is {kind}, not {self._name}")
        self.total += len(data)
        self._since += len(data)
        # What was read ahead of the last article's end is another's.
        if self._since > self._limits.max_document_bytes + _READ:
            raise self._limits.too_large()
        return data

    def start_again(self) -> None:
        self._since = 0


def local_name(element: Element) -> str:
    """An element's tag without its namespace."""
    return str(element.tag).rpartition("}")[2]


def text_of(element: Element | None) -> str:
    """All text within an element on one line; empty where there is none."""
    return "" if element is None else _SPACE.sub(" ", "".join(element.itertext())).strip()
