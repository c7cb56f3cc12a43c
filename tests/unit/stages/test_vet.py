from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest

from prima_ray.base import PrimaError
from prima_ray.cli import main
from prima_ray.knowledge.vetting import read_log
from prima_ray.stages.vet import run_vet
from tests.unit.knowledge.toy_corpus import make_corpus


def say(corpus: Path | str, **options: Any) -> str:
    with pytest.raises(PrimaError) as caught:
        run_vet(str(corpus), **options)
    return str(caught.value)


def test_a_spreadsheet_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    corpus, sheet = tmp_path / "corpus", tmp_path / "vetting.csv"
    make_corpus(corpus)
    assert main(["vet", str(corpus), "--export", str(sheet)]) == 0
    assert capsys.readouterr().out == f"run: {sheet}\n"
    lines = sheet.read_bytes().decode("utf-8-sig").split("\r\n")
    row = next(number for number, line in enumerate(lines) if line.startswith('"age:NEV"'))
    lines[row] = lines[row].replace('"proposed","","","",""', '"proposed","","","accepted","Ana"')
    sheet.write_bytes("\r\n".join(lines).encode())
    with caplog.at_level(logging.INFO):
        assert main(["vet", str(corpus), "--import", str(sheet)]) == 0
    assert capsys.readouterr().out == f"run: {corpus}\n"
    assert caplog.messages[-2:] == ["decisions taken over: 1", "1 of 4 entries are decided"]
    assert "1 accepted" in (corpus / "book.html").read_text()
    # The same decisions for a corpus that was made anew.
    make_corpus(tmp_path / "new")
    run_vet(str(tmp_path / "new"), import_=str(corpus / "vetting.jsonl"))
    assert [item.entry_id for item in read_log(tmp_path / "new").decisions] == ["age:NEV"]
    assert main(["vet", str(corpus), "--import", str(tmp_path / "none.csv")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"prima: {tmp_path}/none.csv: cannot be read (No such file or directory)"
    )


def test_mistakes(tmp_path: Path):
    make_corpus(tmp_path)
    assert say("s3://bucket/corpus") == (
        "s3://bucket/corpus: a corpus is vetted on a local disk\n  Copy the folder here, and back."
    )
    assert say(tmp_path, export="a.csv", import_="a.csv") == (
        "give --export or --import, not both\n  See `prima vet --help`."
    )
    assert say(tmp_path / "none").startswith(f"{tmp_path}/none: no such corpus")
    (tmp_path / "vetting.jsonl").write_text("{}\n")
    assert say(tmp_path, port=0).startswith(f"{tmp_path}/vetting.jsonl: line 1 is no decision")


def test_the_page_is_served_until_it_is_interrupted(tmp_path: Path):
    make_corpus(tmp_path)
    command = [sys.executable, "-m", "prima_ray.cli", "vet", str(tmp_path), "--port", "0", "--reviewer", "Ana"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads yet
    )
    try:
        assert process.stderr
        address = re.search(r"http://127\.0\.0\.1:\d+/\?key=\S+", process.stderr.readline())
        assert address
        jar = urllib.request.HTTPCookieProcessor(CookieJar())
        page = urllib.request.build_opener(jar).open(address[0], timeout=30).read().decode()
        assert "0 of 4 entries are decided." in page
    finally:
        os.kill(process.pid, signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, f"run: {tmp_path}\n")
    assert err.splitlines()[-1] == "0 of 4 entries are decided"
    assert (tmp_path / "book.html").is_file()


def test_an_open_port_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    make_corpus(tmp_path)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prima_ray.knowledge.review.ReviewServer.serve_forever", interrupt)
    run_vet(str(tmp_path), host="0.0.0.0", port=0)  # noqa: S104 - what is tested
    assert caplog.messages[0].startswith(
        "warning: 0.0.0.0 can be reached from other machines, and nothing is encrypted"
    )
