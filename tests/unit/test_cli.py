from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.stages import ingest
from prima_ray.stages.predict import _read
from prima_ray.training import cluster


def error_of(words: str) -> Exception:
    """As safetensors and Arrow say it, whose exceptions have no errno."""
    return RuntimeError(words)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        error_of("Error while serializing: I/O error: No space left on device (os error 28)"),
        error_of("Error writing bytes to file. Detail: [errno 27] File too large"),
    ],
)
def test_a_full_disk_is_said_without_a_traceback(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run(config: Any) -> None:
        try:
            raise error
        except Exception as cause:
            raise ValueError("a worker failed") from cause

    monkeypatch.setattr(ingest, "run", run)
    config = Path(__file__).parents[2] / "jobs" / "configs" / "phantoms" / "ingest.yaml"
    assert main(["ingest", str(config), "--set", f"out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-2].startswith("prima: the disk is full, or a quota or limit on files is reached (")
    assert said[-1] == "  Make room and run the same command again: it continues where it can."


def test_sigterm_ends_a_command_as_ctrl_c_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Also in a job of Ray's, where SIGINT is blocked."""

    def run(config: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(ingest, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    config = Path(__file__).parents[2] / "jobs" / "configs" / "phantoms" / "ingest.yaml"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        assert main(["ingest", str(config), "--set", f"out={tmp_path / 'out'}"]) == 143
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert capsys.readouterr().err == "prima: stopped; the same command continues where it can\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_rays_handler_of_sigterm_does_not_stay():
    def ours(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with cluster._own_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: None)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_error_of_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(config: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ingest, "run", run)
    config = Path(__file__).parents[2] / "jobs" / "configs" / "phantoms" / "ingest.yaml"
    with pytest.raises(OSError, match="Input/output error"):
        main(["ingest", str(config), "--set", f"out={tmp_path / 'out'}"])


def test_a_pipe_is_no_photo(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PrimaError, match="is no file"):
        _read(str(tmp_path / "pipe"))
