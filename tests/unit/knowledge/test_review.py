"""The review page, asked over HTTP as a browser would."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from prima_ray.base import PrimaError, is_loopback
from prima_ray.knowledge.corpus import Corpus
from prima_ray.knowledge.review import ReviewServer
from prima_ray.knowledge.vetting import Verdict, append, read_log, resolve
from tests.unit.knowledge.page import Page
from tests.unit.knowledge.toy_corpus import ENTRIES, SUN, make_corpus

ENTRY = "/entry?id=sunburn%3ABCC"


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    text: str


class Browser:
    """Keeps cookies, follows nothing."""

    def __init__(self, server: ReviewServer) -> None:
        self.server = server
        self.cookies: dict[str, str] = {}

    def ask(self, method: str, path: str, body: str | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            sent = {"Cookie": cookies} if cookies else {}
            if body is not None:
                sent |= {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": str(len(body))}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            for name, value in sent.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders(body.encode() if body else None)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        for cookie in answer.headers.get_all("Set-Cookie") or []:
            name, _, value = cookie.split(";")[0].partition("=")
            self.cookies[name] = value
        return Answer(answer.status, answer.headers, text)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, fields: dict[str, str], **headers: str) -> Answer:
        return self.ask("POST", "/decide", urlencode(fields), **headers)

    def decide(self, path: str, verb: str, **fields: str) -> Answer:
        """Open an entry, fill the form in and send it."""
        page = Page(self.get(path).text)
        hidden = {name: page.fields[name] for name in page.fields if name.startswith(("token", "entry_", "filter_"))}
        return self.post({**hidden, "by": "Ana", "note": "", "decision": verb, **fields})


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus")


@pytest.fixture
def server(corpus: Corpus) -> Iterator[ReviewServer]:
    with ReviewServer(corpus, reviewer="Dr. Default") as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def browser(server: ReviewServer) -> Browser:
    browser = Browser(server)
    address = urlsplit(server.address)
    assert browser.get(f"{address.path}?{address.query}").status == 303
    return browser


def statuses(corpus: Corpus) -> dict[str, str]:
    return {name: item.entry.status for name, item in resolve(corpus, read_log(corpus.path)).entries.items()}


# ------------------------------------------------------------------------------------------------------- reading


def test_the_list_and_its_filters(browser: Browser):
    page = browser.get("/")
    assert page.status == 200
    assert "0 of 4 entries are decided." in page.text
    entries = [link for link in Page(page.text).links if link.startswith("/entry")]
    assert entries == [ENTRY, "/entry?id=sunburn%3ANEV", "/entry?id=itch%3ABCC", "/entry?id=age%3ANEV"]
    for query, count in (("factor=sunburn", 2), ("diagnosis=NEV", 2), ("factor=sunburn&diagnosis=BCC", 1)):
        links = Page(browser.get(f"/?{query}&status=").text).links
        assert len([link for link in links if link.startswith("/entry")]) == count
    assert "No entry is like that." in browser.get("/?status=rejected").text


def test_a_statement_stands_beside_its_passage_with_the_quote_marked(browser: Browser):
    text = browser.get(ENTRY).text
    page = Page(text)
    assert "<mark>Sunburns  in childhood\nraise the risk</mark> of basal cell carcinoma." in text
    assert "<mark>40 of 100 patients</mark>" in text
    for shown in (
        "Says doc1.",
        "Title of doc1",
        "Skin cancer &gt; Risk factors",
        "2025-05",
        "public domain",
        "pdq, doc1",
    ):
        assert shown in text
    assert "https://example.org/doc1" in page.links
    assert "<dd>not stated</dd>" in text
    assert 'value="Dr. Default"' in text
    assert "There are none: the entry says" in browser.get("/entry?id=sunburn%3ANEV").text


def test_documents_are_text_and_never_more(browser: Browser):
    text = browser.get(ENTRY).text
    assert "&lt;script&gt;alert(&#34;planted&#34;)&lt;/script&gt;" in text
    for path in ("/", ENTRY, "/entry?id=age%3ANEV", "/book"):
        page = Page(browser.get(path).text)
        assert "script" not in page.tags
        assert page.fetched == []
        assert not [link for link in page.links if not link.startswith(("/", "#", "https://example.org/"))]
    # An address that is no address is shown, not linked.
    assert "javascript:alert(1)" in browser.get("/entry?id=age%3ANEV").text


def test_every_page_says_that_nothing_may_run_or_be_fetched(browser: Browser):
    for path in ("/", ENTRY, "/book", "/none"):
        headers = browser.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'nonce-" if path != "/none" else "default-src 'none'")
        assert policy.endswith("form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
    answer = browser.get("/")
    nonce = re.search(r"'nonce-([^']+)'", answer.headers["Content-Security-Policy"])
    assert nonce
    assert f'<style nonce="{nonce[1]}">' in answer.text


def test_every_field_of_a_form_has_a_name_that_is_read_out(browser: Browser):
    text = browser.get(ENTRY).text
    for match in re.finditer(r"<(?:input|select|textarea)\b[^>]*>", text):
        field = match[0]
        before = text[: match.start()]
        inside_label = before.rfind("<label") > before.rfind("</label>")
        assert 'type="hidden"' in field or "aria-label" in field or inside_label, field


# ------------------------------------------------------------------------------------------------------ deciding


def test_accept_reject_and_reopen(browser: Browser, corpus: Corpus):
    answer = browser.decide(ENTRY, "accepted", by=" Ana  Sol ", note="as known")
    assert (answer.status, answer.headers["Location"]) == (303, "/entry?id=sunburn%3ANEV")
    decision = read_log(corpus.path).decisions[0]
    assert (decision.decision, decision.by, decision.note) == ("accepted", "Ana Sol", "as known")
    # The name is remembered, the note is not.
    text = browser.get("/entry?id=sunburn%3ANEV").text
    assert 'name="by" value="Ana Sol"' in text
    assert "as known" not in text
    browser.decide("/entry?id=itch%3ABCC", "rejected")
    assert statuses(corpus)["itch:BCC"] == "rejected"
    assert "accepted by <bdi>Ana Sol</bdi>: <bdi>as known</bdi>" in browser.get(ENTRY).text
    browser.decide(ENTRY, "reopened")
    assert statuses(corpus)["sunburn:BCC"] == "proposed"
    assert re.search(r"Open again: Ana re-opened it on \d{4}-\d\d-\d\d\.", browser.get(ENTRY).text)


def test_the_next_open_entry_of_the_filter_follows(browser: Browser):
    path = "/entry?id=age%3ANEV&diagnosis=NEV"
    assert browser.decide(path, "accepted").headers["Location"] == "/entry?id=sunburn%3ANEV&diagnosis=NEV"
    answer = browser.decide("/entry?id=sunburn%3ANEV&diagnosis=NEV", "accepted")
    assert answer.headers["Location"] == "/?diagnosis=NEV&done=1"
    assert "Decided. No other entry is like that." in browser.get(answer.headers["Location"]).text


EDIT = {
    "direction": "lowers",
    "strength": "weak",
    "summary": "Fewer\r\nof them.",
    "statement_0": "Says it.",
    "quote_0_0": "raise the risk of basal cell carcinoma",
    "drop_1": "on",
}


def test_an_edit(browser: Browser, corpus: Corpus):
    assert browser.decide(ENTRY, "edited", **EDIT).status == 303
    found = resolve(corpus, read_log(corpus.path)).entries["sunburn:BCC"].entry
    assert (found.status, found.direction, found.strength, found.summary) == (
        "edited",
        "lowers",
        "weak",
        "Fewer\nof them.",
    )
    assert [(item.text, item.quotes[0].quote) for item in found.statements] == [("Says it.", EDIT["quote_0_0"])]
    assert found.statements[0].quotes[0].chunk_id == SUN.chunk_id


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"by": " "}, "A decision needs the name of who decides."),
        ({"decision": "burn"}, "Input should be 'accepted', 'rejected', 'edited' or 'reopened'."),
        ({"decision": ""}, "Input should be 'accepted', 'rejected', 'edited' or 'reopened'."),
        ({"decision": "edited"}, "Nothing was changed: accept the entry as it is."),
        ({"decision": "edited", "direction": "no_evidence", "strength": ""},
         "No_evidence: an entry with statements has some."),
        ({"decision": "edited", "strength": ""}, "Strength: given exactly where there is evidence."),
        ({"decision": "edited", "statement_0": " "},
         "Statements 1 text: String should have at least 1 character."),
        ({"decision": "edited", "quote_0_0": "never said"},
         f"Sunburn:BCC: statement 1 quotes 'never said', which does not stand in the passage '{SUN.chunk_id}'."),
        ({"entry_hash": "0" * 64},
         "Sunburn:BCC: the entry or a passage it cites is another by now. Look at it again, then decide."),
    ],
)  # fmt: skip
def test_mistakes_are_said_on_the_page_and_nothing_is_lost(
    browser: Browser, corpus: Corpus, fields: dict[str, str], said: str
):
    answer = browser.decide(ENTRY, fields.get("decision", "accepted"), **{"note": "My <note>", **fields})
    assert answer.status == 422
    assert f"Not saved. {said}" in unescape(answer.text)
    assert 'value="My &lt;note&gt;"' in answer.text
    if "quote_0_0" in fields:
        assert "\nnever said</textarea>" in answer.text
        assert "<details open>" in answer.text
    assert read_log(corpus.path).decisions == ()


def test_two_reviewers_and_the_later_one_sees_what_the_first_did(browser: Browser, corpus: Corpus):
    before = Page(browser.get(ENTRY).text).fields
    edited = ENTRIES[0].model_copy(update={"summary": "By another."})
    verdict = Verdict(
        entry_id="sunburn:BCC", entry_hash=corpus.hashes["sunburn:BCC"], decision="edited", by="Bo", edited=edited
    )
    append(corpus, [verdict])
    answer = browser.post({**before, "decision": "accepted", "by": "Ana"})
    assert answer.status == 422
    assert "By another." in answer.text
    assert browser.decide(ENTRY, "accepted").status == 303


# --------------------------------------------------------------------------------------------------- who may ask


def test_who_does_not_know_the_address_sees_nothing(server: ReviewServer, corpus: Corpus):
    stranger = Browser(server)
    for path in ("/", ENTRY, "/book", "/?key=guess"):
        answer = stranger.get(path)
        assert answer.status == 403
        assert "sunburn" not in answer.text
    stranger.cookies[f"prima_vet_{server.port}"] = "guess"
    assert stranger.get("/").status == 403
    fields = {"token": server.token, "entry_id": "sunburn:BCC", "entry_hash": corpus.hashes["sunburn:BCC"]}
    assert stranger.post({**fields, "decision": "accepted", "by": "Eve"}).status == 403
    assert read_log(corpus.path).decisions == ()


def test_the_key_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(server: ReviewServer):
    answer = Browser(server).get(f"/?key={server.key}")
    assert (answer.status, answer.headers["Location"]) == (303, "/")
    assert answer.headers["Set-Cookie"] == f"prima_vet_{server.port}={server.key}; Path=/; HttpOnly; SameSite=Lax"


def test_a_form_of_another_site_is_refused(browser: Browser, corpus: Corpus):
    fields = {**Page(browser.get(ENTRY).text).fields, "decision": "accepted", "by": "Ana"}
    for token in ("", "guess"):
        assert browser.post({**fields, "token": token}).status == 403
    del fields["token"]
    assert browser.post(fields).status == 403
    assert browser.decide(ENTRY, "accepted", **{"token": "x"}).status == 403
    fields = {**Page(browser.get(ENTRY).text).fields, "decision": "accepted", "by": "Ana"}
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{browser.server.port + 1}"):
        assert browser.post(fields, Origin=origin).status == 403
    assert read_log(corpus.path).decisions == ()
    assert browser.post(fields, Origin=f"http://127.0.0.1:{browser.server.port}").status == 303


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_name_that_was_pointed_here_is_refused(browser: Browser, host: str):
    answer = browser.get("/", Host=host)
    assert answer.status == 421
    assert "sunburn" not in answer.text


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:80"])
def test_a_tunnel_with_another_port_is_fine(browser: Browser, host: str):
    assert browser.get("/", Host=host).status == 200


def test_requests_that_make_no_sense(browser: Browser, corpus: Corpus):
    good = Page(browser.get(ENTRY).text).fields
    assert browser.get("/none").status == 404
    assert browser.get("/entry?id=x").status == 404
    assert browser.post({**good, "entry_id": "x"}).status == 404
    assert browser.ask("POST", "/", urlencode(good)).status == 404
    assert browser.ask("POST", "/decide", "a=1", Content_Type="text/plain").status == 415
    assert browser.ask("POST", "/decide", Content_Length="").status == 411
    assert browser.ask("POST", "/decide", Content_Length="2000000").status == 413
    assert browser.ask("POST", "/decide", "&".join(f"a{number}=1" for number in range(3000))).status == 400
    assert browser.ask("PUT", "/").status == 501
    assert browser.post({**good, "by": "\U0001f600 Ana\r\nSet-Cookie: x=1", "decision": "accepted"}).status == 303
    assert read_log(corpus.path).decisions[0].by == "\U0001f600 Ana Set-Cookie: x=1"
    assert browser.get("/").status == 200


def test_a_log_that_was_damaged_meanwhile_is_said(browser: Browser, corpus: Corpus):
    browser.decide(ENTRY, "accepted")
    (corpus.path / "vetting.jsonl").write_text("{}\n")
    answer = browser.get("/")
    assert answer.status == 500
    assert "line 1 is no decision: it was changed" in answer.text


def test_what_a_crash_cut_off_and_unknown_entries_are_said(browser: Browser, corpus: Corpus, tmp_path: Path):
    browser.decide(ENTRY, "accepted")
    with (corpus.path / "vetting.jsonl").open("a") as file:
        file.write('{"half')
    assert "The last line of the log was never finished" in browser.get("/").text


def test_the_book_as_it_stands(browser: Browser):
    browser.decide(ENTRY, "accepted")
    assert "1 accepted" in browser.get("/book").text


def test_where_the_page_may_listen(corpus: Corpus, server: ReviewServer):
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.org")] == [  # noqa: S104
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert re.fullmatch(rf"http://127\.0\.0\.1:{server.port}/\?key=[\w-]{{32}}", server.address)
    with pytest.raises(PrimaError) as caught:
        ReviewServer(corpus, port=server.port)
    assert str(caught.value) == (
        f"127.0.0.1: the review page cannot listen on port {server.port} (Address already in use)\n"
        "  Choose another --port."
    )
    with pytest.raises(PrimaError, match=r"cannot listen on port 70000"):
        ReviewServer(corpus, port=70000)
