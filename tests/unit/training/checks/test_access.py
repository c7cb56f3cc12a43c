"""Tokens: there, private, and asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from prima_ray.training.checks import Subject, run_checks
from prima_ray.training.checks.access import ACCESS
from prima_ray.training.facts import Facts

HERE = Facts(host="here", python="3.11.7")
GENERATE = "`ray get-auth-token --generate` writes one; copy it to every node, and set RAY_AUTH_MODE=token there."


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def texts(address: str | None) -> list[tuple[str, str]]:
    return [(item.level, str(item.as_error())) for item in run_checks(ACCESS, Subject(here=HERE, address=address))]


def test_without_a_cluster_nothing_is_needed() -> None:
    assert texts(None) == [("ok", "a cluster of one's own gets a token from Ray by itself")]


@pytest.mark.parametrize(
    ("address", "level"),
    [("10.0.0.1:6379", "error"), ("ray://head:10001", "error"), ("127.0.0.1:6379", "warning"), ("auto", "warning")],
)
def test_a_cluster_without_a_token(address: str, level: str) -> None:
    why = "there is no token: this cluster refuses us, or lets everybody who reaches it run code on it"
    assert texts(address) == [(level, f"{address}: {why}\n  {GENERATE}")]


def test_a_cluster_with_tokens_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    why = "RAY_AUTH_MODE is disabled: this cluster refuses us, or lets everybody who reaches it run code on it"
    assert texts("10.0.0.1:6379") == [("error", f"10.0.0.1:6379: {why}\n  {GENERATE}")]


def test_a_mode_that_asks_for_a_token_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert texts(None) == [("error", f"RAY_AUTH_MODE is token, and there is none\n  {GENERATE}")]
    named = tmp_path / "token"
    named.touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    why = "RAY_AUTH_TOKEN_PATH names a file that is not there, or is empty: Ray stops"
    assert texts(None) == [("error", f"{named}: {why}\n  {GENERATE}")]


def test_a_token_that_others_may_read(tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    assert texts("10.0.0.1:6379") == [
        ("ok", "10.0.0.1:6379: the cluster is joined with a token"),
        ("warning", f"{file}: other accounts of this machine may read the token (mode 644)\n  chmod 600 {file}"),
    ]
    file.chmod(0o600)
    assert texts("10.0.0.1:6379") == [("ok", "10.0.0.1:6379: the cluster is joined with a token")]
