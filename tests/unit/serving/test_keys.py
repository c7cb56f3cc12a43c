"""API keys at rest, and how they are told apart."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.serving import keys
from prima_ray.serving.config import RateConfig
from prima_ray.serving.keys import KeyRing, add_key, read_keys
from prima_ray.serving.rate import TokenBuckets


def message(call: object, *arguments: object) -> str:
    with pytest.raises(PrimaError) as caught:
        call(*arguments)  # type: ignore[operator]
    return str(caught.value)


def test_a_key_is_shown_once_and_stored_as_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    assert main(["keys", str(file), "--add", "clinic-a"]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["keys", str(file), "--add", "clinic-b"]) == 0
    assert key not in file.read_text()
    assert read_keys(file)["clinic-a"] == "sha256:" + hashlib.sha256(key.encode()).hexdigest()
    assert file.stat().st_mode & 0o777 == 0o600
    ring = KeyRing(file)
    assert ring.name_of(key) == "clinic-a"
    assert ring.name_of(capsys.readouterr().out.strip()) == "clinic-b"
    assert ring.name_of(key[:-1]) is ring.name_of("") is ring.name_of("\udcff") is None


def test_mistakes_are_told_without_the_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    assert message(KeyRing, file) == (
        f"{file}: no such file of API keys\n  `prima keys FILE --add NAME` makes it with its first key."
    )
    file.write_text("# none\n")
    assert message(KeyRing, file) == f"{file}: holds no API key\n  `prima keys FILE --add NAME` makes one."
    file.write_text("one prima_the-key-in-clear\n")
    assert message(read_keys, file) == (
        f"{file}: line 1 is no `NAME sha256:HASH`\n  `prima keys FILE --add NAME` writes such lines."
    )
    file.unlink()
    add_key(file, "one")
    assert message(add_key, file, "one") == (
        f"{file}: a key of the name 'one' is there\n  Remove its line to replace it."
    )
    assert message(add_key, file, "a b") == (
        "'a b' is no name of a key\n  Letters, digits, '-', '_' and '.', 64 at most."
    )


def test_a_removed_line_revokes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_RELOAD_S", 0.0)
    file = tmp_path / "keys"
    one, two = add_key(file, "one"), add_key(file, "two")
    ring = KeyRing(file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith("one")) + "\n")
    os.utime(file, ns=(1, 1))
    assert (ring.name_of(one), ring.name_of(two)) == (None, "two")
    # Half an edit locks nobody out, and lets nobody in.
    file.write_text("two sha")
    os.utime(file, ns=(2, 2))
    assert (ring.name_of(one), ring.name_of(two)) == (None, "two")


def test_buckets_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    buckets = TokenBuckets(RateConfig(per_minute=60, burst=2), clock=lambda: now)
    assert [buckets.take("a") for _ in range(3)] == [0.0, 0.0, 1.0]
    assert buckets.take("b") == 0.0
    now = 0.5
    assert buckets.take("a") == pytest.approx(0.5)
    now = 1.1
    assert [buckets.take("a") > 0 for _ in range(2)] == [False, True]
    assert TokenBuckets(RateConfig()).take("a") == 0.0
