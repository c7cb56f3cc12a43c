"""What a node answers about a folder; the question over a cluster is in tests/ray/test_shared_folder.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prima_ray.training import shared_folder
from prima_ray.training.shared_folder import _answer

ASK = """
import sys
from prima_ray.training import shared_folder
shared_folder._APPEARS_S = 0.1
print(shared_folder._answer(*sys.argv[1:]))
"""
UNSEEN = "what another machine wrote there is not seen; it is on a disk of one machine"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "_APPEARS_S", 0.1)


def test_a_folder_that_is_seen_gets_a_reply(tmp_path: Path):
    (tmp_path / "asked").write_text("asked")
    assert _answer(str(tmp_path), "asked", "reply") is None
    assert (tmp_path / "reply").read_text() == "reply"


def test_a_store_that_is_seen_gets_a_reply(store: str):
    folder = shared_folder.Folder.at(store)
    folder.write("asked", b"asked")
    assert _answer(store, "asked", "reply") is None
    assert folder.exists("reply")


def test_a_folder_of_its_own_is_told(tmp_path: Path):
    assert _answer(str(tmp_path / "elsewhere"), "asked", "reply") == UNSEEN
    (tmp_path / "asked").write_text("asked")
    inside = [sys.executable, "-c", ASK, str(tmp_path), "asked", "reply"]
    # The same path on another disk, as on another machine.
    try:
        mounted = subprocess.run(
            ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(tmp_path), *inside],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if "mount" in mounted.stderr or "unshare" in mounted.stderr:
        pytest.skip("mount namespaces are not allowed here")
    assert mounted.stdout == f"{UNSEEN}\n", mounted.stderr
    assert not (tmp_path / "reply").exists()
