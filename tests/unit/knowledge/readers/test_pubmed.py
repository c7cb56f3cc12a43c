from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from tests.unit.knowledge.reading import read, sections

DOCTYPE = (
    '<?xml version="1.0"?><!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January 2025//EN" '
    '"https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">'
)
ABSTRACT = """<Abstract>
  <AbstractText Label="BACKGROUND" NlmCategory="BACKGROUND">Sun &amp; <i>UV</i>.</AbstractText>
  <AbstractText Label="UNLABELLED">Risk ratio 2.3.</AbstractText><AbstractText/>
  <CopyrightInformation>Copyright © 2020 Society.</CopyrightInformation></Abstract>"""
ISSUE = "<PubDate><Year>2020</Year><Month>Mar</Month><Day>5</Day></PubDate>"


def article(
    pmid: str = "1", *, abstract: str = ABSTRACT, issue: str = ISSUE, extra: str = "", kind: str = "", ids: str = ""
) -> str:
    return f"""<PubmedArticle><MedlineCitation><PMID Version="1">{pmid}</PMID><Article>
      <Journal><JournalIssue>{issue}</JournalIssue></Journal><ArticleTitle>Title of <b>{pmid}</b>.</ArticleTitle>
      {extra}{abstract}<PublicationTypeList><PublicationType UI="D0">{kind or "Review"}</PublicationType>
      </PublicationTypeList></Article><OtherAbstract><AbstractText>Otro.</AbstractText></OtherAbstract>
      <CommentsCorrectionsList><CommentsCorrections><PMID>99</PMID></CommentsCorrections></CommentsCorrectionsList>
      </MedlineCitation><PubmedData><ArticleIdList>{ids}</ArticleIdList><ReferenceList><Reference><ArticleIdList>
      <ArticleId IdType="doi">10.1234/other</ArticleId></ArticleIdList></Reference></ReferenceList></PubmedData>
      </PubmedArticle>"""


def articles(*items: str) -> str:
    return f"{DOCTYPE}<PubmedArticleSet>{''.join(items)}</PubmedArticleSet>"


def one(tmp_path: Path, text: str | bytes, **keys: Any) -> Any:
    path = tmp_path / "pubmed.xml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read("pubmed", path, **keys)


def test_abstracts_with_their_labels(tmp_path: Path):
    ids = '<ArticleId IdType="pubmed">1</ArticleId><ArticleId IdType="doi">10.1000/x(1)</ArticleId>'
    documents, rejected = one(tmp_path, articles(article("1", ids=ids)))
    assert not rejected
    found = documents[0]
    assert (found.doc_id, found.title, found.source) == ("PMID:1", "Title of 1.", "here")
    assert (found.url, found.date) == ("https://doi.org/10.1000/x(1)", "2020-03-05")
    assert found.licence == "Copyright © 2020 Society."
    assert sections(found) == [(("Abstract", "BACKGROUND"), "Sun & UV."), (("Abstract",), "Risk ratio 2.3.")]


def test_several_articles_and_defaults(tmp_path: Path):
    plain = "<Abstract><AbstractText>Other words{}.</AbstractText></Abstract>"
    electronic = '<ELocationID EIdType="pii">s1</ELocationID>'
    electronic += '<ELocationID EIdType="doi">10.1000/e&lt;1::AID#2&gt;</ELocationID>'
    text = articles(
        article("1", abstract=plain.format(1)),
        article("2", abstract=plain.format(2), extra=electronic),
        article("3", abstract=plain.format(3), issue="", ids='<ArticleId IdType="doi">not one</ArticleId>'),
    )
    documents, rejected = one(tmp_path, text, date="2001", licence="see PubMed")
    assert not rejected
    assert [(item.doc_id, item.url, item.date, item.licence) for item in documents] == [
        ("PMID:1", "https://pubmed.ncbi.nlm.nih.gov/1/", "2020-03-05", "see PubMed"),
        ("PMID:2", "https://doi.org/10.1000/e%3C1::AID%232%3E", "2020-03-05", "see PubMed"),
        ("PMID:3", "https://pubmed.ncbi.nlm.nih.gov/3/", "2001", "see PubMed"),
    ]


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("<Year>1998</Year>", "1998"),
        ("<Year>1998</Year><Month>12</Month>", "1998-12"),
        ("<Year>1998</Year><Month>Sept</Month><Day>31</Day>", "1998-09"),
        ("<Year>1998</Year><Season>Spring</Season>", "1998"),
        ("<MedlineDate>1998 Dec-1999 Jan</MedlineDate>", "1998"),
        ("<MedlineDate>unknown</MedlineDate>", None),
    ],
)
def test_dates_as_far_as_they_are_known(tmp_path: Path, date: str, expected: str | None):
    assert one(tmp_path, articles(article(issue=f"<PubDate>{date}</PubDate>")))[0][0].date == expected


def test_articles_that_say_nothing_and_retracted_ones(tmp_path: Path):
    text = articles(
        article("1", abstract=""),
        article("2", kind="Retracted Publication"),
        article("x"),
        article("3"),
    )
    documents, rejected = one(tmp_path, text)
    assert [item.doc_id for item in documents] == ["PMID:3"]
    assert rejected == [
        ("PMID 1", "no_text", "the article has no abstract"),
        ("PMID 2", "retracted", "the article was retracted"),
        ("PMID x", "missing_key", "an article without a PMID"),
    ]


