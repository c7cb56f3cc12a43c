"""PubMed/MEDLINE XML -> documents, an article a document: its abstract, whose labels become headings.

What `efetch` answers and the yearly files (`pubmed26n0001.xml.gz`) are read alike. Retracted articles are turned away:
what they say of a risk is no evidence.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterator
from typing import ClassVar, Literal
from urllib.parse import quote

from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.documents import Document, make_document
from prima_ray.knowledge.files import SourceFile
from prima_ray.knowledge.readers.source import LimitsConfig, LiteratureSource, Record
from prima_ray.knowledge.readers.xml import Element, read_articles, text_of

TAGS = ("PubmedArticle", "PubmedBookArticle", "MedlineCitation")
ROOTS = ("PubmedArticleSet", "PubmedBookArticleSet", "MedlineCitationSet", *TAGS)
RETRACTED = "Retracted Publication"
_DOI = re.compile(r"^10\.\d{4,9}/\S+$")
_YEAR = re.compile(r"\b(?:1[6-9]|20)\d\d\b")
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]


class PubMedSource(LiteratureSource):
    """PubMed's XML. The address is the DOI's, else PubMed's page; the licence is the abstract's copyright notice."""

    suffixes: ClassVar[tuple[str, ...]] = (".xml",)

    kind: Literal["pubmed"]


def read_pubmed(file: SourceFile, source: PubMedSource, limits: LimitsConfig) -> Iterator[Record]:
    """The articles of a file.

    Raises:
        RecordRejected: no PubMed XML, or not well-formed from some line on.
    """
    for article in read_articles(file, limits, tags=TAGS, roots=ROOTS, name="PubMed articles (kind: pubmed)"):
        pmid = text_of(article.find(".//PMID"))
        where = f"PMID {pmid}" if pmid else None
        try:
            if not pmid.isdecimal():
                raise RecordRejected("missing_key", "an article without a PMID")
            yield where, _document(article, pmid, source)
        except RecordRejected as error:
            yield where, error


def _document(article: Element, pmid: str, source: PubMedSource) -> Document:
    kinds = {text_of(item) for item in article.iterfind(".//PublicationTypeList/PublicationType")}
    if RETRACTED in kinds:
        raise RecordRejected("retracted", "the article was retracted")
    # A book's abstract stands beside its chapter, an article's within it; one in another language is named otherwise.
    abstract = article.find(".//Abstract")
    parts = abstract.findall("AbstractText") if abstract is not None else []
    if not any(text_of(part) for part in parts):
        raise RecordRejected("no_text", "the article has no abstract")
    doi = find_doi(article)
    return make_document(
        doc_id=f"PMID:{pmid}",
        title=text_of(article.find(".//ArticleTitle")) or text_of(article.find(".//BookTitle")),
        source=source.source,
        url=doi_address(doi) if doi else f"https://pubmed.ncbi.nlm.nih.gov/{pmid}/",
        date=_date(article) or source.date,
        licence=text_of(abstract.find("CopyrightInformation")) or source.licence,
        sections=[(("Abstract", _label(part)), text_of(part)) for part in parts],
    )


def _label(part: Element) -> str:
    label = str(part.get("Label") or "")
    return "" if label.upper() == "UNLABELLED" else label


def find_doi(article: Element) -> str | None:
    """The article's own DOI; its references have theirs elsewhere in the record."""
    found = [
        *article.iterfind("PubmedData/ArticleIdList/ArticleId[@IdType='doi']"),
        *article.iterfind("PubmedBookData/ArticleIdList/ArticleId[@IdType='doi']"),
        *article.iterfind(".//Article/ELocationID[@EIdType='doi']"),
        *article.iterfind(".//BookDocument/ArticleIdList/ArticleId[@IdType='doi']"),
    ]
    return next((doi for item in found if is_doi(doi := text_of(item))), None)


def is_doi(text: str) -> bool:
    """True for ``10.1000/xyz``."""
    return bool(_DOI.match(text))


def doi_address(doi: str) -> str:
    """Where a DOI leads."""
    # Old DOIs have signs in them that an address must not have.
    return f"https://doi.org/{quote(doi, safe='/:;()._-,')}"


def _date(article: Element) -> str | None:
    """When it appeared: in the issue, else online."""
    found = [
        date_of(item)
        for path in (".//JournalIssue/PubDate", ".//ArticleDate", ".//Book/PubDate")
        for item in article.iterfind(path)
    ]
    return next((date for date in found if date), None)


def date_of(element: Element) -> str | None:
    """The ISO date of an element with year, month and day in it, as far as they are known.

    Months are numbers or English names. Seasons and spans ("1998 Dec-1999 Jan") give the first year.
    """
    parts = {str(child.tag).lower(): text_of(child) for child in element}
    year = _YEAR.search(parts.get("year") or parts.get("medlinedate") or "")
    if not year:
        return None
    named = parts.get("month", "")
    name = named[:3].lower()
    month = int(named) if named.isdecimal() else _MONTHS.index(name) + 1 if name in _MONTHS else 0
    if not 1 <= month <= 12:
        return year[0]
    day = int(parts["day"]) if parts.get("day", "").isdecimal() else 0
    if not 1 <= day <= calendar.monthrange(int(year[0]), month)[1]:
        return f"{year[0]}-{month:02d}"
    return f"{year[0]}-{month:02d}-{day:02d}"
