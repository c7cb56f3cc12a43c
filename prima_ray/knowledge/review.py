"""The review page: a small server on this machine, for one person in one browser.

It holds no state but the corpus: every page is made from the log, and a decision is a line of it, so several people may
review at once, each with a server of their own. There is no script on its pages and nothing is fetched from elsewhere.

Who may ask: whoever opens the address that is printed at the start (its key becomes a cookie), so that other users of
the machine cannot decide in a physician's name. A request whose Host is no local name or bare address is refused (DNS
rebinding), a form without the page's token too (forms on other sites).
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import secrets
import socket
import socketserver
from collections.abc import Mapping
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pydantic import ValidationError

from prima_ray.base import PrimaError
from prima_ray.data.rejection import RecordRejected
from prima_ray.knowledge.book import render_book
from prima_ray.knowledge.corpus import Corpus
from prima_ray.knowledge.pages import render
from prima_ray.knowledge.review_pages import (
    FILTERS,
    edited_entry,
    entry_address,
    entry_page,
    list_address,
    list_page,
    matches,
)
from prima_ray.knowledge.vetting import Log, Verdict, Vetting, append, read_log, resolve

_log = logging.getLogger(__name__)
_MAX_BODY = 1_000_000


class ReviewServer(ThreadingHTTPServer):
    """Serves one corpus. `serve_forever` until `shutdown`; `address` is what to open."""

    daemon_threads = True

    def __init__(self, corpus: Corpus, *, host: str = "127.0.0.1", port: int = 0, reviewer: str = "") -> None:
        self.corpus = corpus
        self.reviewer = reviewer
        self.host = host
        self.key = secrets.token_urlsafe(24)
        self.token = secrets.token_urlsafe(24)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PrimaError(
                f"the review page cannot listen on port {port} ({reason})", where=host, mend="Choose another --port."
            ) from None

    def server_bind(self) -> None:
        # HTTPServer would ask DNS for the host's name, which takes seconds on a machine without a network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def address(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}/?key={self.key}"

    def state(self) -> tuple[Log, Vetting]:
        """What has been decided by now, by whomever."""
        log = read_log(self.corpus.path)
        return log, resolve(self.corpus, log)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's
        _log.debug("review: a request from %s failed", client_address, exc_info=True)


class _Refused(Exception):  # noqa: N818 - an answer
    """Answered with a status and a sentence."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server_version = "prima"
    sys_version = ""
    timeout = 30

    @property
    def desk(self) -> ReviewServer:
        return cast(ReviewServer, self.server)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ARG002 - the base class's
        # Without the request line: it may hold the key.
        _log.debug("review: answered %s", args[1] if len(args) > 1 else "")

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, handle: Any) -> None:
        try:
            self._check_host()
            handle()
        except _Refused as refusal:
            self._page(refusal.status, self._message(refusal.status.phrase, str(refusal), refusal.status))
        except PrimaError as error:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            self._page(status, self._message("This does not work", str(error), status))

    # ------------------------------------------------------------------------------------------------ who asks

    def _check_host(self) -> None:
        name = _host_name(self.headers.get("Host", ""))
        if name not in ("localhost", self.desk.host.lower()) and not _is_address(name):
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "This page answers to names of this machine only.")

    def _check_key(self) -> None:
        given = self._cookies().get(self._cookie_name, "")
        if not hmac.compare_digest(given.encode(), self.desk.key.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "Open the address that prima vet printed when it started.")

    def _check_form(self, form: Mapping[str, str]) -> None:
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc.lower() != self.headers.get("Host", "").lower():
            raise _Refused(HTTPStatus.FORBIDDEN, "The form was sent by another site.")
        if not hmac.compare_digest(form.get("token", "").encode(), self.desk.token.encode()):
            raise _Refused(
                HTTPStatus.FORBIDDEN,
                "The form is not of this page, or prima vet was started anew: open the entry again.",
            )

    @property
    def _cookie_name(self) -> str:
        # Cookies do not know ports.
        return f"prima_vet_{self.desk.port}"

    def _cookies(self) -> dict[str, str]:
        try:
            return {name: item.value for name, item in SimpleCookie(self.headers.get("Cookie", "")).items()}
        except CookieError:
            return {}

    # --------------------------------------------------------------------------------------------------- pages

    def _get(self) -> None:
        address = urlsplit(self.path)
        query = _fields(address.query)
        if "key" in query:
            if not hmac.compare_digest(query["key"].encode(), self.desk.key.encode()):
                raise _Refused(HTTPStatus.FORBIDDEN, "The key is not the one that prima vet printed.")
            self._redirect("/", cookies={self._cookie_name: self.desk.key})
            return
        self._check_key()
        log, vetting = self.desk.state()
        nonce = secrets.token_urlsafe(12)
        match address.path:
            case "/":
                wanted = {key: query.get(key, "") for key in FILTERS}
                message = "Decided. No other entry is like that." if query.get("done") else ""
                page = list_page(self.desk.corpus, vetting, log, wanted, message=message, nonce=nonce)
            case "/entry" if query.get("id") in vetting.entries:
                page = self._entry(vetting, query["id"], query, nonce)
            case "/book":
                page = render_book(self.desk.corpus, vetting, nonce=nonce)
            case _:
                raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page or entry.")
        self._page(HTTPStatus.OK, page, nonce)

    def _entry(self, vetting: Vetting, entry_id: str, wanted: Mapping[str, str], nonce: str, **shown: Any) -> str:
        name = unquote(self._cookies().get(f"{self._cookie_name}_name", "")) or self.desk.reviewer
        return entry_page(
            self.desk.corpus,
            vetting,
            entry_id,
            wanted,
            token=self.desk.token,
            nonce=nonce,
            reviewer=shown.get("form", {}).get("by", name),
            **shown,
        )

    def _post(self) -> None:
        form = self._body()
        self._check_key()
        self._check_form(form)
        if urlsplit(self.path).path != "/decide":
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")
        wanted = {key: form.get(f"filter_{key}", "") for key in FILTERS}
        _, vetting = self.desk.state()
        entry_id = form.get("entry_id", "")
        item = vetting.entries.get(entry_id)
        if item is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such entry.")
        try:
            verdict = Verdict(
                entry_id=entry_id,
                entry_hash=form.get("entry_hash", ""),
                decision=form.get("decision", ""),
                by=form.get("by", ""),
                note=form.get("note", "").strip(),
                edited=edited_entry(item, form) if form.get("decision") == "edited" else None,
            )
            decided = append(self.desk.corpus, [verdict])[0]
        except (PrimaError, RecordRejected, ValueError) as error:
            self._again(entry_id, wanted, form, _sentence(error))
            return
        _log.info("%s: %s by %s", decided.entry_id, decided.decision, decided.by)
        self._redirect(self._next(entry_id, wanted), cookies={f"{self._cookie_name}_name": quote(decided.by, safe="")})

    def _again(self, entry_id: str, wanted: Mapping[str, str], form: Mapping[str, str], text: str) -> None:
        """The entry as it stands now, with what was filled in."""
        _, vetting = self.desk.state()
        nonce = secrets.token_urlsafe(12)
        page = self._entry(vetting, entry_id, wanted, nonce, message=f"Not saved. {text}", form=form)
        self._page(HTTPStatus.UNPROCESSABLE_ENTITY, page, nonce)

    def _next(self, entry_id: str, wanted: Mapping[str, str]) -> str:
        """The following entry that matches and is still open, from the top after the last; else the list."""
        _, vetting = self.desk.state()
        names = list(vetting.entries)
        at = names.index(entry_id) + 1
        for name in [*names[at:], *names[:at]]:
            entry = vetting.entries[name].entry
            if entry.status == "proposed" and name != entry_id and matches(entry, wanted):
                return entry_address(name, wanted)
        back = list_address(wanted)
        return f"{back}{'&' if '?' in back else '?'}done=1"

    # ---------------------------------------------------------------------------------------------------- HTTP

    def _body(self) -> dict[str, str]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "The form has no length.")
        if int(length) > _MAX_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The form is too large.")
        if self.headers.get_content_type() != "application/x-www-form-urlencoded":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "This is no form.")
        return _fields(self.rfile.read(int(length)).decode("ascii", errors="replace"))

    def _message(self, heading: str, text: str, status: HTTPStatus) -> str:
        return render("review_message.html.j2", heading=heading, text=text, has_link=status != HTTPStatus.FORBIDDEN)

    def _page(self, status: HTTPStatus, page: str, nonce: str = "") -> None:
        data = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        style = f"'nonce-{nonce}'" if nonce else "'unsafe-inline'"
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; style-src {style}; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        )
        self._common_headers()
        self.wfile.write(data)

    def _redirect(self, address: str, *, cookies: Mapping[str, str]) -> None:
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", address)
        self.send_header("Content-Length", "0")
        for name, value in cookies.items():
            self.send_header("Set-Cookie", f"{name}={value}; Path=/; HttpOnly; SameSite=Lax")
        self._common_headers()

    def _common_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        # Not `no-referrer`: browsers then send forms with the origin `null`.
        self.send_header("Referrer-Policy", "same-origin")
        self.end_headers()


def _fields(text: str) -> dict[str, str]:
    try:
        found = parse_qs(text, keep_blank_values=True, max_num_fields=2000)
    except ValueError:
        raise _Refused(HTTPStatus.BAD_REQUEST, "The form has too many fields.") from None
    return {key: values[0] for key, values in found.items()}


def _host_name(host: str) -> str:
    """`127.0.0.1` of `127.0.0.1:8700`, `::1` of `[::1]:8700`. The port may be another one, through a tunnel."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    # Rebinding needs a name that its owner can point elsewhere; a bare address is none.
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _sentence(error: Exception) -> str:
    match error:
        case ValidationError():
            text = error.errors()[0]["msg"].removeprefix("Value error, ")
        case PrimaError():
            text = f"{error.what}. {error.mend or ''}"
        case RecordRejected():
            text = error.detail
        case _:
            text = str(error)
    text = text.strip().removesuffix(".")
    return f"{text[:1].upper()}{text[1:]}."
