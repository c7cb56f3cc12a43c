from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.knowledge.reading import read, sections

IDS = """<article-id pub-id-type="pmid">77</article-id><article-id pub-id-type="pmcid">PMC123</article-id>
  <article-id pub-id-type="doi">10.1000/x</article-id>"""
LICENCE = """<permissions><copyright-statement>© 2021 Doe</copyright-statement><license license-type="open-access"
  xlink:href="https://creativecommons.org/licenses/by/4.0/"><license-p>Open.</license-p></license></permissions>"""
DATES = """<pub-date pub-type="pmc-release"><day>1</day><month>1</month><year>2023</year></pub-date>
  <pub-date pub-type="ppub"><month>7</month><year>2021</year></pub-date>
  <pub-date pub-type="epub"><day>9</day><month>6</month><year>2021</year></pub-date>"""
BODY = """
<p>Preface.</p>
<sec id="s1"><label>1.</label><title>Risk <italic>factors</italic></title>
  <p>Sun raises it [<xref ref-type="bibr" rid="r1">1</xref>, <xref ref-type="bibr" rid="r2">2</xref>], as
     shown<sup><xref ref-type="bibr" rid="r3">3</xref>,<xref ref-type="bibr" rid="r4">4</xref></sup> in
     <xref ref-type="fig" rid="f1">Figure 1</xref> (10<sup>3</sup>, P = .05).<fn><p>Note.</p></fn>
     <list><list-item><label>a</label><p>one</p></list-item><list-item><p>two</p><list><list-item><p>three</p>
     </list-item></list></list-item></list> After.</p>
  <sec><title>Age</title><p>Old age.</p>
    <table-wrap><label>Table 1</label><caption><title>Odds.</title><p>By age.</p></caption>
      <table><thead><tr><th>Age</th><th>OR</th></tr></thead><tbody><tr><td>60</td><td>2.0
      <xref ref-type="table-fn">a</xref></td></tr><tr><td/><td/></tr></tbody></table>
      <table-wrap-foot><fn><p>a see text</p></fn></table-wrap-foot>
    </table-wrap>
    <disp-quote><p>Quoted.</p></disp-quote>
    <boxed-text><sec><title>Box</title><p>Boxed.</p></sec></boxed-text>
  </sec>
  <p>Back in one.</p>
</sec>
<sec><p>Untitled <inline-formula><alternatives><tex-math>\\documentclass{x}</tex-math><math>x</math></alternatives>
  </inline-formula>.</p>
  <fig><label>Figure 1.</label><caption><p>A lesion.</p></caption><graphic/></fig></sec>
<sec><title>Definitions</title><def-list><def-item><term>BCC</term><def><p>basal cell carcinoma</p></def></def-item>
  </def-list></sec>"""


def article(
    *,
    ids: str = IDS,
    title: str = 'Sun and skin<xref ref-type="fn">*</xref>',
    permissions: str = LICENCE,
    dates: str = DATES,
    abstracts: str = "<abstract><p>In short.</p></abstract>",
    body: str = BODY,
    back: str = "<ack><p>Thanks.</p></ack><ref-list><ref><mixed-citation>Doe 2001</mixed-citation></ref></ref-list>",
    space: str = "",
) -> str:
    return f"""<article {space} xmlns:xlink="http://www.w3.org/1999/xlink"
      xmlns:ali="http://www.niso.org/schemas/ali/1.0/"><front><article-meta>{ids}
      <title-group><article-title>{title}</article-title></title-group>{dates}{permissions}{abstracts}</article-meta></front>
      <body>{body}</body><back>{back}</back><sub-article><body><p>Review.</p></body></sub-article></article>"""


def one(tmp_path: Path, text: str, **keys: Any) -> Any:
    path = tmp_path / "a.nxml"
    path.write_text(text)
    return read("jats", path, **keys)


def test_an_article_with_its_heading_paths(tmp_path: Path):
    documents, rejected = one(tmp_path, article())
    assert not rejected
    found = documents[0]
    assert (found.doc_id, found.title) == ("PMC123", "Sun and skin")
    assert (found.url, found.date) == ("https://doi.org/10.1000/x", "2021-06-09")
    assert found.licence == "https://creativecommons.org/licenses/by/4.0/"
    assert sections(found) == [
        (("Abstract",), "In short."),
        ((), "Preface."),
        (
            ("Risk factors",),
            "Sun raises it, as shown in Figure 1 (103, P = .05). After.\n\n- one\n- two - three",
        ),
        (
            ("Risk factors", "Age"),
            "Old age.\n\nTable 1. Odds. By age.\nAge | OR\n60 | 2.0\n\nQuoted.\n\nBoxed.",
        ),
        (("Risk factors",), "Back in one."),
        ((), "Untitled x.\n\nFigure 1. A lesion."),
        (("Definitions",), "- BCC basal cell carcinoma"),
    ]


