"""API keys: a file of hashes, a line a key. `prima keys FILE --add NAME` makes one and shows it once.

    # name  hash of the key
    clinic-a  sha256:9f86d0...

A key is 256 random bits, so a plain hash is as good as a slow one: nothing can be guessed. Removing a line revokes the
key within a second; no restart is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from prima_ray.base import PrimaError, write_atomic

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_RELOAD_S = 1.0


def hash_key_text(key: str) -> str:
    """What of a key is stored."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: str | Path) -> dict[str, str]:
    """Name -> hash.

    Raises:
        PrimaError: no such file, or a line that is no key; its text is not repeated, it may be a key in clear.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise PrimaError(
            "no such file of API keys", where=path, mend="`prima keys FILE --add NAME` makes it with its first key."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise PrimaError(f"the API keys cannot be read ({reason})", where=path) from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, digest = line.strip().partition(" ")
        digest = digest.strip()
        if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest):
            raise PrimaError(
                f"line {number} is no `NAME sha256:HASH`",
                where=path,
                mend="`prima keys FILE --add NAME` writes such lines.",
            )
        if name in found:
            raise PrimaError(f"line {number}: the name {name!r} is there twice", where=path)
        found[name] = digest
    return found


def add_key(path: str | Path, name: str) -> str:
    """Make a key, store its hash, and return it: it cannot be had again. The file is its owner's alone.

    Raises:
        PrimaError: the name is taken or none, or the file is damaged.
    """
    if not _NAME.fullmatch(name):
        raise PrimaError(f"{name!r} is no name of a key", mend="Letters, digits, '-', '_' and '.', 64 at most.")
    there = Path(path).exists()
    if there and name in read_keys(path):
        raise PrimaError(f"a key of the name {name!r} is there", where=path, mend="Remove its line to replace it.")
    key = "prima_" + secrets.token_urlsafe(32)
    before = Path(path).read_text(encoding="utf-8") if there else "# name  hash of the key\n"
    if before and not before.endswith("\n"):
        before += "\n"
    try:
        write_atomic(path, f"{before}{name}  {hash_key_text(key)}\n")
        Path(path).chmod(0o600)
    except OSError as error:
        raise PrimaError(f"the API keys cannot be written ({error.strerror})", where=path) from None
    return key


class KeyRing:
    """The keys of a file, looked at again when the file changes."""

    def __init__(self, path: str | Path) -> None:
        """Raises:
        PrimaError: see `read_keys`; also where the file holds no key.
        """
        self._path = Path(path)
        self._keys: Mapping[str, str] = read_keys(path)
        if not self._keys:
            raise PrimaError("holds no API key", where=path, mend="`prima keys FILE --add NAME` makes one.")
        self._stamp = self._seen()
        self._looked = time.monotonic()

    def name_of(self, key: str) -> str | None:
        """The key's name, or None for a wrong key. Every stored hash is compared, each in constant time."""
        self._refresh()
        digest, found = hash_key_text(key), None
        for name, stored in self._keys.items():
            if hmac.compare_digest(digest, stored):
                found = name
        return found

    def _seen(self) -> tuple[int, int] | None:
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_ino

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < _RELOAD_S:
            return
        self._looked, stamp = now, self._seen()
        if stamp == self._stamp:
            return
        try:
            self._keys, self._stamp = read_keys(self._path), stamp
        except PrimaError as error:
            # A file half edited must not let anybody in, nor lock everybody out.
            _log.warning("the API keys stay as they were: %s", error.what)
