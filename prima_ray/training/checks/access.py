"""Who may use the cluster: Ray's tokens."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from prima_ray.training.checks import Check, Finding, Level, Subject

_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_LOOPBACK = re.compile(r"^(?:\w+://)?(?:localhost|127\.\d+\.\d+\.\d+|\[::1\]|local|auto)(?::|$)")
_GENERATE = "`ray get-auth-token --generate` writes one; copy it to every node, and set RAY_AUTH_MODE=token there."


def token(subject: Subject) -> Iterator[Finding]:
    """Whoever reaches a cluster without tokens runs code on it (CVE-2023-48022)."""
    file = token_file()
    named = os.environ.get(_TOKEN_PATH)
    if named and not os.environ.get(_TOKEN) and file is None:
        yield Finding(
            "error", f"{_TOKEN_PATH} names a file that is not there, or is empty: Ray stops", named, _GENERATE
        )
        return
    has_token = bool(os.environ.get(_TOKEN)) or file is not None
    mode = os.environ.get(_MODE, "").lower()
    if mode == "token" and not has_token:
        yield Finding("error", f"{_MODE} is token, and there is none", mend=_GENERATE)
        return
    if subject.address is None:
        yield Finding("ok", "a cluster of one's own gets a token from Ray by itself")
    elif mode not in ("", "token") or not has_token:
        why = f"{_MODE} is {mode}" if mode not in ("", "token") else "there is no token"
        text = f"{why}: this cluster refuses us, or lets everybody who reaches it run code on it"
        # On loopback that is whoever has an account on this machine.
        level: Level = "warning" if _LOOPBACK.match(subject.address) else "error"
        yield Finding(level, text, subject.address, _GENERATE)
    else:
        yield Finding("ok", "the cluster is joined with a token", subject.address)


def token_privacy(subject: Subject) -> Iterator[Finding]:
    """Ray writes its token with the usual mode, readable by every account of the machine."""
    del subject
    file = token_file()
    if file is None or os.environ.get(_TOKEN):
        return
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        text = f"other accounts of this machine may read the token (mode {mode:o})"
        yield Finding("warning", text, str(file), f"chmod 600 {file}")


def token_file() -> Path | None:
    """The file that Ray takes its token from, where it has something in it."""
    named = os.environ.get(_TOKEN_PATH)
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return file if file.is_file() and file.stat().st_size else None


ACCESS: tuple[Check, ...] = (token, token_privacy)