def test_abstracts_appendices_and_floats(tmp_path: Path):
    abstracts = """<abstract><sec><title>Aim</title><p>To see.</p></sec></abstract>
      <abstract abstract-type="graphical"><p>Picture.</p></abstract>
      <abstract abstract-type="plain-language-summary"><title>For all</title><p>Simply.</p></abstract>
      <trans-abstract><p>Kurz.</p></trans-abstract>"""
    back = "<app-group><app><title>Appendix A</title><p>More.</p></app></app-group>"
    text = article(abstracts=abstracts, body="<p>x</p>", back=back)
    text = text.replace(
        "</article>", "<floats-group><fig><caption><p>Late.</p></caption></fig></floats-group></article>"
    )
    assert sections(one(tmp_path, text)[0][0]) == [
        (("Abstract", "Aim"), "To see."),
        (("For all",), "Simply."),
        ((), "x"),
        (("Appendix A",), "More."),
        (("Figures and tables",), "Late."),
    ]


@pytest.mark.parametrize(
    ("ids", "doc_id", "url"),
    [
        ('<article-id pub-id-type="pmc">5</article-id>', "PMC5", "https://pmc.ncbi.nlm.nih.gov/articles/PMC5/"),
        ('<article-id pub-id-type="doi">10.1000/x</article-id>', "doi:10.1000/x", "https://doi.org/10.1000/x"),
        ('<article-id pub-id-type="pmid">7</article-id>', "PMID:7", "https://example.org"),
        ('<article-id pub-id-type="doi">none</article-id>', "here/a.nxml", "https://example.org"),
    ],
)
def test_ids_and_addresses(tmp_path: Path, ids: str, doc_id: str, url: str):
    found = one(tmp_path, article(ids=ids), url="https://example.org")[0][0]
    assert (found.doc_id, found.url) == (doc_id, url)


@pytest.mark.parametrize(
    ("permissions", "expected"),
    [
        ("", "ask"),
        ("<permissions/>", "ask"),
        ("<permissions><copyright-statement>© Doe</copyright-statement></permissions>", "© Doe"),
        (
            "<permissions><license><ali:license_ref>https://example.org/l</ali:license_ref></license></permissions>",
            "https://example.org/l",
        ),
        (
            '<permissions><license><license-p>Under <ext-link xlink:href="https://example.org/cc">CC</ext-link></license-p>'
            "</license></permissions>",
            "https://example.org/cc",
        ),
        ("<permissions><license><license-p>CC  BY.</license-p></license></permissions>", "CC BY."),
        ('<permissions><license license-type="CC0"/></permissions>', "CC0"),
    ],
)
def test_licences(tmp_path: Path, permissions: str, expected: str):
    assert one(tmp_path, article(permissions=permissions), licence="ask")[0][0].licence == expected


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        ("", "1999"),
        (
            '<pub-date date-type="pub" publication-format="electronic"><year>2022</year><month>2</month></pub-date>',
            "2022-02",
        ),
        ("<pub-date><year>2022</year><season>Winter</season></pub-date>", "2022"),
    ],
)
def test_dates(tmp_path: Path, dates: str, expected: str):
    assert one(tmp_path, article(dates=dates), date="1999")[0][0].date == expected


def test_several_articles_namespaces_and_what_is_turned_away(tmp_path: Path):
    def numbered(number: int, **keys: str) -> str:
        ids = f'<article-id pub-id-type="pmc">{number}</article-id>'
        return article(ids=ids, **{"body": f"<p>Text {number}.</p>", **keys})

    text = f"""<pmc-articleset>{numbered(1)}{numbered(2, title="RETRACTED: Sun")}
      {numbered(3, body="", abstracts="", back="")}<article><body><p>x</p></body></article>
      {numbered(4, space='xmlns="http://jats.nlm.nih.gov"')}</pmc-articleset>"""
    documents, rejected = one(tmp_path, text)
    assert [item.doc_id for item in documents] == ["PMC1", "PMC4"]
    assert sections(documents[1]) == [(("Abstract",), "In short."), ((), "Text 4.")]
    assert rejected == [
        ("PMC2", "retracted", "its title says so: RETRACTED: Sun"),
        ("PMC3", "no_text", "the record holds no text"),
        (None, "missing_key", "an article without article-meta"),
    ]


def test_other_xml_is_turned_away(tmp_path: Path):
    assert one(tmp_path, "<PubmedArticleSet/>") == (
        [],
        [(None, "other_kind", "the file is XML of <PubmedArticleSet>, not JATS articles (kind: jats)")],
    )
    documents, rejected = one(tmp_path, f"<article><body>{'<sec>' * 250}<p>deep</p>{'</sec>' * 250}</body></article>")
    assert (documents, rejected) == ([], [(None, "missing_key", "an article without article-meta")])
    deep = article(body=f"{'<sec><title>t</title>' * 240}<p>deep</p>{'</sec>' * 240}")
    assert len(one(tmp_path, deep)[0][0].sections[-1].heading) == 240
