"""PMC's JATS XML -> documents, an article a document: abstract and body, whose nested titles become heading paths.

Left out: references and the numbers that point to them, footnotes, acknowledgements, formulas written for TeX, and
abstracts in other languages. Tables are rows of cells joined by " | " under their captions, figures are their captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import Document, is_address, make_document
from prima_ray.knowledge.files import SourceFile
from prima_ray.knowledge.readers.pubmed import date_of, doi_address, is_doi
from prima_ray.knowledge.readers.source import LimitsConfig, LiteratureSource, Record
from prima_ray.knowledge.readers.xml import Element, read_articles, text_of

ROOTS = ("article", "pmc-articleset", "articles", "OAI-PMH")
SKIPPED = frozenset(
    {
        "ack", "alt-text", "bio", "fn", "fn-group", "glossary", "graphic", "inline-graphic", "label", "long-desc",
        "media", "object-id", "permissions", "ref-list", "supplementary-material", "table-wrap-foot", "tex-math",
        "title",
    }
)  # fmt: skip
"""Elements whose text is no part of the article's argument, or is taken elsewhere."""
_TEXT_BLOCKS = frozenset(
    {"p", "disp-formula", "disp-formula-group", "verse-line", "attrib", "term", "preformat", "code"}
)
_FLOATS = frozenset({"table-wrap", "fig"})
_INNER_BLOCKS = frozenset({"list", "def-list", "disp-quote", "boxed-text", "table-wrap-group", "fig-group", *_FLOATS})
_OTHER_ABSTRACTS = frozenset({"graphical", "teaser", "toc", "web-summary"})
_EMPTY_BRACKETS = re.compile(r"\s*[\[(][\s,;\u2013\u2014-]*[\])]")
_LICENCE_LENGTH = 500
_HREF = "{http://www.w3.org/1999/xlink}href"
_RETRACTED = re.compile(r"^\W*(?:retracted|withdrawn)\b", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
_BEFORE_MARK = re.compile(r" +([,.;:])(?=\s|$)")

Sections = list[tuple[tuple[str, ...], str]]


class JatsSource(LiteratureSource):
    """JATS, as PMC's open-access articles are. The address is the DOI's, else PMC's page; each has its own licence."""

    suffixes: ClassVar[tuple[str, ...]] = (".xml", ".nxml")

    kind: Literal["jats"]


def read_jats(file: SourceFile, source: JatsSource, limits: LimitsConfig) -> Iterator[Record]:
    """The articles of a file; PMC answers with several where several are asked for.

    Raises:
        RecordRejected: no JATS, or not well-formed from some line on.
    """
    for article in read_articles(file, limits, tags=("article",), roots=ROOTS, name="JATS articles (kind: jats)"):
        ids = _ids(article)
        names = (("pmc", ids.get("pmc")), ("doi:", ids.get("doi")), ("PMID:", ids.get("pmid")))
        doc_id = next((_doc_id(kind, value) for kind, value in names if value), None)
        try:
            yield doc_id, _document(article, doc_id or f"{source.source}/{file.name}", ids, source)
        except RecordRejected as error:
            yield doc_id, error


def _ids(article: Element) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in article.iterfind("front/article-meta/article-id"):
        kind, text = item.get("pub-id-type", ""), text_of(item)
        # Since 2024 PMC writes `pmcid`.
        if kind in ("pmc", "pmcid"):
            found["pmc"] = text.upper().removeprefix("PMC")
        elif (kind == "doi" and is_doi(text)) or kind == "pmid":
            found[kind] = text
    return found


def _doc_id(kind: str, value: str) -> str:
    return f"PMC{value}" if kind == "pmc" else f"{kind}{value}"


def _document(article: Element, doc_id: str, ids: dict[str, str], source: JatsSource) -> Document:
    meta = article.find("front/article-meta")
    if meta is None:
        raise RecordRejected("missing_key", "an article without article-meta")
    title = inline_text(meta.find("title-group/article-title"))
    if _RETRACTED.match(title):
        raise RecordRejected("retracted", f"its title says so: {title[:80]}")
    url = source.url
    if "doi" in ids:
        url = doi_address(ids["doi"])
    elif "pmc" in ids:
        url = f"https://pmc.ncbi.nlm.nih.gov/articles/PMC{ids['pmc']}/"
    return make_document(
        doc_id=doc_id,
        title=title,
        source=source.source,
        url=url,
        date=_date(meta) or source.date,
        licence=_licence(meta) or source.licence,
        sections=_sections(article, meta),
    )


def _sections(article: Element, meta: Element) -> Sections:
    found: Sections = []
    for abstract in meta.iterfind("abstract"):
        if abstract.get("abstract-type") not in _OTHER_ABSTRACTS:
            _add(found, abstract, (inline_text(abstract.find("title")) or "Abstract",))
    for body in article.iterfind("body"):
        _add(found, body, ())
    for appendix in article.iterfind("back/app-group/app"):
        _add(found, appendix, (inline_text(appendix.find("title")) or "Appendix",))
    for floats in article.iterfind("floats-group"):
        _add(found, floats, ("Figures and tables",))
    return found


def _add(found: Sections, element: Element, path: tuple[str, ...]) -> None:
    """Append the element's own text, then its subsections, in the order of the text."""
    blocks: list[str] = []

    def close() -> None:
        if blocks:
            found.append((path, "\n\n".join(blocks)))
            blocks.clear()

    for child in element:
        if child.tag == "sec":
            close()
            name = inline_text(child.find("title"))
            _add(found, child, (*path, name) if name else path)
        else:
            blocks.extend(block for block in _blocks(child) if block)
    close()


def _blocks(element: Element) -> Iterator[str]:
    """The paragraphs of a block, in order."""
    if element.tag in SKIPPED:
        return
    if element.tag in _FLOATS:
        yield _float(element)
    elif element.tag in ("list", "def-list"):
        items = [" ".join(block for part in item for block in _blocks(part)) for item in element if item.tag != "title"]
        yield "\n".join(f"- {item}" for item in items if item)
    elif element.tag in _TEXT_BLOCKS or not len(element):
        yield inline_text(element)
        # What stands within a paragraph and is none.
        for inner in element:
            if inner.tag in _INNER_BLOCKS:
                yield from _blocks(inner)
    else:
        for child in element:
            yield from _blocks(child)


def _float(element: Element) -> str:
    """A table's caption and rows, or a figure's caption."""
    label = inline_text(element.find("label")).rstrip(".")
    caption = " ".join(inline_text(part) for part in element.iterfind("caption/*"))
    head = ". ".join(part for part in (label, caption) if part)
    rows = [
        " | ".join(inline_text(cell) for cell in row if cell.tag in ("td", "th")) for row in element.iterfind(".//tr")
    ]
    return "\n".join(line for line in (head, *rows) if line.strip(" |"))


def inline_text(element: Element | None) -> str:
    """The text of a paragraph or title on one line, without the numbers of references."""
    if element is None:
        return ""
    parts: list[str] = []
    _inline(element, parts)
    text = _EMPTY_BRACKETS.sub("", _SPACE.sub(" ", "".join(parts)))
    return _BEFORE_MARK.sub(r"\1", text).strip()


def _inline(element: Element, parts: list[str]) -> None:
    parts.append(element.text or "")
    for child in element:
        if not (child.tag in SKIPPED or child.tag in _INNER_BLOCKS or _is_reference(child)):
            _inline(child, parts)
        elif child.tag in _INNER_BLOCKS:
            parts.append(" ")
        parts.append(child.tail or "")


def _is_reference(element: Element) -> bool:
    if element.tag == "sup":
        return any(_is_reference(child) for child in element)
    return element.tag == "xref" and element.get("ref-type") in ("bibr", "fn", "table-fn")


def _date(meta: Element) -> str | None:
    """The day it appeared online, else in print; not the day PMC took it in."""
    dates = [item for item in meta.iterfind("pub-date") if not item.get("pub-type", "").startswith(("pmc", "nihms"))]
    online = [item for item in dates if "epub" in (item.get("pub-type"), item.get("publication-format"))]
    electronic = [item for item in dates if item.get("publication-format") == "electronic"]
    return next((date for item in (*online, *electronic, *dates) if (date := date_of(item))), None)


def _licence(meta: Element) -> str | None:
    """The licence's address where it has one, else what it says, else the copyright notice."""
    permissions = meta.find("permissions")
    if permissions is None:
        return None
    licence = permissions.find("license")
    if licence is not None:
        addresses = [licence.get(_HREF) or "", text_of(licence.find("license_ref"))]
        addresses += [link.get(_HREF) or "" for link in licence.iter("ext-link")]
        said: list[str] = [
            *(address for address in addresses if is_address(address)),
            inline_text(licence),
            licence.get("license-type") or "",
        ]
        found = next((text for text in said if text), None)
        if found:
            return found[:_LICENCE_LENGTH]
    return text_of(permissions.find("copyright-statement"))[:_LICENCE_LENGTH] or None