def test_chapters_of_books_and_files_of_citations(tmp_path: Path):
    book = """<PubmedBookArticle><BookDocument><PMID>7</PMID>
      <ArticleIdList><ArticleId IdType="bookaccession">N</ArticleId>
      </ArticleIdList><Book><BookTitle>Book</BookTitle><PubDate><Year>2019</Year></PubDate></Book>
      <ArticleTitle>Chapter</ArticleTitle><Abstract><AbstractText>Words.</AbstractText></Abstract></BookDocument>
      </PubmedBookArticle>"""
    found = one(tmp_path, articles(book))[0][0]
    assert (found.doc_id, found.title, found.date) == ("PMID:7", "Chapter", "2019")
    citation = article("8").partition("<PubmedArticle>")[2].partition("<PubmedData>")[0]
    assert one(tmp_path, f"<MedlineCitationSet>{citation}</MedlineCitationSet>")[0][0].doc_id == "PMID:8"
    assert one(tmp_path, article("9"))[0][0].doc_id == "PMID:9"


def test_packed_files_of_many_articles(tmp_path: Path):
    many = (article(str(number), abstract=ABSTRACT.replace("2.3", str(number))) for number in range(2000))
    path = tmp_path / "pubmed26n0001.xml.gz"
    path.write_bytes(gzip.compress(articles(*many).encode()))
    # More than a document may take, and each article less.
    documents, rejected = read("pubmed", tmp_path, limits={"max_document_bytes": 100_000})
    assert (len(documents), rejected) == (2000, [])


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "lol"}">' for i in range(10))


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("", "empty_file", "the file is empty"),
        (
            f"<!DOCTYPE PubmedArticleSet [{LAUGHS}]><PubmedArticleSet>&l9;</PubmedArticleSet>",
            "forbidden_xml",
            "declares the entity 'l0'; files that declare entities are not read",
        ),
        (
            f'<!DOCTYPE PubmedArticleSet [{LAUGHS}]><PubmedArticleSet a="&l9;"/>',
            "forbidden_xml",
            "entities that grow without bound",
        ),
        (
            '<!DOCTYPE PubmedArticleSet [<!ENTITY x SYSTEM "file:///etc/passwd">]><PubmedArticleSet>&x;</PubmedArticleSet>',
            "forbidden_xml",
            "declares the entity 'x'; files that declare entities are not read",
        ),
        (
            '<!DOCTYPE PubmedArticleSet [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]><PubmedArticleSet/>',
            "forbidden_xml",
            "declares the entity 'x'; files that declare entities are not read",
        ),
        (
            "<article/>",
            "other_kind",
            "the file is XML of <article>, not PubMed articles (kind: pubmed)",
        ),
        ("%PDF-1.7", "other_kind", "the file is a PDF, not PubMed articles (kind: pubmed)"),
        ("Error: 429", "broken_xml", "not well-formed XML at line 1: Start tag expected, '<' not found"),
        (
            '<?xml version="1.0" encoding="nonsense"?><PubmedArticleSet/>',
            "broken_xml",
            "not well-formed XML at line 1: Unsupported encoding: nonsense",
        ),
        (
            f"<PubmedArticleSet>{'<a>' * 300}",
            "broken_xml",
            "not well-formed XML at line 1: Excessive depth in document: 256, use XML_PARSE_HUGE option",
        ),
        (
            f"<PubmedArticleSet><PubmedArticle>{'<a>xxxxxxxxxxxxx</a>' * 20_000}</PubmedArticle></PubmedArticleSet>",
            "too_large",
            "more than 100000 bytes, the bound in limits.max_document_bytes",
        ),
    ],
)
def test_files_that_are_no_pubmed_xml_or_mean_harm(tmp_path: Path, text: str, reason: str, detail: str):
    assert one(tmp_path, text, limits={"max_document_bytes": 100_000}) == ([], [(None, reason, detail)])


def test_articles_before_the_damage_are_kept(tmp_path: Path):
    text = articles(article("1"), "\n" * 40 + article("2"))
    documents, rejected = one(tmp_path, text[:-400])
    assert [item.doc_id for item in documents] == ["PMID:1"]
    assert [(where, reason) for where, reason, _ in rejected] == [(None, "broken_xml")]
    assert rejected[0][2].startswith("not well-formed XML at line ")


def test_names_of_characters_need_no_dtd_but_an_unknown_one_without_a_doctype_is_an_error(tmp_path: Path):
    abstract = "<Abstract><AbstractText>5&nbsp;&plusmn;<i>1</i>&alpha;&foo;!</AbstractText></Abstract>"
    documents, _ = one(tmp_path, articles(article(abstract=abstract)))
    assert sections(documents[0]) == [(("Abstract",), "5 ±1\u03b1 !")]
    _, rejected = one(tmp_path, article(abstract=abstract))
    assert rejected == [(None, "broken_xml", "not well-formed XML at line 3: Entity 'nbsp' not defined")]


def test_the_encoding_that_the_file_declares(tmp_path: Path):
    text = '<?xml version="1.0" encoding="ISO-8859-1"?>' + article("1").replace("Copyright ©", "Société")
    assert one(tmp_path, text.encode("latin1"))[0][0].licence == "Société 2020 Society."
